import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from lohp_jax.codec import make_codec
from lohp_jax.methods.cloning import cloning_loss
from lohp_jax.networks.policy import Heads, PolicyNetwork
from lohp_jax.policy.config import HybridConfig
from lohp_jax.policy.kernels import Policy, tube_states
from lohp_jax.types import Example

NUM_STEPS = 2
CODEC = make_codec({"w": jnp.zeros(3)}, channels=2)
CONFIG = HybridConfig(
    condition_dropout=0.0, start_std=0.1, end_std=0.3, correlation=0.5, log_std_range=1.0
)
KEY = jax.random.key(0)
NETWORK = PolicyNetwork(
    init=lambda key, context: None,
    encode=lambda params, context, keep: keep * context["scale"],
    heads=lambda params, embedding, teacher, step, state: Heads(
        *(offset + embedding * state for offset in params[:, step])
    ),
    log_coefficient=lambda params: jnp.full(NUM_STEPS + 1, jnp.nan),  # there is no flow
)
RNG = np.random.default_rng(0)
TOKENS = np.where(CODEC.mask, RNG.normal(size=(NUM_STEPS + 1, *CODEC.mask.shape)), 0)
EXAMPLE = Example(np.float32(TOKENS), 0, {"scale": jnp.float32(0.3)}, None)
PARAMS = RNG.normal(0, 0.3, size=(4, NUM_STEPS, *CODEC.mask.shape)).astype(np.float32)


@functools.cache
def loss_of(config):
    policy = Policy(NETWORK, CODEC, config, NUM_STEPS)
    return jax.jit(lambda params, example: cloning_loss(policy, params, example, KEY))


def oracle(config, states):
    """Mean negative log density of each weight's step, in float64."""
    tau = np.geomspace(config.start_std, config.end_std, NUM_STEPS + 1)
    losses = []
    for m in range(NUM_STEPS):
        for i in zip(*np.nonzero(CODEC.mask), strict=True):
            state, next_state = np.float64(states[m][i]), np.float64(states[m + 1][i])
            drift, log_std = np.float64(PARAMS[:2, m])[:, *i] + 0.3 * state
            mean = 0.5 * tau[m + 1] / tau[m] * state + drift
            std = tau[m + 1] * np.sqrt(1 - 0.5**2) * np.exp(np.tanh(log_std))
            losses.append(-scipy.stats.norm.logpdf(next_state, mean, std))
    return np.mean(losses)


@pytest.mark.parametrize("perturb", [True, False])
def test_the_loss_is_the_likelihood_of_the_transitions(perturb):
    config = dataclasses.replace(CONFIG, perturb=perturb)
    _, tube_key = jax.random.split(KEY)
    states = tube_states(Policy(NETWORK, CODEC, config, NUM_STEPS), EXAMPLE.tokens, tube_key)
    assert np.allclose(states, EXAMPLE.tokens) != perturb
    loss, info = loss_of(config)(PARAMS, EXAMPLE)
    np.testing.assert_allclose(loss, oracle(config, np.asarray(states)), rtol=1e-5)
    assert info == {}


def test_neither_backward_policy_nor_padding_plays_a_part():
    expected, _ = loss_of(CONFIG)(PARAMS, EXAMPLE)
    grads, _ = jax.grad(loss_of(CONFIG), has_aux=True)(PARAMS, EXAMPLE)
    assert (grads[2:] == 0).all() and (grads[:, :, ~CODEC.mask] == 0).all()
    assert (np.abs(grads[:2, :, CODEC.mask]) > 0).all()
    padded = EXAMPLE._replace(tokens=jnp.where(CODEC.mask, EXAMPLE.tokens, 9.0))
    np.testing.assert_allclose(loss_of(CONFIG)(PARAMS, padded)[0], expected, rtol=1e-6)
