import collections
import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lohp_jax
from lohp_jax.baselines.features import relabel
from lohp_jax.codec import make_codec
from lohp_jax.data.images import ImageSet
from lohp_jax.generation import canonical_rank, generate, image_shape, policy_generator
from lohp_jax.policy.hybrid import HybridConfig, Policy
from lohp_jax.policy.network import NetworkConfig, make_policy_network
from lohp_jax.tasks.image_tasks import image_family
from lohp_jax.tasks.n_way import n_way_tables
from lohp_jax.training import checkpoint
from lohp_jax.training.config import FamilyConfig, RunConfig, TrainingConfig, resolve, to_json
from lohp_jax.training.loop import initial_state
from lohp_jax.training.problem import Frame, family_of, make_policy

NUM_STEPS, NUM_CLASSES, SHOTS, SHAPE = 3, 3, 2, (4, 4, 1)
KEY = jax.random.key(0)
SMALL = {"widths": (8,), "embedding": 8}


def random_like(shapes, seed=0, size=0.3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.float32(rng.normal(0, size, size=p.shape)), shapes)


@functools.cache
def make_family(network):
    pools = np.random.default_rng(0).uniform(size=(5, 6, *SHAPE)).astype(np.float32)
    images = ImageSet(pools[:, :4], pools[:, 4:], "random")
    tables = n_way_tables(5, way=NUM_CLASSES)
    return image_family("tiny", images, tables, network=network, shots=SHOTS)


@functools.cache
def make_generator(network="linear", trunk="mlp", condition_dropout=0.0):
    """A generator with random weights."""
    family = make_family(network)
    theta_0 = family.init(KEY)
    codec = make_codec(
        theta_0,
        channels=8,
        reference=theta_0,
        scale=jax.tree.map(lambda leaf: jnp.float32(0.5), theta_0),
        class_axes=family.class_axes,
    )
    raw = make_codec(theta_0, channels=8, class_axes=family.class_axes)
    config = NetworkConfig(trunk=trunk, **SMALL)
    policy_network = make_policy_network(
        codec, config, raw.encode(theta_0), num_steps=NUM_STEPS, num_optimizers=2
    )
    objective = HybridConfig(condition_dropout=condition_dropout)
    policy = Policy(policy_network, codec, objective, NUM_STEPS)
    params = random_like(jax.eval_shape(policy_network.init, KEY, context_of(family)))
    return policy_generator(policy, family, params, jnp.zeros((), jnp.int32))


def context_of(family, seed=0):
    task_key, key = jax.random.split(jax.random.key(seed))
    return family.context(family.sample(task_key), key)


