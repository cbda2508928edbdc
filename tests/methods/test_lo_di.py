"""Lo-Di: its loss and its walk with stubs for the network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.codec import make_codec
from lohp_jax.methods.lo_di import denoise_along, local_loss
from lohp_jax.networks.policy import Heads, PolicyNetwork
from lohp_jax.policy.config import HybridConfig
from lohp_jax.policy.kernels import Policy
from lohp_jax.types import Example

NUM_STEPS = 3
CODEC = make_codec({"w": jnp.zeros(3)}, channels=2)
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
TOKENS = np.float32(RNG.normal(size=(NUM_STEPS + 1, *CODEC.mask.shape)) * CODEC.mask)
EXAMPLE = Example(TOKENS, jnp.zeros((), jnp.int32), {"scale": jnp.float32(0.3)}, None)
OFFSET = RNG.normal(size=CODEC.mask.shape).astype(np.float32)


def make_stub(drift, config=HybridConfig()):
    """A policy whose network says `drift(params, embedding, step, state)`, also in the padding."""

    def heads(params, embedding, teacher, step, state):
        unused = jnp.full_like(state, jnp.nan)
        return Heads(drift(params, embedding, step, state), unused, unused, unused)

    def encode(params, context, keep):
        return keep * context["scale"]

    return Policy(PolicyNetwork(None, encode, heads, None), CODEC, config, NUM_STEPS)


def affine(params, embedding, step, state):
    return params + embedding * state + 0.1 * step


def levels():
    """(α, σ) at times 1, 2/3, 1/3 of Nichol and Dhariwal's angle, log SNR from 10 to -10, in float64."""
    last = np.arctan(np.exp(5.0))
    angles = np.pi / 2 - last + np.array([1, 2 / 3, 1 / 3]) * (2 * last - np.pi / 2)
    return np.cos(angles), np.sin(angles)


def test_the_loss_is_the_error_of_the_next_state_from_this_one_under_noise():
    _, noise_key = jax.random.split(KEY)
    noises = np.float64(jax.random.normal(noise_key, TOKENS[:-1].shape))
    errors = []
    for step, (alpha, sigma) in enumerate(zip(*levels(), strict=True)):
        z = (alpha * TOKENS[step] + sigma * noises[step]) * CODEC.mask
        said = affine(np.float64(OFFSET), 0.3, step, z)
        errors.append(np.mean((said - TOKENS[step + 1])[CODEC.mask] ** 2))
    loss, info = jax.jit(functools.partial(local_loss, make_stub(affine)))(OFFSET, EXAMPLE, KEY)
    np.testing.assert_allclose(loss, np.mean(errors), rtol=1e-5)
    assert info == {}


def test_padding_has_no_gradient():
    loss = functools.partial(local_loss, make_stub(affine))
    grads = jax.jit(jax.grad(lambda params: loss(params, EXAMPLE, KEY)[0]))(OFFSET)
    assert (grads[~CODEC.mask] == 0).all() and (np.abs(grads[CODEC.mask]) > 0).all()


def walk(policy, temperature=1.0, seed=0, **options):
    @jax.jit
    def run(temperature):
        arguments = OFFSET, jnp.float32(0.3), EXAMPLE.teacher, jax.random.key(seed)
        return denoise_along(policy, *arguments, temperature=temperature, **options)

    return run(jnp.float32(temperature))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_network_that_knows_the_trajectory_has_no_loss_and_walks_along_it(temperature):
    policy = make_stub(lambda params, embedding, step, state: jnp.asarray(TOKENS)[step + 1])
    assert jax.jit(functools.partial(local_loss, policy))(OFFSET, EXAMPLE, KEY)[0] == 0
    states = walk(policy, temperature)
    np.testing.assert_array_equal(states, np.concatenate([0 * TOKENS[:1], TOKENS[1:]]))


def test_each_level_sees_what_the_one_before_said_under_the_same_noise():
    states = np.float64(walk(make_stub(affine)))
    noise = np.float64(jax.random.normal(jax.random.key(0), CODEC.mask.shape))
    for step, (alpha, sigma) in enumerate(zip(*levels(), strict=True)):
        z = (alpha * states[step] + sigma * noise) * CODEC.mask
        said = affine(np.float64(OFFSET), 0.3, step, z) * CODEC.mask
        np.testing.assert_allclose(states[step + 1], said, rtol=1e-4, atol=1e-5)


def test_fewer_levels_are_the_first_ones():
    policy = make_stub(affine)
    np.testing.assert_allclose(walk(policy, num_steps=2), walk(policy)[:3], rtol=1e-6)


@pytest.mark.parametrize("num_steps", [0, NUM_STEPS + 1])
def test_a_number_of_levels_that_there_are_not_is_refused(num_steps):
    with pytest.raises(ValueError, match=f"num_steps must be between 1 and 3, got {num_steps}"):
        walk(make_stub(affine), num_steps=num_steps)


def test_guidance_exaggerates_the_context():
    policy = make_stub(lambda params, embedding, step, state: embedding * params)
    guided = walk(policy, unconditional=jnp.float32(0.1), guidance=2.0)[-1]
    np.testing.assert_allclose(guided, (3 * 0.3 - 2 * 0.1) * OFFSET * CODEC.mask, rtol=1e-5)
