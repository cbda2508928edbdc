"""Training on windows: how they are drawn, which methods take them, and that it goes on after a cut."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lohp_jax as lj
from lohp_jax.methods import METHODS
from lohp_jax.methods.step import draw_batches
from lohp_jax.methods.training import UpdateConfig, make_training, train_method
from lohp_jax.methods.windows import read_windows, window_chances
from lohp_jax.policy.config import PAPER_LITERAL
from lohp_jax.training.engine import Saving
from lohp_jax.trajectories.dataset import (
    Dataset,
    make_coordinates,
    make_space,
    make_window_dataset,
)
from lohp_jax.trajectories.store import create
from lohp_jax.types import Space, TaskFamily
from lohp_jax.windows import weights_in_windows

NETWORK = lj.NetworkConfig(widths=(8, 8), embedding=8, window=2)
KEY = jax.random.key(0)
THETA_0 = {"a": np.linspace(-1, 1, 35, dtype=np.float32).reshape(7, 5), "b": np.ones(3, np.float32)}
CONFIG = UpdateConfig(updates=8, batch_size=4, log_every=2)


def context(data, key):
    return {"x": jax.random.normal(key, (4, 1)), "y": data["slope"] * jnp.ones((4, 1))}


FAMILY = TaskFamily(
    sample=lambda key, split="train": {"slope": jax.random.normal(key)},
    init=lambda key: jax.tree.map(jnp.asarray, THETA_0),
    loss=None,
    evaluate=None,
    context=context,
    name="slopes",
)


@pytest.fixture(scope="module")
def store():
    """Nine trajectories that end at their task's slope, in two shards."""
    rng, store = np.random.default_rng(0), create(None, {})
    for name, count in (("0", 4), ("1", 5)):
        slope = rng.normal(size=count).astype(np.float32)
        share = np.linspace(0, 1, 5, dtype=np.float32)

        def path(leaf, slope=slope, share=share):
            ends = slope.reshape(-1, 1, *[1] * leaf.ndim) * np.ones_like(leaf)
            return (leaf + share.reshape(1, -1, *[1] * leaf.ndim) * ends).astype(np.float32)

        trajectories = {
            "states": jax.tree.map(path, THETA_0),
            "losses": np.tile(np.linspace(1, 0, 5, dtype=np.float32), (count, 1)),
            "teacher": np.zeros(count, np.int32),
            "data": {"slope": slope},
        }
        store.write(name, trajectories)
    return store


@pytest.fixture(scope="module")
def space(store) -> Space:
    coordinates = make_coordinates(store, THETA_0)
    return make_space(FAMILY, coordinates, channels=4, num_steps=2, num_teachers=1)


@pytest.fixture(scope="module")
def dataset(store, space):
    return make_window_dataset(store, space.codec, 3)


@pytest.fixture(scope="module")
def method(space):
    return lj.lohp(network=NETWORK).bound(space)


def draw(method, dataset, first, count, batch_size=4, key=KEY):
    batches = draw_batches(key, dataset.rows, first, num_steps=count, batch_size=batch_size)
    chances = window_chances(method.windowed.windows)
    return read_windows(method.windowed, dataset, batches, chances, key, first)


def test_a_window_is_drawn_as_often_as_it_has_weights(method, dataset):
    """Ten tokens in five windows, of which the last has six weights and two numbers of padding."""
    weights = weights_in_windows(method.windowed.windows)
    np.testing.assert_array_equal(weights, [8, 8, 8, 8, 6])
    index = draw(method, dataset, 0, 50, batch_size=100).view.index
    share = np.bincount(index.ravel(), minlength=len(weights)) / index.size
    error = np.sqrt(share * (1 - share) / index.size)
    assert (np.abs(share - weights / 38) < 4 * error).all()


def test_windows_are_drawn_apart_from_the_trajectories(method, dataset):
    """Every trajectory is seen at every window."""
    batches = draw(method, dataset, 0, 50, batch_size=40)
    pairs = np.stack([np.asarray(batches.index).ravel(), batches.view.index.ravel()])
    assert len(np.unique(pairs, axis=1).T) == 9 * 5


def test_the_windows_of_a_step_depend_on_it_alone(method, dataset):
    together = draw(method, dataset, 0, 6)
    apart = [draw(method, dataset, first, count) for first, count in ((0, 1), (1, 3), (4, 2))]
    for get in (lambda b: b.tokens, lambda b: b.view.index, lambda b: b.view.start):
        np.testing.assert_array_equal(get(together), np.concatenate([get(b) for b in apart]))
    other = draw(method, dataset, 0, 6, key=jax.random.key(1))
    assert (other.view.index != together.view.index).any()


