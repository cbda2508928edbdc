import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax.data.lane import Drive, read_drive, render_drive
from lohp_jax.networks.classifiers import make_lane_cnn, make_lstm
from lohp_jax.networks.ltc import auto_ncp, ltc
from lohp_jax.workloads.lane_keeping import (
    lane_keeping,
    mean_error,
    nearest_error,
    split_by_time,
)

CAR = pathlib.Path(__file__).parents[2].parent / "shared" / "data" / "deeppicar"
NUM_FRAMES, NUM_TRAIN, LENGTH = 20, 16, 3
SMALL = {
    "sequence_length": LENGTH,
    "batch_size": 4,
    "test_fraction": 0.2,
    "channels": (6, 6, 6, 6, 6),
}


def make_drive():
    """Frames bright to the left of an edge, whose place tells the angle."""
    rng = np.random.default_rng(0)
    angles = 90 + 5 * rng.normal(size=NUM_FRAMES)
    left = np.arange(12)[None, None, :, None] < (angles / 5 - 12)[:, None, None, None]
    frames = np.where(left, 200, 30) + rng.integers(0, 20, (NUM_FRAMES, 8, 12, 3))
    return Drive(np.uint8(frames), np.float32(angles))


@functools.cache
def small_family(head="lstm"):
    return lane_keeping(make_drive(), head=head, **SMALL)


@functools.cache
def small_functions(head="lstm"):
    family = small_family(head)
    return jax.jit(family.loss), jax.jit(family.evaluate)


