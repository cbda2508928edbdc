"""Diffusion over weights: its loss and its samples with stubs for the network, then a whole training."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lohp_jax.methods.setting import Dataset, Frame, family_of, make_policy

import lohp_jax
from lohp_jax.codec import make_codec
from lohp_jax.generation import generate
from lohp_jax.methods.training import train
from lohp_jax.methods.weight_diffusion import denoise_from_noise, denoising_loss
from lohp_jax.networks.policy import Heads, NetworkConfig, PolicyNetwork
from lohp_jax.policy.hybrid import Example, HybridConfig, Policy
from lohp_jax.runs.config import FamilyConfig, PrepareConfig, RunConfig, TrainingConfig, resolve
from lohp_jax.training import metrics

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

    def heads(params, embedding, optimizer, step, state):
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
        arguments = OFFSET, jnp.float32(0.3), EXAMPLE.optimizer, jax.random.key(seed)
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

RUN = resolve(
    RunConfig(
        tasks=FamilyConfig(network="linear", shots=2),
        prepare=PrepareConfig(num_steps=4, optimizers=("sgd", "adam")),
        network=NetworkConfig(trunk="mlp", widths=(8,), embedding=8),
        training=TrainingConfig(
            compression=2, updates=4, batch_size=4, log_every=4, checkpoint_every=4
        ),
    )
)


def random_like(tree, size=0.3):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.float32(rng.normal(0, size, size=p.shape)), tree)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run directory with `lo_di` trained on random trajectories, and a function that trains on."""
    directory, family = tmp_path_factory.mktemp("run"), family_of(RUN)
    theta_0 = random_like(jax.eval_shape(family.init, KEY))
    frame = Frame(theta_0, jax.tree.map(lambda leaf: jnp.float32(2.0), theta_0), jnp.ones((), int))
    policy = make_policy(RUN, family, frame, "lo_di")
    data = jax.jit(jax.vmap(family.sample))(jax.random.split(KEY, 6))
    tokens = random_like(jax.ShapeDtypeStruct((6, 3, *policy.codec.mask.shape), jnp.float32))
    dataset = Dataset(tokens, jnp.arange(6) % 2, data)
    go_on = functools.partial(
        train, RUN, family, policy, frame, dataset, directory, "lo_di", key=KEY
    )
    return directory, go_on(), go_on


def test_a_training_is_kept_and_brought_back(trained):
    directory, state, go_on = trained
    (line,) = metrics.read_lines(directory / "metrics.jsonl", "lo_di")
    assert line["step"] == 4 and 0 < line["loss"] < 2
    chex.assert_trees_all_equal(go_on(), state)
    chex.assert_trees_all_equal(lohp_jax.load(directory, "lo_di").params[0], state.params)


@pytest.fixture(scope="module")
def generator(trained):
    """As loaded, but with random weights: after a few updates hardly anything depends on the context."""
    loaded = lohp_jax.load(trained[0], "lo_di")
    assert loaded.family == "digits_5way" and loaded.config == RUN
    network_params, optimizer = loaded.params
    return dataclasses.replace(loaded, params=(random_like(network_params), optimizer))


@pytest.fixture(scope="module")
def context():
    family = family_of(RUN)
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
    renamed = context | {"labels": order[context["labels"]]}
    after = pair(generator, renamed, temperature=temperature)
    assert np.abs(after["w"] - before["w"]).max() > 1e-2
    moved = jax.tree.map(lambda leaf: leaf[..., order], after)
    chex.assert_trees_all_close(moved, before, rtol=1e-4, atol=1e-6)


def test_a_context_without_a_label_is_refused(generator, context):
    with pytest.raises(ValueError, match=r"missing \[4\]"):
        pair(generator, context | {"labels": np.minimum(context["labels"], 3)})
