"""Persistent evolution strategies estimate the gradient of the whole unroll, without bias."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax.optimizers.meta import (
    LARGEST_LOSS,
    Unroll,
    advance_pair,
    bounded,
    start_pairs,
    training_unroll,
)
from lohp_jax.types import TaskFamily

SIGMA = 0.1
MIX = np.array([[0.9, 0.3], [-0.2, 0.7]])
GOAL = np.array([1.0, -2.0])
THETA = np.array([0.5, 0.3])
NUM_TRUNCATIONS = 5
KEY = jax.random.key(0)


# --- an unroll whose answer is known: s <- MIX s + theta, loss |s - GOAL|^2 / 2


def linear_unroll(steps_per_truncation, num_steps):
    """All of it is quadratic in theta, so that its smoothed gradient is its gradient."""

    def start(meta, key, portion):
        return {"s": jnp.zeros_like(meta), "t": jnp.zeros((), jnp.int32)}

    def advance(meta, state, key, step_key):
        def step(s, _):
            s = MIX @ s + meta
            return s, 0.5 * jnp.sum((s - GOAL) ** 2)

        s, losses = jax.lax.scan(step, state["s"], length=steps_per_truncation)
        t = state["t"] + steps_per_truncation
        return {"s": s, "t": t}, losses.mean(), t >= num_steps

    return Unroll(start, advance)


def true_gradient(num_steps):
    """Of the mean loss, by central differences in NumPy, exact for a quadratic up to rounding."""

    def loss(theta):
        s, total = np.zeros(2), 0.0
        for _ in range(num_steps):
            s = MIX @ s + theta
            total += 0.5 * np.sum((s - GOAL) ** 2)
        return total / num_steps

    return np.array([(loss(THETA + e) - loss(THETA - e)) / 2 for e in np.eye(2)])


def estimates(unroll, num_truncations, num_pairs, *, forget=False):
    """`[num_pairs, 2]` means over the truncations of one unroll; `forget` drops PES's memory."""

    def one(key):
        pair = jax.tree.map(lambda x: x[0], start_pairs(unroll, jnp.array(THETA), key, 1))

        def truncate(pair, step_key):
            if forget:
                pair = pair._replace(drift=jnp.zeros_like(pair.drift))
            pair, gradient, _ = advance_pair(unroll, jnp.array(THETA), pair, step_key, sigma=SIGMA)
            return pair, gradient

        step_keys = jax.random.split(jax.random.fold_in(key, 1), num_truncations)
        return jax.lax.scan(truncate, pair, step_keys)[1].mean(axis=0)

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(KEY, num_pairs)))


def errors_in_standard_errors(samples):
    standard_error = samples.std(axis=0, ddof=1) / math.sqrt(len(samples))
    return np.abs(samples.mean(axis=0) - true_gradient(NUM_TRUNCATIONS)) / standard_error


def test_unbiased_and_truncated_evolution_strategies_are_not():
    with jax.enable_x64(True):
        truncated = linear_unroll(1, NUM_TRUNCATIONS)
        persistent = estimates(truncated, NUM_TRUNCATIONS, 40_000)
        forgetful = estimates(truncated, NUM_TRUNCATIONS, 40_000, forget=True)
        full = estimates(linear_unroll(NUM_TRUNCATIONS, NUM_TRUNCATIONS), 1, 40_000)
    assert (errors_in_standard_errors(persistent) < 4).all()
    assert (errors_in_standard_errors(full) < 4).all()
    assert (errors_in_standard_errors(forgetful) > 20).any()
    scale = np.linalg.norm(true_gradient(NUM_TRUNCATIONS))
    assert np.linalg.norm(persistent.mean(0) - full.mean(0)) < 0.05 * scale


def test_estimate_is_that_of_its_definition():
    unroll = linear_unroll(1, 3)
    pair = jax.tree.map(lambda x: x[0], start_pairs(unroll, jnp.float32(THETA), KEY, 1))
    before, states, drift = pair.drift, np.zeros((2, 2)), np.zeros(2)
    chex.assert_trees_all_equal(before, jnp.zeros(2))
    for step in range(2):
        pair, gradient, loss = advance_pair(
            unroll, jnp.float32(THETA), pair, jax.random.key(step), sigma=SIGMA
        )
        noise = np.asarray(pair.drift) - drift
        drift = drift + noise
        states = states @ MIX.T + THETA + np.array([[1], [-1]]) * noise
        losses = 0.5 * ((states - GOAL) ** 2).sum(axis=1)
        expected = (losses[0] - losses[1]) / (2 * SIGMA**2) * drift
        np.testing.assert_allclose(gradient, expected, rtol=1e-3)
        np.testing.assert_allclose(loss, losses.mean(), rtol=1e-5)
        np.testing.assert_allclose(pair.states["s"], states, rtol=1e-5)
        assert 0.01 * SIGMA < np.abs(noise).max() < 5 * SIGMA


