"""The small learned optimizer starts as Adam's direction, at a rate that follows from the steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax.optimizers.features import NUM_CHANNELS
from lohp_jax.optimizers.small import Rate, pack_rate, small_optimizer, small_start, unpack_rate
from lohp_jax.optimizers.theta import check_theta

KEY = jax.random.key(0)
PARAMS = {"w": jnp.linspace(-1, 1, 12).reshape(4, 3), "b": jnp.zeros(3)}
META = small_start(KEY, learning_rate=0.02)
GRADIENTS = {"w": jnp.cos(jnp.arange(12.0)).reshape(4, 3), "b": jnp.ones(3)}


@jax.jit
def update(meta, num_steps, gradients, state):
    """One compilation for all tests, as meta and num_steps may be traced."""
    return small_optimizer(meta, num_steps).update(gradients, state, PARAMS)


def test_start_is_a_theta_and_goes_where_adam_goes():
    theta = jax.tree.map(np.asarray, META["theta"])
    check_theta(theta, "celo2")
    assert sum(leaf.size for leaf in jax.tree.leaves(theta)) == 30 * 8 + 8 + 64 + 8 + 24 + 3
    assert sum(NUM_CHANNELS) == 30
    state, adam = small_optimizer(META, 1000).init(PARAMS), optax.adam(0.02, b2=0.95, eps=1e-8)
    adam_state, update_adam = adam.init(PARAMS), jax.jit(adam.update)
    for i in range(3):
        gradients = jax.tree.map(lambda g, i=i: g * (1.0 + i) + 0.1 * i, GRADIENTS)
        updates, state = update(META, 1000, gradients, state)
        expected, adam_state = update_adam(gradients, adam_state, PARAMS)
        rms = float(jnp.sqrt(jnp.mean(updates["w"] ** 2)))
        np.testing.assert_allclose(rms, 0.02 * (1 - i / 1000) ** 2, rtol=1e-3)
        expected = expected["w"] * rms / jnp.sqrt(jnp.mean(expected["w"] ** 2))
        np.testing.assert_allclose(updates["w"], expected, rtol=1e-2)


@pytest.mark.parametrize("num_steps, exponent, power", [(4, 0.0, 1.0), (4, -0.5, 2.5)])
def test_learning_rate_follows_from_the_number_of_steps(num_steps, exponent, power):
    rate = Rate(0.02, exponent, power)
    meta = META | pack_rate(rate)
    np.testing.assert_allclose(unpack_rate(meta), rate, rtol=1e-6)
    state, sizes = small_optimizer(meta, num_steps).init(PARAMS), []
    for _ in range(num_steps + 2):
        updates, state = update(meta, num_steps, GRADIENTS, state)
        sizes.append(float(jnp.sqrt(jnp.mean(updates["w"] ** 2))))
    peak = 0.02 * (num_steps / 1000) ** exponent
    shape = (1 - np.arange(num_steps) / num_steps) ** power
    np.testing.assert_allclose(sizes, [*(peak * shape), 0.0, 0.0], rtol=1e-3, atol=1e-8)


def test_parameters_without_a_matrix_go_by_adamw_alone():
    params, gradients = {"b": jnp.ones(3)}, {"b": jnp.array([1.0, -2.0, 3.0])}
    optimizer = small_optimizer(META, 100)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    peak = 0.02  # of 1000 steps and, with an exponent of 0, of any number
    np.testing.assert_allclose(updates["b"], [-peak, peak, -peak], rtol=1e-5)