def row(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


def differ(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(np.abs(x - y).max() for x, y in pairs) > 1e-3


# --- samples


def test_samples_have_a_leading_axis_and_differ_only_if_warm():
    generator, context = make_generator(), context_of(make_family("linear"))
    cold = generate(generator, context, KEY, num_samples=3)
    assert jax.tree.map(np.shape, cold) == {"head": {"w": (3, 16, 3), "b": (3, 3)}}
    chex.assert_trees_all_close(row(cold, 0), row(cold, 1), row(cold, 2), rtol=1e-6)
    warm = generate(generator, context, KEY, num_samples=3, temperature=1.0)
    assert differ(row(warm, 0), row(warm, 1)) and differ(row(warm, 1), row(warm, 2))
    again = generate(generator, context, KEY, num_samples=3, temperature=1.0)
    chex.assert_trees_all_equal(warm, again)
    assert differ(
        warm, generate(generator, context, jax.random.key(1), num_samples=3, temperature=1.0)
    )


def test_the_weights_depend_on_the_support_and_on_the_optimizer_asked_for():
    family, generator = make_family("linear"), make_generator()
    context = context_of(family)
    weights = generate(generator, context, KEY)
    assert differ(weights, generate(generator, context_of(family, seed=1), KEY))
    chex.assert_trees_all_equal(weights, generate(generator, context | {"optimizer": 0}, KEY))
    assert differ(weights, generate(generator, context | {"optimizer": 1}, KEY))


def test_a_cold_sample_is_the_mean_roll_out_of_the_policy_in_weights():
    """Labels in the canonical order going in, and back in their own order coming out."""
    family, generator = make_family("linear"), make_generator()
    context = context_of(family, seed=2)
    rank = np.asarray(canonical_rank(context, NUM_CLASSES))
    assert sorted(rank) == [0, 1, 2] and (rank != [0, 1, 2]).any()
    renamed = context | {"labels": rank[context["labels"]]}
    np.testing.assert_array_equal(canonical_rank(renamed, NUM_CLASSES), [0, 1, 2])
    expected = row(generate(generator, renamed, KEY), 0)["head"]
    actual = row(generate(generator, context, KEY), 0)["head"]
    for c in range(NUM_CLASSES):
        np.testing.assert_allclose(actual["w"][:, c], expected["w"][:, rank[c]], rtol=1e-6)
        np.testing.assert_allclose(actual["b"][c], expected["b"][rank[c]], rtol=1e-6)


@pytest.mark.parametrize(
    "network, trunk", [("linear", "mlp"), ("mlp", "mlp"), ("conv", "mlp"), ("mlp", "unet")]
)
def test_permuting_the_labels_permutes_the_head_and_nothing_else(network, trunk):
    family, generator = make_family(network), make_generator(network, trunk)
    context = context_of(family, seed=1)
    order = np.array([2, 0, 1])  # label c is called order[c]
    for temperature in (0.0, 1.0):
        options = {"temperature": temperature, "num_samples": 2}
        before = generate(generator, context, KEY, **options)
        renamed = context | {"labels": order[context["labels"]]}
        after = generate(generator, renamed, KEY, **options)
        assert differ(before["head"], after["head"])
        for c in range(NUM_CLASSES):
            chex.assert_trees_all_close(
                jax.tree.map(lambda leaf, c=c: leaf[..., order[c]], after["head"]),
                jax.tree.map(lambda leaf, c=c: leaf[..., c], before["head"]),
                rtol=1e-5,
            )
        del before["head"], after["head"]
        chex.assert_trees_all_close(after, before, rtol=1e-5)


def test_the_order_of_the_examples_does_not_matter():
    generator, context = make_generator("mlp"), context_of(make_family("mlp"))
    order = np.random.default_rng(0).permutation(NUM_CLASSES * SHOTS)
    shuffled = generate(generator, row(context, order), KEY)
    chex.assert_trees_all_close(shuffled, generate(generator, context, KEY), rtol=1e-4, atol=1e-5)


# --- steps


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_fewer_steps_stop_on_the_same_path(temperature):
    generator, context = make_generator(), context_of(make_family("linear"))
    key = jax.random.split(KEY, 1)[0]  # of the first sample
    path = generator.path(generator.params, context, key, temperature=temperature)
    assert {len(leaf) for leaf in jax.tree.leaves(path)} == {NUM_STEPS + 1}
    for num_steps in range(1, NUM_STEPS + 1):
        weights = generate(generator, context, KEY, temperature=temperature, num_steps=num_steps)
        chex.assert_trees_all_close(row(weights, 0), row(path, num_steps), rtol=1e-5, atol=1e-6)
    assert differ(row(path, 1), row(path, 2))


def test_the_path_starts_at_theta_0():
    generator, family = make_generator("mlp"), make_family("mlp")
    context = context_of(family)
    path = generator.path(generator.params, context, KEY)
    rank = canonical_rank(context, NUM_CLASSES)
    theta_0 = relabel(family.init(KEY), family.class_axes, rank)
    chex.assert_trees_all_close(row(path, 0), theta_0, rtol=1e-6)


def test_guidance_moves_the_weights_away_from_those_without_context():
    generator = make_generator(condition_dropout=0.5)
    context = context_of(make_family("linear"))
    plain = generate(generator, context, KEY)
    chex.assert_trees_all_equal(plain, generate(generator, context, KEY, guidance=0))
    assert differ(plain, generate(generator, context, KEY, guidance=1.0))


# --- batches and compilation


def test_vmap_over_contexts_equals_a_loop():
    family, generator = make_family("linear"), make_generator()
    contexts = jax.tree.map(lambda *x: jnp.stack(x), *(context_of(family, s) for s in range(3)))
    keys = jax.random.split(KEY, 3)
    run = functools.partial(generate, generator, num_samples=2, temperature=1.0)
    together = jax.vmap(run)(contexts, keys)
    for i in range(3):
        alone = run(row(contexts, i), keys[i])
        chex.assert_trees_all_close(row(together, i), alone, rtol=1e-5, atol=1e-6)


def test_one_compilation_per_shape_and_setting():
    generator, family = make_generator(), make_family("linear")
    count = collections.Counter()

    def counting(*args, **options):
        count["traces"] += 1
        return generator.apply(*args, **options)

    counted = dataclasses.replace(generator, apply=counting)
    run = functools.partial(generate, counted, num_samples=2)
    run(context_of(family), KEY)
    for seed in range(3):  # other values of everything that is traced
        run(context_of(family, seed), jax.random.key(seed), temperature=0.5 * seed)
    other = dataclasses.replace(counted, params=jax.tree.map(lambda p: p + 1, generator.params))
    generate(other, context_of(family), KEY, num_samples=2)
    assert count["traces"] == 1
    run(context_of(family), KEY, num_steps=1)
    assert count["traces"] == 2
    run(row(context_of(family), np.array([0, 1, 2, 3, 4, 5, 5])), KEY)
    assert count["traces"] == 3


# --- what is refused


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be finite and not negative, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be finite and not negative, got nan"),
        ({"guidance": float("inf")}, "guidance must be finite, got inf"),
        ({"guidance": 1.0}, "guidance must be 0, got 1.0: .* condition_dropout > 0"),
        ({"num_steps": 0}, "num_steps must be between 1 and 3, got 0"),
        ({"num_steps": 4}, "num_steps must be between 1 and 3, got 4"),
    ],
)
def test_a_bad_option_says_what_is_expected(options, message):
    with pytest.raises(ValueError, match=f"generate: {message}"):
        generate(make_generator(), context_of(make_family("linear")), KEY, **options)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["images"], "expected a context"),
        (lambda c: c | {"labels": jnp.minimum(c["labels"], 1)}, r"missing \[2\]"),
        (lambda c: c | {"images": c["images"] * jnp.nan}, "expected finite .*with NaN"),
        (lambda c: c | {"images": c["images"][:, :3]}, r"shape \[n, 4, 4, 1\], got \[6, 3, 4, 1\]"),
        (lambda c: c | {"labels": c["labels"].astype(float)}, "expected 6 integer labels"),
    ],
)
def test_a_bad_context_is_refused_before_anything_is_computed(change, message):
    generator = dataclasses.replace(make_generator(), apply=None)
    with pytest.raises(ValueError, match=f"generate: .*{message}"):
        generate(generator, change(context_of(make_family("linear"))), KEY)


