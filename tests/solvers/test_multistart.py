import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax.problems.rastrigin import rastrigin
from lohp_jax.solvers.descent import run_optax
from lohp_jax.solvers.multistart import gaussian_starts, multistart
from lohp_jax.solvers.trace import Trace, best_iterate, usable_values

FAMILY = rastrigin(2)


def wells(x, problem):
    """Minima at ±1 in x_0, the left one lower; NaN far out."""
    value = (x[0] ** 2 - 1) ** 2 + 0.3 * x[0] + x[1] ** 2
    return jnp.where(jnp.sum(x**2) < 9, value, jnp.nan)


WELLS = dataclasses.replace(FAMILY, objective=wells)
STARTS = jnp.array([[1.5, 0.5], [5.0, 5.0], [-0.5, 1.0], [1.0, 0.0]])


def test_the_run_that_ends_lowest_is_kept():
    trace = multistart(WELLS, {}, STARTS, 60, solver=run_optax, optimizer=optax.sgd(0.05))
    alone = run_optax(WELLS, {}, STARTS[2], 60, optimizer=optax.sgd(0.05))
    np.testing.assert_allclose(trace.path, alone.path, atol=1e-6)
    assert trace.x[0] < -0.9
    assert (trace.objective_calls, trace.gradient_calls) == (4, 240)


@pytest.mark.parametrize("shape", [(2,), (0, 2), (1, 2, 2)])
def test_starts_are_checked(shape):
    with pytest.raises(ValueError, match=r"expected starts of shape \[K, n\] with K >= 1, got \["):
        multistart(WELLS, {}, jnp.zeros(shape), 3, solver=run_optax, optimizer=optax.sgd(0.1))


def test_gaussian_starts_have_the_moments_of_the_frame():
    problem = FAMILY.sample(jax.random.key(3))
    starts = gaussian_starts(FAMILY, problem, jax.random.key(0), 4000)
    centre, scale = FAMILY.frame(problem)
    assert starts.shape == (4000, 2)
    np.testing.assert_allclose((starts.mean(0) - centre) / scale, 0, atol=0.06)
    np.testing.assert_allclose(starts.std(0) / scale, 1, atol=0.05)


def test_the_best_iterate_is_finite_wherever_one_is():
    path = jnp.array([[jnp.nan, 0], [1, 1], [2, 2], [jnp.inf, 0], [3, 3]])
    values = jnp.array([-9.0, 4.0, jnp.nan, -9.0, -jnp.inf])
    x, value = best_iterate(Trace(path[-1], path, values, jnp.int32(0), jnp.int32(0)))
    np.testing.assert_array_equal(x, [1, 1])
    assert value == 4
    np.testing.assert_array_equal(usable_values(path, values), [np.inf, 4, np.inf, np.inf, np.inf])
