"""Diffusion over weights: its loss and its samples with stubs for the network, then a whole training."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lohp_jax
from lohp_jax.codec import make_codec
from lohp_jax.generation import generate
from lohp_jax.methods.weight_diffusion import (
    denoise_from_noise,
    denoising_loss,
    weight_diffusion,
)
from lohp_jax.networks.policy import Heads, NetworkConfig, PolicyNetwork
from lohp_jax.policy.config import HybridConfig
from lohp_jax.policy.kernels import Policy
from lohp_jax.tasks import make_family
from lohp_jax.training import metrics
from lohp_jax.types import Example

NUM_STEPS = 3
CODEC = make_codec({"w": jnp.zeros(3)}, channels=2)
CONFIG = HybridConfig(condition_dropout=0.0)
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
EXAMPLE = Example(
    np.float32(RNG.normal(size=(NUM_STEPS + 1, *CODEC.mask.shape)) * CODEC.mask),
    jnp.zeros((), jnp.int32),
    {"scale": jnp.float32(0.3)},
    None,
)
OFFSET = RNG.normal(size=CODEC.mask.shape).astype(np.float32)


def make_stub(drift, config=CONFIG):
    """A policy whose network says `drift(params, embedding, log_snr, state)`, also in the padding."""

    def heads(params, embedding, teacher, step, state):
        unused = jnp.full_like(state, jnp.nan)
        return Heads(drift(params, embedding, step, state), unused, unused, unused)

    def encode(params, context, keep):
        return keep * context["scale"]

    return Policy(PolicyNetwork(None, encode, heads, None), CODEC, config, NUM_STEPS)


def affine(params, embedding, log_snr, state):
    return params + embedding * state + 0.1 * log_snr + 0.01 * state.sum()


def loss_of(policy):
    """`(params, example, key) -> loss`, compiled."""
    return jax.jit(lambda *args: denoising_loss(policy, *args)[0])


def oracle(times, noises):
    """Mean over levels and weights of |x_0 - end|² for `affine`, in float64."""
    last = np.arctan(np.exp(5.0))  # log SNR from 10 to -10 along Nichol and Dhariwal's angle
    errors = []
    for time, noise in zip(times, noises, strict=True):
        angle = np.pi / 2 - last + time * (2 * last - np.pi / 2)
        z = (np.cos(angle) * EXAMPLE.tokens[-1] + np.sin(angle) * noise) * CODEC.mask
        x0 = affine(np.float64(OFFSET), 0.3, -2 * np.log(np.tan(angle)), z)
        errors.append(np.mean((x0 - EXAMPLE.tokens[-1])[CODEC.mask] ** 2))
    return np.mean(errors)


def test_the_loss_is_the_error_of_x0_at_levels_spread_over_the_schedule():
    _, time_key, noise_key = jax.random.split(KEY, 3)
    times = (np.arange(NUM_STEPS) + float(jax.random.uniform(time_key))) / NUM_STEPS
    noises = np.float64(jax.random.normal(noise_key, (NUM_STEPS, *CODEC.mask.shape)))
    policy = make_stub(affine)
    loss, info = jax.jit(functools.partial(denoising_loss, policy))(OFFSET, EXAMPLE, KEY)
    np.testing.assert_allclose(loss, oracle(times, noises), rtol=1e-5)
    assert info == {}


def test_only_the_end_of_a_trajectory_matters_and_none_of_its_padding():
    run = jax.jit(jax.value_and_grad(loss_of(make_stub(affine))))
    expected, grads = run(OFFSET, EXAMPLE, KEY)
    assert (grads[~CODEC.mask] == 0).all() and (np.abs(grads[CODEC.mask]) > 0).all()
    tokens = np.where(CODEC.mask, EXAMPLE.tokens, 9.0)
    tokens[:-1] = np.nan
    np.testing.assert_allclose(run(OFFSET, EXAMPLE._replace(tokens=tokens), KEY)[0], expected)
    moved = EXAMPLE._replace(tokens=tokens + 1.0)
    assert abs(run(OFFSET, moved, KEY)[0] - expected) > 0.1


def test_the_context_is_dropped_now_and_then():
    policy = make_stub(
        lambda params, embedding, log_snr, state: embedding * params,
        HybridConfig(condition_dropout=0.5),
    )
    losses = jax.vmap(loss_of(policy), (None, None, 0))(OFFSET, EXAMPLE, jax.random.split(KEY, 16))
    assert len(np.unique(np.float32(losses).round(4))) == 2


def draw(policy, temperatures=(1.0,), seeds=(0,), **options):
    """`[temperatures, num_steps, length, channels]`, each with a seed, of an example's context."""

    @jax.jit
    @jax.vmap
    def run(temperature, seed):
        arguments = OFFSET, jnp.float32(0.3), EXAMPLE.teacher, jax.random.key(seed)
        return denoise_from_noise(policy, *arguments, temperature=temperature, **options)

    return run(jnp.float32(temperatures), jnp.array(seeds))


@pytest.mark.parametrize("num_steps", [None, 1, NUM_STEPS + 4])
def test_a_denoiser_that_knows_the_end_has_no_loss_and_gives_it_exactly(num_steps):
    end = EXAMPLE.tokens[-1]
    policy = make_stub(lambda params, embedding, log_snr, state: jnp.asarray(end))
    assert loss_of(policy)(OFFSET, EXAMPLE, KEY) == 0
    paths = draw(policy, (0.0, 1.0), (0, 0), num_steps=num_steps)
    np.testing.assert_array_equal(paths, np.tile(end, (2, num_steps or NUM_STEPS, 1, 1)))