def test_image_shape_is_that_of_the_contexts():
    assert image_shape(make_family("linear")) == SHAPE


# --- load


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    """A run directory with one checkpoint of random weights, its config, frame and parameters."""
    config = resolve(
        RunConfig(
            tasks=FamilyConfig(network="linear", shots=SHOTS),
            network=NetworkConfig(trunk="mlp", **SMALL),
            training=TrainingConfig(updates=1),
        )
    )
    family = family_of(config)
    theta_0 = random_like(jax.eval_shape(family.init, KEY))
    scale = jax.tree.map(lambda leaf: jnp.float32(2.0), theta_0)
    frame = Frame(theta_0, scale, jnp.ones((), jnp.int32))
    policy = make_policy(config, family, frame, "lohp")
    shapes = jax.eval_shape(lambda: initial_state(config, family, policy, "lohp", KEY))
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    state = state._replace(params=random_like(shapes.params))
    directory = tmp_path_factory.mktemp("run")
    folder = directory / "checkpoints" / "lohp"
    checkpoint.save(folder, 1, {"state": state, "frame": frame}, to_json(config))
    return (
        directory,
        config,
        policy_generator(policy, family, state.params, frame.optimizer, config),
    )


def test_load_brings_back_the_generator_that_was_saved(run_directory):
    directory, config, saved = run_directory
    loaded = lohp_jax.load(directory)
    assert loaded.family == "digits_5way" and loaded.config == config
    context = context_of(family_of(config))
    options = {"num_samples": 2, "temperature": 1.0}
    chex.assert_trees_all_equal(
        generate(loaded, context, KEY, **options), generate(saved, context, KEY, **options)
    )


def test_load_says_which_method_has_no_checkpoint(run_directory, tmp_path):
    with pytest.raises(FileNotFoundError, match="cloning"):
        lohp_jax.load(run_directory[0], "cloning")
    with pytest.raises(FileNotFoundError, match="lohp"):
        lohp_jax.load(tmp_path)
