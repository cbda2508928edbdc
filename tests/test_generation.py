import collections
import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lohp_jax
from lohp_jax.data.images import ImageSet
from lohp_jax.generation import generate, make_generator
from lohp_jax.methods.lohp import lohp
from lohp_jax.methods.training import state_shapes
from lohp_jax.networks.policy import NetworkConfig
from lohp_jax.policy.config import HybridConfig
from lohp_jax.runs.config import FamilyConfig, RunConfig, resolve, to_json
from lohp_jax.runs.families import family_of
from lohp_jax.tasks.door import describe_family
from lohp_jax.tasks.images import image_family
from lohp_jax.tasks.n_way import n_way_tables
from lohp_jax.tasks.support import canonical_order, relabel
from lohp_jax.training import checkpoint
from lohp_jax.trajectories.dataset import Coordinates, make_space
from lohp_jax.types import Example, Generator

NUM_STEPS, NUM_CLASSES, SHOTS, SHAPE = 2, 3, 2, (4, 4, 1)
KEY = jax.random.key(0)
SMALL = {"trunk": "mlp", "widths": (8,), "embedding": 8}


def random_like(shapes, seed=0, size=0.3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.float32(rng.normal(0, size, size=p.shape)), shapes)


@functools.cache
def make_family(network):
    pools = np.random.default_rng(0).uniform(size=(5, 6, *SHAPE)).astype(np.float32)
    images = ImageSet(pools[:, :4], pools[:, 4:], "random")
    tables = n_way_tables(5, way=NUM_CLASSES)
    return image_family("tiny", images, tables, network=network, shots=SHOTS)


def random_method(family, coordinates, **settings):
    """Lo-Hp bound to a space, the space, and random weights of its network."""
    space = make_space(family, coordinates, channels=8, num_steps=NUM_STEPS, num_teachers=2)
    method = lohp(network=NetworkConfig(**SMALL), balance=HybridConfig(**settings)).bound(space)
    tokens = jnp.zeros((NUM_STEPS + 1, *space.codec.mask.shape))
    data = family.sample(KEY)
    example = Example(tokens, jnp.int32(0), family.context(data, KEY), data)
    return method, space, random_like(jax.eval_shape(method.init, KEY, example))


@functools.cache
def random_generator(network="linear", dropout=0.0, teacher=0):
    """A generator with random weights."""
    family = make_family(network)
    theta_0 = family.init(KEY)
    scale = jax.tree.map(lambda leaf: jnp.float32(0.5), theta_0)
    coordinates = Coordinates(theta_0, scale, jnp.int32(teacher))
    return make_generator(*random_method(family, coordinates, condition_dropout=dropout))


@functools.cache
def drawer(family):
    @jax.jit
    def draw(key):
        task_key, context_key = jax.random.split(key)
        return family.context(family.sample(task_key), context_key)

    return draw


def context_of(family, seed=0):
    """The support of a random task."""
    return drawer(family)(jax.random.key(seed))


def pair(generator, context, key=KEY, **options):
    """Two samples; most tests share this one program."""
    return generate(generator, context, key, num_samples=2, **options)