def test_it_starts_at_noise_and_ends_with_little():
    """A network that repeats its level says which ones it was asked at: N, evenly spread in time."""
    policy = make_stub(lambda params, embedding, log_snr, state: jnp.full_like(state, log_snr))
    levels = draw(policy)[0, :, 0, 0]
    last = np.arctan(np.exp(5.0))
    angles = np.pi / 2 - last + np.array([1, 2 / 3, 1 / 3]) * (2 * last - np.pi / 2)
    np.testing.assert_allclose(levels, -2 * np.log(np.tan(angles)), rtol=1e-4)


def test_temperature_scales_how_far_samples_are_from_the_cold_one():
    """Exactly so where the denoiser is affine; the noise of the padding is never seen."""
    paths = draw(make_stub(affine), (0.0, 0.0, 1.0, 2.0), (0, 1, 0, 0))
    cold, again, warm, hot = paths[:, -1]
    np.testing.assert_array_equal(cold, again)
    assert np.abs(warm - cold).max() > 1e-2
    np.testing.assert_allclose(hot - cold, 2 * (warm - cold), rtol=1e-3, atol=1e-5)


def test_guidance_exaggerates_the_context():
    policy = make_stub(lambda params, embedding, log_snr, state: embedding * params)
    guided = draw(policy, unconditional=jnp.float32(0.1), guidance=2.0)[0, -1]
    np.testing.assert_allclose(guided, (3 * 0.3 - 2 * 0.1) * OFFSET, rtol=1e-5)


def test_a_number_of_steps_below_one_is_refused():
    with pytest.raises(ValueError, match="num_steps must be a positive whole number, got 0"):
        draw(make_stub(affine), num_steps=0)


# --- trained and loaded

SIZES = {"num_tasks": 3, "num_steps": 4, "compression": 2, "updates": 4, "batch_size": 4}
SIZES |= {"log_every": 4, "checkpoint_every": 4}


def random_like(tree, size=0.3):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.float32(rng.normal(0, size, size=p.shape)), tree)


@pytest.fixture(scope="module")
def family():
    return make_family("digits_5way", network="linear", shots=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, family):
    """A run directory with `weight_diffusion`, what was trained, and a function that goes on."""
    directory = tmp_path_factory.mktemp("run")
    method = weight_diffusion(network=NetworkConfig(trunk="mlp", widths=(8,), embedding=8))
    go_on = functools.partial(
        lohp_jax.fit,
        family,
        method,
        teachers="sgd:1",
        key=KEY,
        directory=directory,
        **SIZES,
    )
    return directory, go_on(), functools.partial(go_on, resume=True)


def test_a_training_is_kept_and_brought_back(trained, family):
    directory, generator, go_on = trained
    (line,) = metrics.read_lines(directory / "metrics.jsonl", "weight_diffusion")
    assert line["step"] == 4 and 0 < line["loss"] < 2
    chex.assert_trees_all_equal(go_on().params, generator.params)
    loaded = lohp_jax.load(directory, "weight_diffusion", family)
    chex.assert_trees_all_equal(loaded.params, generator.params)


@pytest.fixture(scope="module")
def generator(trained, family):
    """As loaded, but with random weights: after a few updates hardly anything depends on the context."""
    loaded = lohp_jax.load(trained[0], "weight_diffusion", family)
    assert loaded.family == "digits_5way" and loaded.config["method"]["name"] == "weight_diffusion"
    return dataclasses.replace(loaded, params=random_like(loaded.params))


@pytest.fixture(scope="module")
def context(family):
    return family.context(family.sample(KEY), KEY)


def pair(generator, context, key=KEY, temperature=0.0):
    return jax.device_get(
        generate(generator, context, key, num_samples=2, temperature=temperature)
    )["head"]


def test_samples_differ_only_if_warm(generator, context):
    cold, warm = pair(generator, context), pair(generator, context, temperature=1.0)
    assert jax.tree.map(np.shape, cold) == {"w": (2, 64, 5), "b": (2, 5)}
    np.testing.assert_array_equal(cold["w"][0], cold["w"][1])
    assert np.abs(warm["w"][0] - warm["w"][1]).max() > 1e-3
    chex.assert_trees_all_equal(pair(generator, context, temperature=1.0), warm)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_permuting_the_labels_permutes_the_head(generator, context, temperature):
    order = np.array([2, 0, 1, 4, 3])  # label c is called order[c]
    before = pair(generator, context, temperature=temperature)
    renamed = context | {"y": order[context["y"]]}
    after = pair(generator, renamed, temperature=temperature)
    assert np.abs(after["w"] - before["w"]).max() > 1e-2
    moved = jax.tree.map(lambda leaf: leaf[..., order], after)
    chex.assert_trees_all_close(moved, before, rtol=1e-4, atol=1e-6)


def test_a_context_without_a_label_is_refused(generator, context):
    with pytest.raises(ValueError, match=r"missing \[4\]"):
        pair(generator, context | {"y": np.minimum(context["y"], 3)})
