"""Training of a method: where it starts, how long it takes, and that it goes on where it was cut off.

The method is a toy of its own: six numbers, pulled towards those of each example.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.codec import make_codec
from lohp_jax.methods.training import (
    UpdateConfig,
    make_training,
    num_updates,
    state_shapes,
    train_method,
)
from lohp_jax.training import checkpoint
from lohp_jax.training.engine import Saving
from lohp_jax.trajectories.dataset import Coordinates, Dataset
from lohp_jax.types import Method, Space, TaskFamily

CONFIG = UpdateConfig(updates=12, batch_size=4, log_every=2)
KEY = jax.random.key(3)


def sample(key, split="train"):
    return {"x": jax.random.normal(key, (3,))}


def noisy_context(data, key):
    return {"x": data["x"] + 0.1 * jax.random.normal(key, (3,))}


THETA_0 = {"w": jnp.ones(3)}
COORDINATES = Coordinates(THETA_0, {"w": jnp.float32(2)}, jnp.int32(1))
FAMILY = TaskFamily(sample, None, None, None, noisy_context)
SPACE = Space(FAMILY, make_codec(THETA_0, channels=3), THETA_0, 2, 2, 1)
DATASET = Dataset(
    jnp.asarray(np.random.default_rng(0).normal(size=(5, 3, 1, 3)), jnp.float32),
    jnp.arange(5) % 2,
    {"x": jnp.asarray(np.random.default_rng(1).normal(size=(5, 3)), jnp.float32)},
)


def init(key, example):
    return {"w": jax.random.normal(key, example.context["x"].shape), "b": jnp.zeros(3)}


def objective(params, example, key):
    noise = 0.1 * jax.random.normal(key, (3,))
    error = params["w"] * example.context["x"] + params["b"] + noise - example.tokens[-1, 0]
    moved = {"progress": jnp.sum(params["b"] ** 2), "cosine": jnp.float32(1.0)}
    return jnp.sum(error**2), {**moved, "error": jnp.abs(error)}


TOY = Method("toy", init, objective, walk=len, config={"size": 3})
SECOND = dataclasses.replace(TOY, name="second", starts_from=TOY, share=0.5)


def run(directory, method=TOY, **options):
    saving = Saving(directory, 4, {"run": "of mine"}, {"coordinates": COORDINATES})
    return train_method(method, SPACE, DATASET, CONFIG, KEY, saving=saving, **options)


def saved(directory, method=TOY):
    template = {"state": state_shapes(method, SPACE), "coordinates": COORDINATES}
    return checkpoint.restore(directory / "checkpoints" / method.name, template)


def interrupt_in(name):
    def on_progress(progress):
        if progress.method == name:
            raise KeyboardInterrupt

    return on_progress


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Directory and params of a training that nothing interrupted, of both methods."""
    directory = tmp_path_factory.mktemp("whole")
    return directory, run(directory, SECOND)


@pytest.mark.parametrize("name", ["toy", "second"])
def test_a_run_goes_on_where_it_was_cut_off(tmp_path, whole, name):
    """In the first training or in that which starts from it."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, SECOND, on_progress=interrupt_in(name))
    chex.assert_trees_all_equal(run(tmp_path, SECOND), whole[1])
    chex.assert_trees_all_equal(saved(tmp_path, SECOND), saved(whole[0], SECOND))


def test_what_is_saved_is_the_state_and_how_it_was_made(whole):
    directory, params = whole
    step, content = saved(directory, SECOND)
    assert step == content["state"].step == 6
    chex.assert_trees_all_equal(content["state"].params, params)
    chex.assert_trees_all_equal(content["coordinates"], COORDINATES)
    assert checkpoint.read_config(directory / "checkpoints" / "toy") == {
        "run": "of mine",
        "method": {"name": "toy", "config": {"size": 3}},
    }


def test_in_memory_training_is_the_same(whole):
    told = []
    params = train_method(SECOND, SPACE, DATASET, CONFIG, KEY, on_progress=told.append)
    chex.assert_trees_all_equal(params, whole[1])
    steps = [(progress.method, progress.step) for progress in told]
    assert steps == [("toy", n) for n in range(2, 13, 2)] + [("second", n) for n in (2, 4, 6)]


def test_a_method_starts_where_the_one_before_it_ended(whole):
    """Its `init` is not asked."""
    directory, _ = whole
    before = saved(directory, TOY)[1]["state"].params

    def refuse(key, example):
        raise AssertionError("init was called")

    second = dataclasses.replace(SECOND, init=refuse)
    training = make_training(second, SPACE, DATASET, CONFIG, KEY, before)
    state = training.start(*training.start_from)
    chex.assert_trees_all_equal(state.params, before)
    assert state.step == 0 and training.updates == 6


def test_a_method_starts_at_its_init_otherwise():
    training = make_training(TOY, SPACE, DATASET, CONFIG, KEY)
    state = training.start(*training.start_from)
    assert np.abs(state.params["w"]).min() > 0 and not state.params["b"].any()
    chex.assert_trees_all_equal_shapes_and_dtypes(state, state_shapes(TOY, SPACE))


def test_the_start_depends_on_the_key_alone():
    keys = (KEY, KEY, jax.random.key(4))
    trainings = [make_training(TOY, SPACE, DATASET, CONFIG, key) for key in keys]
    first, again, other = (t.start(*t.start_from).params["w"] for t in trainings)
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()


def test_updates_are_shared_out():
    assert num_updates(TOY, 12) == 12
    assert num_updates(SECOND, 12) == 6
    assert num_updates(SECOND, 1) == 1
    assert num_updates(dataclasses.replace(TOY, share=1.5), 12) == 18


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"updates": 0}, "updates must be at least 1, got 0"),
        ({"log_every": 0}, "log_every must be at least 1, got 0"),
        ({"batch_size": 3}, "batch_size must be even and at least 2, got 3"),
        ({"batch_size": 0}, "batch_size must be even and at least 2, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be finite and positive, got 0.0"),
        ({"learning_rate": float("inf")}, "learning_rate must be finite and positive, got inf"),
        ({"clip_norm": float("nan")}, "clip_norm must be finite and positive, got nan"),
    ],
)
def test_bad_settings_say_what_is_wrong(settings, message):
    with pytest.raises(ValueError, match=message):
        UpdateConfig(**{"updates": 12, **settings})
