import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax.problems.lasso import lasso
from lohp_jax.problems.rastrigin import rastrigin
from lohp_jax.solvers.descent import descend, lbfgs, run_optax

FAMILY = rastrigin(3)
PROBLEM = FAMILY.sample(jax.random.key(1))
TARGET = jnp.array([3.0, -2.0, 0.5, 7.0])
SCALE = jnp.array([1.0, 10.0, 100.0, 3.0])


def quadratic(x):
    return 0.5 * jnp.sum(SCALE * (x - TARGET) ** 2)


def test_descend_is_the_optimizer_of_optax():
    trace = descend(quadratic, jnp.zeros(4), 5, optax.adam(0.1))
    x, expected = jnp.zeros(4), [np.zeros(4)]
    state = optax.adam(0.1).init(x)
    for _ in range(5):
        updates, state = optax.adam(0.1).update(jax.grad(quadratic)(x), state, x)
        x = optax.apply_updates(x, updates)
        expected.append(x)
    np.testing.assert_allclose(trace.path, expected, rtol=1e-6)
    np.testing.assert_allclose(trace.values, jax.vmap(quadratic)(jnp.stack(expected)), rtol=1e-5)
    assert (trace.objective_calls, trace.gradient_calls) == (0, 5)


def test_run_optax_offers_the_value():
    seen = optax.GradientTransformationExtraArgs(
        lambda params: jnp.zeros(()),
        lambda updates, state, params, *, value, **extra: (jnp.zeros_like(updates) + value, state),
    )
    x0 = jnp.array([0.3, -0.2, 0.1])
    trace = run_optax(FAMILY, PROBLEM, x0, 1, optimizer=seen)
    np.testing.assert_allclose(trace.x, x0 + FAMILY.objective(x0, PROBLEM), rtol=1e-6)


def make_quadratic_family():
    """A LASSO's smooth part is a quadratic: with no penalty, its minimum is the least squares one."""
    family = lasso(8, 4, nonzeros=2)
    problem = family.sample(jax.random.key(0))
    return family, problem | {"penalty": jnp.float32(0.0)}


def test_lbfgs_solves_a_quadratic_in_few_steps():
    family, problem = make_quadratic_family()
    trace = jax.jit(lambda x0: lbfgs(family, problem, x0, 12))(jnp.ones(4))
    expected = np.linalg.lstsq(np.float64(problem["A"]), np.float64(problem["b"]))[0]
    np.testing.assert_allclose(trace.x, expected, atol=1e-4)
    assert trace.path.shape == (13, 4) and trace.values[-1] < 1e-8
    assert trace.objective_calls == trace.gradient_calls >= 13


def test_lbfgs_counts_what_its_line_search_evaluates():
    calls = []

    def counted(x, problem):
        jax.debug.callback(lambda _: calls.append(1), x[0])
        return quadratic(x)

    family = dataclasses.replace(FAMILY, objective=counted)
    trace = lbfgs(family, {}, jnp.zeros(4), 6)
    jax.effects_barrier()
    assert len(calls) == trace.gradient_calls + len(trace.path)  # the latter fill `values`


def test_zero_steps_give_the_start():
    trace = descend(quadratic, TARGET + 1, 0, optax.sgd(0.1))
    np.testing.assert_array_equal(trace.path, (TARGET + 1)[None])
    assert trace.gradient_calls == 0


def test_negative_steps_are_rejected():
    with pytest.raises(ValueError, match="num_steps must be 0 or more, got -2"):
        descend(quadratic, TARGET, -2, optax.sgd(0.1))
