import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.problems.rastrigin import rastrigin
from lohp_jax.solvers.newton import damped_newton

FAMILY = rastrigin(2)


def on(objective):
    return dataclasses.replace(FAMILY, objective=lambda x, problem: objective(x))


def test_convergence_is_quadratic():
    """Σ (e^x_i - x_i) has its minimum at 0, where Newton's error e becomes e² / 2."""
    with jax.enable_x64(True):
        family = on(lambda x: jnp.sum(jnp.exp(x) - x))
        path = damped_newton(family, {}, jnp.array([0.5, 0.3]), 4, dampings=(0.0,)).path
        error = np.abs(path).max(1)
    np.testing.assert_allclose(error[2:4] / error[1:3] ** 2, 0.5, rtol=0.1)
    assert error[3] < 1e-4 and error[4] < 1e-8


def test_one_step_solves_a_quadratic():
    matrix = jnp.array([[2.0, 0.5], [0.5, 1.0]])
    family = on(lambda x: 0.5 * x @ matrix @ x - jnp.sum(x))
    trace = damped_newton(family, {}, jnp.array([4.0, -3.0]), 1)
    np.testing.assert_allclose(trace.x, np.linalg.solve(matrix, np.ones(2)), atol=1e-5)


@pytest.fixture(scope="module")
def solved():
    @jax.jit
    @jax.vmap
    def solve(key):
        problem = FAMILY.sample(key)
        trace = damped_newton(FAMILY, problem, 5 * jax.random.normal(key, (2,)), 20)
        slope = jax.grad(FAMILY.objective)(trace.x, problem)
        return trace, slope, jax.hessian(FAMILY.objective)(trace.x, problem)

    return solve(jax.random.split(jax.random.key(0), 40))


def test_it_never_rises_and_ends_in_a_minimum(solved):
    trace, slope, hessian = solved
    assert np.all(np.diff(trace.values, axis=1) <= 1e-4 * np.abs(trace.values[:, 1:]))
    ended = np.abs(slope).max(1) < 0.05
    assert ended.mean() > 0.9 and np.linalg.eigvalsh(hessian)[ended].min() > -0.1


def test_calls_are_counted(solved):
    trace = solved[0]
    assert np.all(trace.objective_calls == 1 + 20 * 6)
    assert np.all(trace.gradient_calls == 20 * 3)  # the gradient and a Hessian of two columns


def test_it_leaves_a_saddle():
    family = on(lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4)
    trace = damped_newton(family, {}, jnp.array([1.0, 1e-3]), 20)
    np.testing.assert_allclose(np.abs(trace.x), [0, np.sqrt(0.5)], atol=1e-3)


def test_a_trial_that_is_not_finite_is_not_taken():
    family = on(lambda x: jnp.sum(jnp.where(x > 0, x - jnp.log(x), jnp.nan)))
    trace = damped_newton(family, {}, jnp.array([2.5, 0.1]), 20)  # a full step leads to x < 0
    np.testing.assert_allclose(trace.x, [1.0, 1.0], atol=1e-3)


@pytest.mark.parametrize("dampings", [(), (-1.0, 0.0)])
def test_dampings_are_checked(dampings):
    with pytest.raises(ValueError, match="damped_newton: expected dampings of 0 or more, got"):
        damped_newton(FAMILY, FAMILY.sample(jax.random.key(0)), jnp.zeros(2), 1, dampings=dampings)