def weights(head="lstm", *, seed=0):
    """Random weights of the usual sizes, without the time to compile `init`."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        low = 0.0 if path[-1].key in ("sigma", "sensory_sigma") else -1.0
        fan_in = np.prod(leaf.shape[:-1], initial=1.0)
        return np.float32(rng.uniform(low, 1.0, leaf.shape) * np.sqrt(6 / fan_in))

    return jax.tree.map_with_path(draw, jax.eval_shape(small_family(head).init, jax.random.key(0)))


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_the_full_network_has_the_weights_of_table_6():
    params = jax.eval_shape(lane_keeping().init, jax.random.key(0))
    assert count(params["cnn"]) == 251_698
    assert count(params["head"]) == 4 * 64 * (50 + 64) + 4 * 64 + 64 + 1  # an LSTM, a read-out


@pytest.mark.parametrize("size, positions", [((61, 61), 1), ((60, 61), 8 * 8)])
def test_frames_too_small_for_five_convolutions_are_padded(size, positions):
    params = jax.eval_shape(make_lane_cnn().init, jax.random.key(0), jnp.zeros((1, *size, 3)))
    assert params["linear"]["w"].shape == (64 * positions, 100)


def predict(head, params, frames, angles):
    """Degrees at every frame of one sequence `[T, height, width, 3]`, piece by piece."""
    features = make_lane_cnn(SMALL["channels"]).apply(
        params["cnn"], jnp.float32(frames) / 255.0 - 0.5
    )
    if head == "lstm":
        scores = make_lstm(64).apply(params["head"], features)
    else:
        wiring = auto_ncp(19, 1, inputs=50, sparsity=0.75)
        scores = ltc(params["head"], wiring, features)[0][:, 0]
    train = np.float64(angles[:NUM_TRAIN])
    return train.mean() + train.std() * np.float64(scores)


@pytest.mark.parametrize("head", ["lstm", "ltc"])
def test_evaluate_equals_its_definition(head):
    drive, params = make_drive(), weights(head)
    last, within = [], []
    for end in range(NUM_TRAIN, NUM_FRAMES):
        places = slice(end - LENGTH + 1, end + 1)
        predicted = predict(head, params, drive.frames[places], drive.angles)
        errors = (predicted - drive.angles[places]) ** 2
        last.append(errors[-1])
        if end - LENGTH + 1 >= NUM_TRAIN:
            within.append(errors)
    scores = small_functions(head)[1](params, drive)
    np.testing.assert_allclose(scores["objective"], np.mean(last), rtol=1e-4)
    np.testing.assert_allclose(scores["loss"], np.mean(within), rtol=1e-4)


def test_the_loss_is_the_error_of_sequences_within_the_training_part():
    drive, params, (loss, _) = make_drive(), weights(), small_functions()
    errors = []
    for start in range(NUM_TRAIN - LENGTH + 1):
        places = slice(start, start + LENGTH)
        predicted = predict("lstm", params, drive.frames[places], drive.angles)
        errors.append(np.mean((predicted - drive.angles[places]) ** 2))
    losses = [float(loss(params, drive, key)) for key in jax.random.split(jax.random.key(0), 100)]
    assert len(set(losses)) > 50
    deviation = np.std(errors) / np.sqrt(100 * SMALL["batch_size"])
    assert abs(np.mean(losses) - np.mean(errors)) < 4 * deviation
    assert min(errors) * 0.999 <= min(losses) and max(losses) <= max(errors) * 1.001


def test_training_sees_nothing_of_the_test_part():
    drive, params, (loss, evaluate) = make_drive(), weights(), small_functions()
    frames, angles = drive.frames.copy(), drive.angles.copy()
    frames[NUM_TRAIN:], angles[NUM_TRAIN:] = 0, 0.0
    other = Drive(frames, angles)
    for key in jax.random.split(jax.random.key(1), 10):
        assert loss(params, drive, key) == loss(params, other, key)
    assert evaluate(params, drive)["objective"] != evaluate(params, other)["objective"]


def test_a_renderer_gives_every_key_and_split_its_own_road():
    render = functools.partial(render_drive, num_frames=NUM_FRAMES, size=(8, 12))
    family = lane_keeping(render, **SMALL)
    sample = jax.jit(family.sample, static_argnames="split")
    first, again, other = (sample(jax.random.key(seed)) for seed in (0, 0, 1))
    held_out = sample(jax.random.key(0), split="held_out")
    chex.assert_trees_all_equal(first, again)
    assert (first.angles != other.angles).all() and (first.angles != held_out.angles).all()
    params, evaluate = weights(), jax.jit(family.evaluate)
    assert evaluate(params, first)["objective"] != evaluate(params, other)["objective"]


def test_a_drive_that_was_read_is_the_task_of_both_splits():
    drive, sample = make_drive(), small_family().sample
    chex.assert_trees_all_equal(sample(jax.random.key(0)), drive)
    chex.assert_trees_all_equal(sample(jax.random.key(1), "held_out"), drive)


def train(family, params, key, *, num_steps=60, learning_rate=3e-3):
    """Losses `[num_steps]` under Adam."""
    optimizer, data = optax.adam(learning_rate), family.sample(key)

    def step(carry, step_key):
        value, grads = jax.value_and_grad(family.loss)(carry[0], data, step_key)
        updates, state = optimizer.update(grads, carry[1])
        return (optax.apply_updates(carry[0], updates), state), value

    keys = jax.random.split(key, num_steps)
    _, losses = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    return losses


@pytest.mark.slow
def test_adam_over_seeds_halves_the_loss_as_it_does_one_by_one():
    several = [weights(seed=seed) for seed in (0, 1)]
    keys = jax.random.split(jax.random.key(0), 2)
    run = functools.partial(train, small_family())
    losses = jax.jit(jax.vmap(run))(jax.tree.map(lambda *x: jnp.stack(x), *several), keys)
    alone = jax.jit(run)(several[1], keys[1])
    np.testing.assert_allclose(losses[1, :10], alone[:10], rtol=1e-3)
    assert (losses[:, -10:].mean(axis=1) < 0.5 * losses[:, :5].mean(axis=1)).all(), losses


def test_init_depends_on_the_key():
    init = jax.jit(small_family().init)
    first, again, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    assert first["cnn"]["linear"]["w"][0, 0] != other["cnn"]["linear"]["w"][0, 0]
    assert abs(float(jnp.std(first["cnn"]["linear"]["w"])) - np.sqrt(2 / 12)) < 0.05


@pytest.mark.parametrize("head", ["lstm", "ltc"])
def test_gradients_are_finite_and_reach_every_layer(head):
    grads = jax.jit(jax.grad(small_family(head).loss))(
        weights(head), make_drive(), jax.random.key(0)
    )
    chex.assert_tree_all_finite(grads)
    idle = [
        jax.tree_util.keystr(p) for p, leaf in jax.tree.leaves_with_path(grads) if not leaf.any()
    ]
    assert not idle


def test_a_drive_without_turns_has_a_finite_loss():
    drive = make_drive()
    straight = Drive(drive.frames, np.full(NUM_FRAMES, 90.0, np.float32))
    loss, _ = small_functions()
    assert np.isfinite(loss(weights(), straight, jax.random.key(0)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"head": "lstn"}, r"one of \('lstm', 'ltc'\), got 'lstn'; did you mean 'lstm'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"sequence_length": 5}, "sequence_length between 1 .* 16 and 4; got 5"),
        ({"sequence_length": 0}, "got 0"),
        ({"test_fraction": 1.0}, r"a test_fraction that leaves .* got 1\.0 of 20 frames"),
        ({"test_fraction": 0.01}, r"got 0\.01 of 20"),
        ({"channels": (2, 2)}, "lane_keeping: expected five channels, got 2"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        lane_keeping(make_drive(), **(SMALL | options))


def test_an_unknown_split():
    with pytest.raises(ValueError, match=r"split must be one of .*got 'test'"):
        small_family().sample(jax.random.key(0), split="test")


def test_split_by_time_puts_the_last_frames_aside():
    train, test = split_by_time(219)
    np.testing.assert_array_equal(np.concatenate([train, test]), np.arange(219))
    assert len(test) == 33


def test_trivial_baselines_by_hand():
    frames = np.zeros((5, 1, 2, 3), np.uint8)
    frames[:, 0, 0, 0] = [0, 100, 200, 90, 160]
    drive = Drive(frames, np.float32([80, 90, 100, 84, 100]))
    train, test = split_by_time(5, 0.4)
    assert mean_error(drive, train, test) == ((84 - 90) ** 2 + (100 - 90) ** 2) / 2
    assert nearest_error(drive, train, test) == ((84 - 90) ** 2 + (100 - 100) ** 2) / 2


@pytest.mark.skipif(not CAR.exists(), reason="needs the frames of DeepPiCar")
def test_a_random_split_of_deeppicar_flatters():
    """The nearest frame is a good guess only if its neighbours in time may train."""
    drive = read_drive(CAR / "video01_frames.zip", CAR / "video01_steering.csv", size=(33, 100))
    by_time = split_by_time(219)
    assert 400 < nearest_error(drive, *by_time) < 500
    assert 18 < mean_error(drive, *by_time) < 19.5
    orders = [np.random.default_rng(seed).permutation(219) for seed in range(10)]
    at_random = [(order[33:], order[:33]) for order in orders]
    assert 10 < np.mean([nearest_error(drive, *split) for split in at_random]) < 14
    assert 100 < np.mean([mean_error(drive, *split) for split in at_random]) < 175