def test_tokens_are_those_of_the_rows_and_windows_drawn(method, dataset):
    batches = draw(method, dataset, 3, 2)
    rows, index = np.asarray(batches.index).ravel(), batches.view.index.ravel()
    expected = dataset.read(method.windowed.windows, rows, index)
    np.testing.assert_array_equal(batches.tokens.reshape(expected.shape), expected)
    np.testing.assert_array_equal(
        batches.view.start, method.windowed.view(batches.view.index).start
    )


OTHERS = ("cloning", "lo_di", "lo_op", "weight_diffusion")


@pytest.mark.parametrize(
    "name",
    [
        *("lohp", "hypernetwork_regression"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS),
    ],
)
def test_methods_of_windows_train_and_walk_the_whole(name, space, dataset):
    method, losses = METHODS[name](network=NETWORK), []
    told = {"on_progress": lambda progress: losses.append(progress.metrics["loss"])}
    params = train_method(method, space, dataset, CONFIG, KEY, **told)
    assert len(losses) == 4 and np.isfinite(losses).all()
    states = method.bound(space).walk(params, context({"slope": 0.5}, KEY), KEY)
    assert states.shape[1:] == space.codec.mask.shape and np.isfinite(states).all()


@pytest.mark.slow
def test_what_is_trained_in_windows_is_what_the_trajectories_say(space, dataset):
    """All weights end at theta_0 plus the slope that the context shows."""
    method = lj.lohp(network=NETWORK)
    config = UpdateConfig(updates=400, batch_size=16, learning_rate=1e-2, log_every=50)
    params = train_method(method, space, dataset, config, KEY)
    for slope in np.asarray(dataset.data["slope"][:4]):
        states = method.bound(space).walk(params, context({"slope": slope}, KEY), KEY)
        moved = jax.tree.map(lambda a, b: a - b, space.codec.decode(states[-1]), THETA_0)
        for leaf in jax.tree.leaves(moved):
            np.testing.assert_allclose(leaf, slope, atol=0.25)


def interrupt(progress):
    if progress.step >= 4:
        raise KeyboardInterrupt


def test_a_training_on_windows_goes_on_to_the_same_bits(tmp_path, space, dataset):
    method = lj.lohp(network=NETWORK)
    whole = train_method(method, space, dataset, CONFIG, KEY)
    saving = Saving(tmp_path, 2, {}, {})
    options = {"saving": saving}
    with pytest.raises(KeyboardInterrupt):
        train_method(method, space, dataset, CONFIG, KEY, on_progress=interrupt, **options)
    chex.assert_trees_all_equal(train_method(method, space, dataset, CONFIG, KEY, **options), whole)


def test_every_update_sees_the_windows_of_its_step(space, dataset, method):
    training = make_training(lj.lohp(network=NETWORK), space, dataset, CONFIG, KEY)
    batches = training.draw(2, 3)
    assert batches.tokens.shape == (3, 4, 3, 2, 4) and batches.view.index.shape == (3, 4)
    np.testing.assert_array_equal(batches.tokens[1:], training.draw(3, 2).tokens)


@pytest.mark.parametrize(
    "make, reason",
    [
        (lj.hypernetwork, "task loss of generated weights needs all of them"),
        (lj.lohp_consolidated, "task loss of generated weights needs all of them"),
        (lj.paper_literal, "residuals that are summed over the weights need all of them"),
        (
            lambda network: lj.lohp(network=network, balance=PAPER_LITERAL),
            "residuals that are summed over the weights need all of them",
        ),
    ],
)
def test_methods_that_need_whole_networks_say_so_at_the_door(make, reason):
    message = rf"network.window must be None, got 2: .*{reason}; leave the window out, or take"
    with pytest.raises(ValueError, match=message):
        make(network=NETWORK)


def test_a_method_and_a_data_set_must_agree_on_windows(space, dataset):
    tokens = jnp.zeros((9, 3, *space.codec.mask.shape))
    whole = Dataset(tokens, dataset.teacher, dataset.data)
    with pytest.raises(ValueError, match=r"lohp: this method sees windows, got .* whole networks"):
        make_training(lj.lohp(network=NETWORK), space, whole, CONFIG, KEY)
    with pytest.raises(ValueError, match=r"lohp: this method sees whole networks, got .* windows"):
        make_training(lj.lohp(), space, dataset, CONFIG, KEY)


def test_a_window_that_no_tensor_fills_is_refused_before_training(space):
    network = lj.NetworkConfig(widths=(8, 8), window=12)
    with pytest.raises(ValueError, match=r"window must be between 1 and 10 tokens of 4 .*got 12"):
        lj.lohp(network=network).bound(space)