def test_an_unroll_that_ended_starts_anew():
    unroll = linear_unroll(1, 2)
    pair = jax.tree.map(lambda x: x[0], start_pairs(unroll, jnp.float32(THETA), KEY, 1))
    first, *_ = advance_pair(unroll, jnp.float32(THETA), pair, KEY, sigma=SIGMA)
    assert first.states["t"].tolist() == [1, 1] and np.any(first.drift)
    second, gradient, _ = advance_pair(unroll, jnp.float32(THETA), first, KEY, sigma=SIGMA)
    assert second.states["t"].tolist() == [0, 0] and not np.any(second.drift)
    assert np.any(gradient) and second.key != first.key == pair.key


def noisy_unroll(loss):
    def start(meta, key, portion):
        return jax.random.normal(key)

    def advance(meta, state, key, step_key):
        return state, loss(meta, jax.random.normal(step_key)), jnp.array(False)

    return Unroll(start, advance)


@pytest.mark.parametrize(
    "loss", [lambda meta, noise: noise, lambda meta, noise: jnp.sum(meta**2)], ids=["noise", "even"]
)
def test_both_copies_see_the_same_and_mirror_each_other(loss):
    unroll = noisy_unroll(loss)
    pairs = start_pairs(unroll, jnp.zeros(3), KEY, 4)
    np.testing.assert_array_equal(pairs.states[:, 0], pairs.states[:, 1])
    assert len(set(pairs.states[:, 0].tolist())) == 4
    for i in range(4):
        pair = jax.tree.map(lambda x, i=i: x[i], pairs)
        _, gradient, _ = advance_pair(unroll, jnp.zeros(3), pair, KEY, sigma=SIGMA)
        np.testing.assert_array_equal(gradient, np.zeros(3))


# --- unrolls that train


def regression_family(loss_factor=1.0):
    """Task: a vector to find; the query loss is 7 everywhere."""

    def sample(key, split="train"):
        assert split == "train"
        return jax.random.normal(key, (3,))

    def loss(params, data, key):
        noise = 0.1 * jax.random.normal(key)
        return loss_factor * jnp.sum((params["w"] + params["b"][None] - data) ** 2) + noise

    return TaskFamily(
        sample=sample,
        init=lambda key: {"w": 0.1 * jax.random.normal(key, (3,)), "b": 0.1 * jnp.ones(())},
        loss=loss,
        evaluate=lambda params, data: {"loss": jnp.float32(7.0), "accuracy": jnp.float32(0.0)},
        context=lambda data, key: (),
    )


def sgd(meta, num_steps):
    return optax.sgd(meta["rate"])


META = {"rate": jnp.float32(0.05)}
OPTIONS = {"truncation": 5, "lengths": (10, 40)}


def start(unroll, key=KEY, portion=1.0):
    return unroll.start(META, key, jnp.float32(portion))


@pytest.mark.parametrize("query_weight", [0.0, 0.25])
def test_truncation_is_training(query_weight):
    family = regression_family()
    unroll = training_unroll(family, sgd, **OPTIONS, scale_range=2.0, query_weight=query_weight)
    state, step_key = start(unroll), jax.random.key(9)
    params = jax.tree.map(lambda w, s: w * s, state.weights, state.scale)
    reached, loss, done = jax.jit(unroll.advance)(META, state, KEY, step_key)
    data, total = family.sample(jax.random.split(KEY, 4)[0]), 0.0
    for key in jax.random.split(step_key, 5):
        value, gradients = jax.value_and_grad(family.loss)(params, data, key)
        total += float(value)
        # a tensor divided by c has c times the gradient and moves c times as far
        params = jax.tree.map(lambda p, g, c: p - 0.05 * c**2 * g, params, gradients, state.scale)
    expected = (1 - query_weight) * total / 5 + query_weight * 7.0
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    actual = jax.tree.map(lambda w, s: w * s, reached.weights, reached.scale)
    chex.assert_trees_all_close(actual, params, rtol=1e-5)
    assert int(reached.step) == 5 and not done


