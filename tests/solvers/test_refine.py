import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lohp_jax.problems.lasso import lasso
from lohp_jax.solvers.proximal import fista
from lohp_jax.solvers.refine import refine

NUM_STEPS = 6
ENTRIES = st.one_of(
    st.floats(-3, 3, width=32), st.sampled_from([np.nan, np.inf, -np.inf, 1e30, -1e30])
)
POINT = st.lists(ENTRIES, min_size=2, max_size=2)


def rough(x, weights):
    """Ripples on a bowl, undefined where x_0 + x_1 is large."""
    value = weights[0] * jnp.sum(x**2) + weights[1] * jnp.sum(jnp.cos(weights[2] * x))
    return jnp.where(jnp.sum(x) < 4, value, jnp.nan)


@functools.partial(jax.jit, static_argnames="safeguard")
def refine_rough(weights, starts, baseline, rate, *, safeguard=True):
    """Momentum of large steps, which does not descend."""
    objective = functools.partial(rough, weights=weights)
    optimizer = optax.sgd(rate, momentum=0.9)
    if not safeguard:
        return refine(objective, starts, optimizer, NUM_STEPS, safeguard=False)
    return refine(objective, starts, optimizer, NUM_STEPS, baseline=baseline)


def usable(value, x):
    return value if np.isfinite(value) and np.all(np.isfinite(x)) else np.inf


def best_of_run(start, weights, rate):
    """Lowest value on the way of momentum from one start, by hand."""
    gradient = jax.jit(jax.grad(rough))
    x, velocity, best = jnp.float32(start), jnp.zeros(2), np.inf
    for step in range(NUM_STEPS + 1):
        best = min(best, usable(float(rough(x, weights)), x))
        if step < NUM_STEPS:
            velocity = gradient(x, weights) + 0.9 * velocity
            x = x - rate * velocity
    return best


@settings(deadline=None, max_examples=60)
@given(
    weights=st.tuples(st.floats(-1, 1), st.floats(-5, 5), st.floats(0, 6)),
    starts=st.lists(POINT, min_size=3, max_size=3),
    baseline=POINT,
    rate=st.floats(0.001, 1),
)
@example((1.0, 0.0, 0.0), [[np.nan, 0]] * 3, [1.0, 1.0], 0.1)
@example((1.0, 0.0, 0.0), [[np.nan, 0]] * 3, [np.nan, 1.0], 0.1)
def test_the_result_is_never_worse_than_anything_seen(weights, starts, baseline, rate):
    weights = jnp.float32(weights)
    starts, baseline = jnp.float32(starts), jnp.float32(baseline)
    refined = jax.device_get(refine_rough(weights, starts, baseline, jnp.float32(rate)))
    assert refined.value == min(*refined.values, refined.baseline)
    for x in (*starts, baseline):
        value = usable(float(rough(x, weights)), x)
        assert refined.value <= value + 1e-5 * abs(value) or value == np.inf
    if np.isfinite(refined.value):
        np.testing.assert_allclose(
            refined.value, rough(jnp.asarray(refined.x), weights), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("rate", [0.01, 0.3])
def test_values_are_those_of_the_best_iterates(rate):
    weights = jnp.array([0.5, 2.0, 3.0])
    starts = jnp.array([[1.0, -1.0], [0.2, 2.0], [jnp.nan, 0.0]])
    baseline = jnp.array([-2.0, 1.0])
    refined = refine_rough(weights, starts, baseline, jnp.float32(rate))
    expected = [best_of_run(start, weights, rate) for start in (*starts, baseline)]
    np.testing.assert_allclose([*refined.values, refined.baseline], expected, rtol=1e-3)
    np.testing.assert_allclose(refined.value, min(expected), rtol=1e-3)
    assert refined.curve.shape == (NUM_STEPS + 1,) and (np.diff(refined.curve) <= 0).all()
    ends = min(float(rough(x, weights)) for x in starts[:2]), refined.values.min()
    np.testing.assert_allclose(refined.curve[jnp.array([0, -1])], ends, rtol=1e-5)
    assert refined.gradient_calls == 4 * NUM_STEPS
    assert refined.objective_calls == 4 * (NUM_STEPS + 1)


def test_without_the_safeguard_the_last_iterate_counts():
    weights, starts = jnp.array([1.0, 0.0, 0.0]), jnp.array([[1.0, -1.0]])
    refined = refine_rough(weights, starts, None, jnp.float32(0.9), safeguard=False)
    assert refined.value > 2 * best_of_run(starts[0], weights, 0.9)
    assert refined.baseline == np.inf and refined.objective_calls == 1


def test_a_solver_as_optimizer_and_one_proposal():
    family = lasso(5, 10)
    problem = family.sample(jax.random.key(0))
    objective = functools.partial(family.objective, problem=problem)
    proposal, start = family.solve(problem, jax.random.key(0)), family.start(problem)
    refined = refine(
        objective, proposal, functools.partial(fista, family, problem), 5, baseline=start
    )
    np.testing.assert_allclose(refined.value, objective(proposal), rtol=1e-5)
    alone = fista(family, problem, start, 5)
    np.testing.assert_allclose(refined.baseline, alone.values.min(), rtol=1e-5)
    assert refined.x.shape == (10,) and refined.gradient_calls == 10


def test_no_steps_pick_the_best_proposal():
    refined = refine(jnp.sum, jnp.array([[3.0, 0], [1, 1], [5, -jnp.inf]]), optax.sgd(1.0), 0)
    np.testing.assert_array_equal(refined.x, [1, 1])
    assert refined.value == 2 and refined.gradient_calls == 0


@pytest.mark.parametrize(
    "x0, options, message",
    [
        (
            np.zeros((1, 2, 2)),
            {},
            r"x0 of shape \[n\] or \[K, n\], K >= 1, got \[1, 2, 2\]; flatten",
        ),
        (np.zeros((0, 2)), {}, r"x0 of shape .* got \[0, 2\]"),
        (np.zeros(2), {"baseline": np.zeros(3)}, r"a baseline of shape \[2\], .* got \[3\]"),
        (
            np.zeros(2),
            {"baseline": np.zeros(2), "safeguard": False},
            "safeguard=True with a baseline, got False; leave the baseline out",
        ),
    ],
)
def test_refine_rejects(x0, options, message):
    with pytest.raises(ValueError, match=f"refine: expected {message}"):
        refine(jnp.sum, jnp.asarray(x0), optax.sgd(0.1), 3, **options)