def row(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


def differ(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(np.abs(x - y).max() for x, y in pairs) > 1e-3


# --- samples


def test_samples_have_a_leading_axis_and_differ_only_if_warm():
    generator, context = random_generator(), context_of(make_family("linear"))
    cold = pair(generator, context)
    assert jax.tree.map(np.shape, cold) == {"head": {"w": (2, 16, 3), "b": (2, 3)}}
    chex.assert_trees_all_close(row(cold, 0), row(cold, 1), rtol=1e-6)
    warm = pair(generator, context, temperature=1.0)
    assert differ(row(warm, 0), row(warm, 1))
    chex.assert_trees_all_equal(warm, pair(generator, context, temperature=1.0))
    assert differ(warm, pair(generator, context, jax.random.key(1), temperature=1.0))
    one = generate(generator, context, KEY)
    chex.assert_trees_all_close(row(one, 0), row(cold, 0), rtol=1e-5, atol=1e-6)


def test_the_weights_depend_on_the_support_and_on_the_teacher_imitated():
    family, generator = make_family("linear"), random_generator()
    context = context_of(family)
    weights = pair(generator, context)
    assert differ(weights, pair(generator, context_of(family, seed=1)))
    assert differ(weights, pair(random_generator(teacher=1), context))


def test_labels_are_put_in_an_order_of_their_own_and_back():
    generator, family = random_generator(), make_family("linear")
    context = context_of(family, seed=2)
    renamed, rank = canonical_order(family, context)
    assert sorted(rank) == [0, 1, 2] and (rank != np.arange(3)).any()
    np.testing.assert_array_equal(renamed["y"], rank[context["y"]])
    np.testing.assert_array_equal(canonical_order(family, renamed)[1], [0, 1, 2])
    actual, expected = (pair(generator, c)["head"] for c in (context, renamed))
    for c in range(NUM_CLASSES):
        np.testing.assert_allclose(actual["w"][..., c], expected["w"][..., rank[c]], rtol=1e-6)
        np.testing.assert_allclose(actual["b"][..., c], expected["b"][..., rank[c]], rtol=1e-6)


@pytest.mark.parametrize("network", ["linear", "mlp", "conv"])
def test_permuting_the_labels_permutes_the_head_and_nothing_else(network):
    family, generator = make_family(network), random_generator(network)
    context = context_of(family, seed=1)
    order = np.array([2, 0, 1])  # label c is called order[c]
    for temperature in (0.0, 1.0):
        before = pair(generator, context, temperature=temperature)
        renamed = context | {"y": order[context["y"]]}
        after = pair(generator, renamed, temperature=temperature)
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
    generator, context = random_generator("mlp"), context_of(make_family("mlp"))
    order = np.random.default_rng(0).permutation(NUM_CLASSES * SHOTS)
    shuffled = pair(generator, row(context, order))
    chex.assert_trees_all_close(shuffled, pair(generator, context), rtol=1e-4, atol=1e-5)


# --- steps


def test_fewer_steps_stop_on_the_same_path():
    generator, context = random_generator(), context_of(make_family("linear"))
    key = jax.random.split(KEY, 2)[0]  # of the first sample
    run = jax.jit(generator.path)
    for temperature in (0.0, 1.0):
        path = run(generator.params, context, key, temperature=temperature)
        assert {len(leaf) for leaf in jax.tree.leaves(path)} == {NUM_STEPS + 1}
        assert differ(row(path, 1), row(path, 2))
        for num_steps, end in ((1, 1), (None, NUM_STEPS)):
            weights = pair(generator, context, temperature=temperature, num_steps=num_steps)
            chex.assert_trees_all_close(row(weights, 0), row(path, end), rtol=1e-5, atol=1e-6)


def test_a_cold_path_starts_at_theta_0():
    generator, family = random_generator("mlp"), make_family("mlp")
    context = context_of(family)
    path = jax.jit(generator.path)(generator.params, context, KEY)
    _, rank = canonical_order(family, context)
    theta_0 = relabel(family.init(KEY), family.class_axes, rank)
    chex.assert_trees_all_close(row(path, 0), theta_0, rtol=1e-6)


def test_guidance_moves_the_weights_away_from_those_without_context():
    generator, context = random_generator(dropout=0.5), context_of(make_family("linear"))
    plain = pair(generator, context)
    assert differ(plain, pair(generator, context, guidance=1))


# --- batches and compilation


def test_vmap_over_contexts_equals_a_loop():
    family, generator = make_family("linear"), random_generator()
    contexts = jax.tree.map(lambda *x: jnp.stack(x), *(context_of(family, s) for s in range(3)))
    keys = jax.random.split(KEY, 3)
    together = jax.vmap(lambda c, k: pair(generator, c, k, temperature=1.0))(contexts, keys)
    for i in range(3):
        alone = pair(generator, row(contexts, i), keys[i], temperature=1.0)
        chex.assert_trees_all_close(row(together, i), alone, rtol=1e-5, atol=1e-6)


def test_one_compilation_per_shape_and_setting():
    family, count = make_family("linear"), collections.Counter()

    def apply(params, context, key, *, temperature, num_steps, guidance):
        """Stands for a policy: only how often it is traced matters here."""
        count["traces"] += 1
        return {"w": params * context["x"].mean() + temperature}

    generator = Generator(apply, jnp.ones(3))
    for seed in range(3):  # other values of all that is traced
        other = dataclasses.replace(generator, params=seed * jnp.ones(3))
        pair(other, context_of(family, seed), jax.random.key(seed), temperature=0.5 * seed)
    pair(generator, context_of(family), temperature=1)
    assert count["traces"] == 1
    pair(generator, context_of(family), num_steps=1)
    pair(generator, context_of(family), guidance=1.0)
    generate(generator, context_of(family), KEY, num_samples=3)
    pair(generator, row(context_of(family), np.arange(4)))
    assert count["traces"] == 5


# --- what is refused


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be finite and not negative, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be finite and not negative, got nan"),
        ({"guidance": float("inf")}, "guidance must be finite, got inf"),
        ({"guidance": 1.0}, "guidance must be 0, got 1.0: .* condition_dropout > 0"),
        ({"num_steps": 0}, "num_steps must be between 1 and 2, got 0"),
        ({"num_steps": 3}, "num_steps must be between 1 and 2, got 3"),
    ],
)
def test_a_bad_option_says_what_is_expected(options, message):
    with pytest.raises(ValueError, match=f"(generate|roll_out): {message}"):
        generate(random_generator(), context_of(make_family("linear")), KEY, **options)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["x"], "expected a context like"),
        (lambda c: c | {"y": jnp.minimum(c["y"], 1)}, r"missing \[2\]"),
        (lambda c: c | {"x": c["x"] * jnp.nan}, "expected finite numbers in x, got 96 NaN"),
        (lambda c: c | {"x": c["x"][:, :3]}, r"shape \[n, 4, 4, 1\], got \[6, 3, 4, 1\]"),
        (lambda c: c | {"x": c["x"] * 255}, r"images in \[0, 1\], got values from"),
        (lambda c: c | {"y": c["y"].astype(float)}, "expected integer y, got float32"),
        (lambda c: c | {"y": c["y"][:4]}, "as many examples in y as in x, .*got 4 and 6"),
        (lambda c: {"x": c["x"]}, r"context like .*'y'.*, got \['x'\]"),
        (lambda c: {"images": c["x"], "labels": c["y"]}, r"got \['images', 'labels'\]"),
    ],
)
def test_a_bad_context_is_refused_before_anything_is_computed(change, message):
    generator = dataclasses.replace(random_generator(), apply=None)
    with pytest.raises(ValueError, match=f"generate: .*{message}"):
        generate(generator, change(context_of(make_family("linear"))), KEY)


