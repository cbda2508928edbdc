"""Decay and anchor act after a blend, and in full."""

import jax
import numpy as np
import optax
import pytest

from lohp_jax.optimizers.hub import hub
from lohp_jax.optimizers.pull import anchor, decay

START = {"body": np.float32([2.0, -1.0, 4.0]), "head": np.float32([1.0, 3.0])}
ZEROS = jax.tree.map(np.zeros_like, START)


def run(optimizer, params, num_steps, gradients=ZEROS):
    state = optimizer.init(params)
    for _ in range(num_steps):
        updates, state = jax.jit(optimizer.update)(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_decay_after_a_blend_is_that_of_adamw():
    """Inside, vanilla HUB leaves 1 / K of it."""
    adamw = optax.adamw(0.1, weight_decay=0.5)
    after = optax.chain(hub(optax.adam(0.1), optax.set_to_zero()), decay(0.1 * 0.5))
    inside = hub(adamw, optax.set_to_zero())
    alone = run(adamw, START, 1)
    for name, start in START.items():
        whole = np.asarray(start - alone[name])
        np.testing.assert_allclose(start - run(after, START, 1)[name], whole, rtol=1e-5)
        np.testing.assert_allclose(
            start - run(inside, START, 1)[name], whole / start.size, rtol=1e-5
        )


def test_an_anchor_pulls_only_its_blocks_towards_where_they_were():
    optimizer = optax.chain(optax.sgd(0.1), anchor(0.25, where=lambda path: path[0] == "body"))
    state = optimizer.init(START)
    moved = jax.tree.map(lambda p: p + 1.0, START)
    updates, _ = optimizer.update(ZEROS, state, moved)
    np.testing.assert_allclose(updates["body"], -0.25)
    np.testing.assert_array_equal(updates["head"], 0.0)


def test_an_anchor_balances_a_constant_gradient():
    """At the fixed point rate * (p_0 - p) equals the step of the gradient."""
    gradients = jax.tree.map(np.ones_like, START)
    after = run(optax.chain(optax.sgd(0.1), anchor(0.5)), START, 60, gradients)
    np.testing.assert_allclose(after["body"], START["body"] - 0.1 / 0.5, rtol=1e-5)


@pytest.mark.parametrize("pull", [decay, anchor])
def test_the_rate_may_follow_a_schedule(pull):
    optimizer = pull(lambda step: 0.1 * (step + 1.0))
    state = optimizer.init(START)
    origin = 0.0 if pull is decay else START["body"]
    moved = jax.tree.map(lambda p: 3.0 * p, START)
    for step in range(2):
        updates, state = optimizer.update(ZEROS, state, moved)
        expected = 0.1 * (step + 1) * (origin - moved["body"])
        np.testing.assert_allclose(updates["body"], expected, rtol=1e-5)


@pytest.mark.parametrize("pull", [decay, anchor])
@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
def test_a_rate_must_be_a_share(pull, rate):
    with pytest.raises(ValueError, match=rf"{pull.__name__}: rate must be in \[0, 1\], got {rate}"):
        pull(rate)


@pytest.mark.parametrize("pull", [decay, anchor])
def test_parameters_are_needed(pull):
    optimizer = pull(0.1)
    with pytest.raises(ValueError, match=f"{pull.__name__}: update needs the parameters, got None"):
        optimizer.update(ZEROS, optimizer.init(START))