def test_reparametrisation_keeps_the_start():
    family = regression_family()
    unroll = training_unroll(family, sgd, **OPTIONS, scale_range=10.0)
    states = jax.vmap(lambda key: start(unroll, key))(jax.random.split(KEY, 500))
    scales = np.stack([np.asarray(s) for s in jax.tree.leaves(states.scale)])
    logs = np.log10(scales)
    assert -1 <= logs.min() < -0.95 and 0.95 < logs.max() <= 1
    assert abs(logs.mean()) < 0.1 and abs(np.corrcoef(logs)[0, 1]) < 0.15
    np.testing.assert_allclose(
        states.weights["b"] * states.scale["b"], np.full(500, 0.1), rtol=1e-5
    )
    plain = start(training_unroll(family, sgd, **OPTIONS))
    chex.assert_trees_all_equal(plain.scale, {"w": jnp.ones(()), "b": jnp.ones(())})


def test_lengths_are_log_uniform_multiples():
    unroll = training_unroll(regression_family(), sgd, truncation=5, lengths=(10, 1000))
    states = jax.vmap(lambda key: start(unroll, key))(jax.random.split(KEY, 4000))
    lengths = np.asarray(states.num_steps)
    assert lengths.min() == 10 and lengths.max() == 1000 and not (lengths % 5).any()
    assert 85 < np.median(lengths) < 115  # the geometric mean is 100
    np.testing.assert_array_equal(states.stop, lengths)


def test_starts_are_staggered():
    unroll = training_unroll(regression_family(), sgd, truncation=5, lengths=(100, 100))
    pairs = start_pairs(unroll, META, KEY, 4)
    assert pairs.states.stop[:, 0].tolist() == [25, 50, 75, 100]
    advance = jax.jit(jax.vmap(lambda p, k: advance_pair(unroll, META, p, k, sigma=SIGMA)[0]))
    for step in range(40):
        pairs = advance(pairs, jax.random.split(jax.random.key(step), 4))
    steps = pairs.states.step
    np.testing.assert_array_equal(steps[:, 0], steps[:, 1])
    assert sorted(steps[:, 0].tolist()) == [0, 25, 50, 75]  # still spread, all of full length now
    assert pairs.states.stop.tolist() == [[100, 100]] * 4


def test_the_optimizer_is_told_the_length():
    told = []

    def make(meta, num_steps):
        told.append(num_steps)
        return optax.sgd(meta["rate"] / num_steps)

    unroll = training_unroll(regression_family(), make, **OPTIONS)
    state = start(unroll)
    unroll.advance(META, state, KEY, KEY)
    assert int(told[-1]) == int(state.num_steps)


@pytest.mark.parametrize("factor", [jnp.nan, jnp.inf, 1e6])
def test_losses_that_explode_count_as_the_largest(factor):
    unroll = training_unroll(regression_family(factor), sgd, **OPTIONS)
    pair = jax.tree.map(lambda x: x[0], start_pairs(unroll, META, KEY, 1))
    pair, gradient, loss = advance_pair(unroll, META, pair, KEY, sigma=1e-3)
    assert float(loss) == LARGEST_LOSS == 10.0
    assert float(gradient["rate"]) == 0.0


def test_bounded():
    losses = jnp.array([-1.0, 3.0, 11.0, jnp.inf, jnp.nan])
    np.testing.assert_array_equal(bounded(losses), [-1.0, 3.0, 10.0, 10.0, 10.0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"truncation": 0}, r"1 <= truncation <= shortest <= longest unroll, got truncation=0"),
        ({"lengths": (4, 40)}, r"got truncation=5 and lengths=\(4, 40\)"),
        ({"lengths": (40, 10)}, r"got truncation=5 and lengths=\(40, 10\)"),
        ({"scale_range": 0.5}, r"scale_range must be at least 1, got 0\.5"),
        ({"scale_range": math.nan}, r"scale_range must be at least 1, got nan"),
        ({"query_weight": 1.5}, r"query_weight must be in \[0, 1\], got 1\.5"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        training_unroll(regression_family(), sgd, **OPTIONS | options)