# --- load


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    """A run directory with one checkpoint of random weights, its config, and the generator saved."""
    config = resolve(RunConfig(tasks=FamilyConfig(network="linear", shots=SHOTS)))
    family = family_of(config)
    theta_0 = random_like(jax.eval_shape(family.init, KEY))
    scale = jax.tree.map(lambda leaf: jnp.float32(2.0), theta_0)
    coordinates = Coordinates(theta_0, scale, jnp.ones((), jnp.int32))
    method, space, params = random_method(family, coordinates)
    shapes = state_shapes(method, space)
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    state = state._replace(params=params)
    directory = tmp_path_factory.mktemp("run")
    saved = {
        "method": {"name": method.name, "config": method.config},
        "family": describe_family(family)._asdict(),
        "teachers": ["sgd", "adam"],
        "num_steps": NUM_STEPS,
        "channels": 8,
        "run": to_json(config),
    }
    folder = directory / "checkpoints" / "lohp"
    checkpoint.save(folder, 1, {"state": state, "coordinates": coordinates}, saved)
    return directory, config, make_generator(method, space, params)


def test_load_brings_back_the_generator_that_was_saved(run_directory):
    directory, config, saved = run_directory
    loaded = lohp_jax.load(directory)
    assert loaded.family == "digits_5way"
    assert loaded.config["run"]["seed"] == config.seed
    assert loaded.config["method"]["name"] == "lohp"
    context = context_of(family_of(config))
    chex.assert_trees_all_equal(
        pair(loaded, context, temperature=1.0), pair(saved, context, temperature=1.0)
    )


def test_load_says_which_method_has_no_checkpoint(run_directory, tmp_path):
    with pytest.raises(FileNotFoundError, match="cloning"):
        lohp_jax.load(run_directory[0], "cloning")
    with pytest.raises(FileNotFoundError, match="lohp"):
        lohp_jax.load(tmp_path)
