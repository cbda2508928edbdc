"""Refinement is never worse than the same optimizer from its own start, whatever is proposed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.problems import PROBLEMS, make_problem
from lohp_jax.runs.solve import preset, refiner_of
from lohp_jax.solvers.refine import refine
from lohp_jax.solvers.trace import objective_of

QUICK = ("lasso_5x10", "rastrigin_2")
COUNT, STEPS = 1000, 5


def proposals(family, problem, key):
    """`[4, n]`: one near, one far away, one out of range and one of NaN."""
    centre, scale = family.frame(problem)
    noise = jax.random.normal(key, (2, *centre.shape))
    near, far = centre + scale * noise[0], centre + 100.0 * scale * noise[1]
    return jnp.stack([near, far, jnp.full_like(near, 1e30), jnp.full_like(near, jnp.nan)])


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PROBLEMS],
)
def test_never_worse_than_the_baseline(name):
    """On 1,000 random problems. Run apart, a few baselines end elsewhere, as rounding differs."""
    family = make_problem(name)
    one = jax.tree.map(lambda leaf: leaf[None], family.sample(jax.random.key(0)))
    runner = refiner_of(preset(name), family, one)

    def both(key):
        problem_key, key = jax.random.split(key)
        problem = family.sample(problem_key, "held_out")
        start, solver = family.start(problem), functools.partial(runner, problem)
        objective = objective_of(family, problem)
        x0 = proposals(family, problem, key)
        result = refine(objective, x0, solver, STEPS, baseline=start)
        alone = solver(start, STEPS)
        values = result.value, objective(result.x), result.baseline
        return *values, alone.values.min(), objective(x0[0])

    keys = jax.random.split(jax.random.key(1), COUNT)
    solve = jax.jit(lambda keys: jax.lax.map(both, keys, batch_size=100))
    value, again, baseline, alone, proposed = map(np.asarray, solve(keys))
    assert np.isfinite(value).all()
    np.testing.assert_allclose(again, value, rtol=1e-4, atol=1e-4)
    assert (value <= baseline).all()
    assert (value <= proposed + 1e-4 * (1 + np.abs(proposed))).all()
    assert np.isclose(baseline, alone, rtol=1e-3, atol=1e-4).mean() > 0.95
