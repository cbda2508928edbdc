"""What a method is trained on, against the stored trajectories it comes from."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.trajectories import dataset as datasets
from lohp_jax.trajectories.dataset import (
    make_coordinates,
    make_dataset,
    make_space,
    make_window_dataset,
)
from lohp_jax.trajectories.matching import match
from lohp_jax.trajectories.store import create
from lohp_jax.types import TaskFamily, Trajectory
from lohp_jax.windows import cut_tokens, make_windows

THETA_0 = {
    "body": jnp.asarray(np.random.default_rng(1).normal(size=(2, 3)), jnp.float32),
    "head": {"b": jnp.zeros(2), "w": jnp.ones((3, 2))},
}
CLASS_AXES = {"body": -1, "head": {"b": 0, "w": 1}}
FAMILY = TaskFamily(*(None,) * 5, num_classes=2, class_axes=CLASS_AXES)


@pytest.fixture(scope="module")
def stored():
    """Six trajectories, three of each teacher, as a store gives them back."""
    rng = np.random.default_rng(0)

    def walk(leaf):
        steps = rng.normal(size=(6, 5, *leaf.shape)).cumsum(axis=1)
        return (np.asarray(leaf) + steps).astype(np.float32)

    return {
        "states": jax.tree.map(walk, THETA_0),
        "losses": rng.uniform(size=(6, 5)).astype(np.float32),
        "teacher": np.array([0, 0, 0, 1, 1, 1], np.int32),
        "data": {"task": np.arange(6, dtype=np.int32)},
    }


@pytest.fixture
def store(stored, tmp_path):
    store = create(tmp_path / "store", {})
    for name, rows in (("0", slice(0, 2)), ("1", slice(2, 6))):
        store.write(name, jax.tree.map(lambda leaf, rows=rows: leaf[rows], stored))
    return store


@pytest.fixture
def space(store):
    coordinates = make_coordinates(store, THETA_0)
    return make_space(FAMILY, coordinates, channels=3, num_steps=2, num_teachers=2)


def test_the_unit_is_how_far_trajectories_went(store, stored):
    coordinates = make_coordinates(store, THETA_0)
    assert coordinates.theta_0 is THETA_0

    def rms(states, start):
        moved = states[:, -1].astype(np.float64) - np.asarray(start)
        return math.sqrt((moved**2).mean())

    expected = jax.tree.map(rms, stored["states"], THETA_0)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), coordinates.scale, expected
    )


@pytest.mark.parametrize("losses, best", [([3, 1, 2, 9, 9, 9], 0), ([3, 1, 9, 2, 2, 2], 1)])
def test_the_teacher_with_the_lowest_mean_loss_is_imitated(stored, tmp_path, losses, best):
    ends = np.float32(losses)
    others = np.broadcast_to(-10 * ends[:, None], (6, 4))
    store = create(tmp_path / "store", {})
    store.write("0", stored | {"losses": np.concatenate([others, ends[:, None]], axis=1)})
    chosen = make_coordinates(store, THETA_0).teacher
    assert chosen == best and chosen.dtype == jnp.int32


def test_a_space_holds_what_a_method_may_know(store, space):
    coordinates = make_coordinates(store, THETA_0)
    assert space.family is FAMILY and space.theta_0 is THETA_0
    assert (space.num_steps, space.num_teachers) == (2, 2)
    assert isinstance(space.teacher, int) and space.teacher == coordinates.teacher
    assert space.codec.num_classes == 2 and space.codec.mask.shape[1] == 3


def test_theta_0_is_the_origin_of_a_space_and_the_scale_its_unit(store, space):
    np.testing.assert_array_equal(space.codec.encode(THETA_0), np.zeros(space.codec.mask.shape))
    scale = make_coordinates(store, THETA_0).scale
    one_off = jax.tree.map(lambda leaf, unit: leaf + unit, THETA_0, scale)
    tokens = np.asarray(space.codec.encode(one_off))
    np.testing.assert_allclose(tokens, space.codec.mask.astype(float), rtol=1e-5)


@pytest.mark.parametrize("matching", ["uniform", "arc_length", "loss", "curvature"])
def test_dataset_is_the_encoded_matched_states(store, stored, space, matching):
    dataset = make_dataset(store, space.codec, 3, matching=matching)
    assert dataset.tokens.shape == (6, 3, *space.codec.mask.shape)
    for row in range(6):
        states, losses = jax.tree.map(lambda x, r=row: x[r], (stored["states"], stored["losses"]))
        indices = match(Trajectory(states, jnp.asarray(losses), None), 3, how=matching)
        for place, index in enumerate(np.asarray(indices)):
            weights = jax.tree.map(lambda leaf, i=index: leaf[i], states)
            expected = space.codec.encode(weights)
            np.testing.assert_allclose(dataset.tokens[row, place], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(dataset.teacher, stored["teacher"])
    np.testing.assert_array_equal(dataset.data["task"], np.arange(6))


def test_tokens_are_standardised_ends(store, space):
    ends = np.asarray(make_dataset(store, space.codec, 3).tokens[:, -1])[:, space.codec.mask]
    assert 0.9 < np.sqrt((ends**2).mean()) < 1.1


# --- windows


@pytest.mark.parametrize("matching", ["uniform", "loss", "arc_length"])
@pytest.mark.parametrize("size", [1, 2])
def test_windows_are_read_from_the_store_as_tokens_are_in_memory(store, space, size, matching):
    whole = make_dataset(store, space.codec, 3, matching=matching)
    apart = make_window_dataset(store, space.codec, 3, matching=matching)
    windows = make_windows(space.codec, size)
    cut = jax.vmap(jax.vmap(lambda tokens: cut_tokens(windows, tokens)))(whole.tokens)
    row, index = (x.ravel() for x in np.meshgrid(np.arange(6), np.arange(windows.count)))
    order = np.random.default_rng(0).permutation(len(row))  # rows of several shards, mixed
    read = apart.read(windows, row[order], index[order])
    expected = np.asarray(cut)[row, :, index][order]
    assert read.shape == (6 * windows.count, 3, size, 3) and read.dtype == np.float32
    np.testing.assert_allclose(read, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(apart.teacher, whole.teacher)
    np.testing.assert_array_equal(apart.data["task"], whole.data["task"])


def test_whole_ends_are_read_when_they_are_asked_for(store, space):
    rows = np.array([4, 0, 5])
    ends = make_window_dataset(store, space.codec, 3).read_ends(rows)
    expected = make_dataset(store, space.codec, 3).tokens[rows, -1]
    np.testing.assert_allclose(ends, expected, rtol=1e-6, atol=1e-7)


def test_no_shard_stays_open(store, space, monkeypatch):
    """Nor is one opened that holds none of the trajectories asked for."""
    dataset, opened = make_window_dataset(store, space.codec, 3), []
    shard = store.shard

    def watched(name):
        opened.append(name)
        return shard(name)

    monkeypatch.setattr(store, "shard", watched)
    windows = make_windows(space.codec, 1)
    dataset.read(windows, np.array([0, 1, 1]), np.array([0, 1, 2]))
    assert opened == ["0"]
    dataset.read(windows, np.array([5, 1]), np.array([0, 1]))
    assert opened == ["0", "0", "1"]


def test_the_scale_of_large_networks_is_taken_run_by_run(store, stored, monkeypatch):
    expected = make_coordinates(store, THETA_0)
    monkeypatch.setattr(datasets, "_MOST_ENDS", 1)
    monkeypatch.setattr(datasets, "standard_scale", None)
    actual = make_coordinates(store, THETA_0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), actual, expected)
    assert jax.tree.map(jnp.shape, actual.scale) == jax.tree.map(lambda leaf: (), THETA_0)


def test_weights_that_never_move_have_a_floor_however_the_scale_is_taken(stored, monkeypatch):
    still = jax.tree.map(np.copy, stored["states"])
    still["body"][:] = np.asarray(THETA_0["body"])
    store = create(None, {})
    store.write("0", stored | {"states": still})
    expected = make_coordinates(store, THETA_0).scale
    monkeypatch.setattr(datasets, "_MOST_ENDS", 1)
    actual = make_coordinates(store, THETA_0).scale
    largest = max(jax.tree.leaves(expected))
    np.testing.assert_allclose(actual["body"], 1e-3 * largest, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), actual, expected)
