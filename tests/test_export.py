"""Weights streamed to disk are those that `generate` makes in memory."""

import dataclasses
import errno
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import lohp_jax as lj
from lohp_jax import export
from lohp_jax.data.images import ImageSet
from lohp_jax.generation import make_generator
from lohp_jax.policy import windows as policy_windows
from lohp_jax.tasks.images import image_family
from lohp_jax.tasks.n_way import n_way_tables
from lohp_jax.tasks.support import canonical_order
from lohp_jax.trajectories.dataset import Coordinates, make_space
from lohp_jax.types import Example

KEY, NUM_CLASSES, SHAPE = jax.random.key(0), 3, (4, 4, 1)
HALVES = {"head": {"b": jnp.bfloat16}, "linear": {"b": jnp.float16}}


@functools.cache
def make_family(halves=False):
    """Of a small MLP; with `halves` two of its leaves are of half precision."""
    pools = np.random.default_rng(0).uniform(size=(5, 6, *SHAPE)).astype(np.float32)
    images = ImageSet(pools[:, :4], pools[:, 4:], "random")
    tables = n_way_tables(5, way=NUM_CLASSES)
    family = image_family("tiny", images, tables, network="mlp", shots=2)

    def init(key):
        params = family.init(key)
        for layer, types in HALVES.items():
            params[layer] |= {name: params[layer][name].astype(t) for name, t in types.items()}
        return params

    return dataclasses.replace(family, init=init) if halves else family


@functools.cache
def make(window=4, halves=False):
    """A generator with random weights."""
    family = make_family(halves)
    theta_0 = family.init(KEY)
    scale = jax.tree.map(lambda leaf: jnp.float32(0.5), theta_0)
    coordinates = Coordinates(theta_0, scale, jnp.int32(0))
    space = make_space(family, coordinates, channels=8, num_steps=2, num_teachers=2)
    network = lj.NetworkConfig(widths=(8, 8), embedding=8, window=window)
    balance = lj.HybridConfig(condition_dropout=0.5)
    method = lj.lohp(network=network, balance=balance).bound(space)
    data = family.sample(KEY)
    example = Example(None, jnp.int32(0), family.context(data, KEY), data)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: jnp.float32(rng.normal(0, 0.3, p.shape)),
        jax.eval_shape(method.init, KEY, example),
    )
    return make_generator(method, space, params)


def context_of(seed=2):
    task_key, context_key = jax.random.split(jax.random.key(seed))
    family = make_family()
    return family.context(family.sample(task_key), context_key)


def named(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def assert_same_file(path, expected):
    with safetensors.safe_open(path, "flax") as file:
        found = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        assert found[name].dtype == leaf.dtype and found[name].shape == leaf.shape
        precise = 1e-6 if leaf.dtype == np.float32 else 1e-2
        ours, theirs = np.float32(found[name]), np.float32(leaf)
        size = np.abs(theirs).max(initial=0)
        np.testing.assert_allclose(ours, theirs, rtol=precise, atol=precise * size, err_msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "num_steps": 1},
        {"guidance": 2.0},
    ],
)
def test_streamed_weights_are_those_that_are_generated(tmp_path, options):
    """Also where the labels of the context are put into an order of their own and back."""
    generator, context = make(), context_of()
    assert (canonical_order(make_family(), context)[1] != np.arange(NUM_CLASSES)).any()
    lj.stream_weights(generator, context, KEY, tmp_path / "deep" / "w.safetensors", **options)
    weights = lj.generate(generator, context, KEY, **options)
    expected = named(jax.tree.map(lambda leaf: leaf[0], weights))
    assert_same_file(tmp_path / "deep" / "w.safetensors", expected)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["w.safetensors"]


def test_streamed_weights_depend_on_key_and_context(tmp_path):
    def stream(context=2, key=0, **options):
        path = tmp_path / "w.safetensors"
        lj.stream_weights(make(), context_of(context), jax.random.key(key), path, **options)
        return safetensors.numpy.load_file(path)["linear.w"]

    assert np.abs(stream() - stream(context=1)).max() > 1e-3
    warm = [stream(temperature=1.0, key=key) for key in (0, 0, 1)]
    np.testing.assert_array_equal(warm[0], warm[1])
    assert np.abs(warm[0] - warm[2]).max() > 1e-3


def test_small_batches_and_maps_that_are_let_go_write_the_same(tmp_path, monkeypatch):
    generator, context = make(window=2), context_of()
    lj.stream_weights(generator, context, KEY, tmp_path / "a", temperature=1.0)
    monkeypatch.setattr(policy_windows, "TOKENS_AT_ONCE", 6)
    monkeypatch.setattr(export, "_MAPPED_BYTES", 1)
    lj.stream_weights(generator, context, KEY, tmp_path / "b", temperature=1.0)
    assert_same_file(tmp_path / "b", safetensors.numpy.load_file(tmp_path / "a"))


def test_leaves_of_half_precision_keep_their_type(tmp_path):
    generator, context = make(halves=True), context_of()
    lj.stream_weights(generator, context, KEY, tmp_path / "w")
    weights = named(jax.tree.map(lambda leaf: leaf[0], lj.generate(generator, context, KEY)))
    assert {str(leaf.dtype) for leaf in weights.values()} == {"float32", "float16", "bfloat16"}
    assert_same_file(tmp_path / "w", weights)


def test_what_is_streamed_reads_as_what_is_written_whole(tmp_path):
    """The same names, shapes and bytes of header but for its order."""
    generator, context = make(), context_of()
    lj.stream_weights(generator, context, KEY, tmp_path / "streamed")
    weights = jax.tree.map(lambda leaf: leaf[0], lj.generate(generator, context, KEY))
    lj.write_weights(tmp_path / "whole", weights)
    assert_same_file(tmp_path / "streamed", safetensors.numpy.load_file(tmp_path / "whole"))


def test_a_generator_of_whole_networks_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a generator that walks .*window=\.\.\."):
        lj.stream_weights(make(window=None), context_of(), KEY, tmp_path / "w")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, options, message",
    [
        (lambda c: {"x": c["x"]}, {}, "expected a context like"),
        (lambda c: c | {"x": c["x"] * jnp.nan}, {}, "expected finite numbers in x"),
        (lambda c: c, {"temperature": -1.0}, "temperature must be finite and not negative, got -1"),
        (lambda c: c, {"guidance": float("nan")}, "guidance must be finite, got nan"),
        (lambda c: c, {"num_steps": 3}, "num_steps must be between 1 and 2, got 3"),
    ],
)
def test_bad_input_leaves_the_file_that_was_there(tmp_path, change, options, message):
    path = tmp_path / "w"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match=message):
        lj.stream_weights(make(), change(context_of()), KEY, path, **options)
    assert path.read_bytes() == b"before" and [p.name for p in tmp_path.iterdir()] == ["w"]


def test_a_full_disk_is_met_before_anything_is_mapped(tmp_path, monkeypatch):
    def full(descriptor, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "w"
    path.write_bytes(b"before")
    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(np, "memmap", None)
    with pytest.raises(OSError, match=r"No space left on device .*intact"):
        lj.stream_weights(make(), context_of(), KEY, path)
    assert path.read_bytes() == b"before" and [p.name for p in tmp_path.iterdir()] == ["w"]
