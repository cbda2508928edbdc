"""Lane keeping: the steering angle from a short sequence of camera frames."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.checks import check_option
from lohp_jax.data.lane import Drive, render_drive
from lohp_jax.networks.classifiers import HEAD, LANE_CHANNELS, make_lane_cnn, make_lstm
from lohp_jax.networks.ltc import auto_ncp, init_ltc, ltc
from lohp_jax.tasks.splits import check_split
from lohp_jax.types import TaskFamily
from lohp_jax.workloads.single import no_context

_FEATURES = 50
_LSTM_UNITS, _LTC_UNITS, _LTC_SPARSITY = 64, 19, 0.75  # as in the HUB paper


def lane_keeping(
    drive: Drive | Callable[[jax.Array], Drive] = render_drive,
    *,
    head: str = "lstm",
    sequence_length: int = 16,
    batch_size: int = 8,
    test_fraction: float = 0.15,
    channels: Sequence[int] = LANE_CHANNELS,
) -> TaskFamily:
    """Predicts the angle at every frame from the frames up to it, with few of them for memory.

    A task is a `Drive`. Its first part trains, its last part tests: a random split would put frames
    that are all but equal into both. The weights are `{"cnn": ..., "head": ...}`; the network predicts
    standard scores of the training angles, errors are in degrees squared. Loss: the mean squared error
    at all frames of `batch_size` sequences drawn by the key. `evaluate`: "objective", that at every
    test frame, seen at the end of its sequence, which may begin before the test part; "loss", the inner
    loss over all sequences within the test part.

    Args:
      drive: what was read by `read_drive`, the one task of both splits; or `(key) -> Drive`, each key
        another task. The default renders frames of 66 x 200, for a GPU; on a CPU prefer e.g.
        `functools.partial(render_drive, size=(24, 64))`.
      head: "lstm", 64 units; or "ltc", 19 neurons wired by `auto_ncp` with sparsity 0.75.
      sequence_length: frames of a sequence.
      batch_size: sequences of a step.
      test_fraction: share of the drive, at its end, that tests.
      channels: of the convolutions, see `make_lane_cnn`.

    Raises: ValueError for an unknown head, other than five `channels`, a `batch_size` under 1, or fewer
      training or test frames than a sequence has; in `sample` for an unknown split.
    """
    shape = jax.eval_shape(drive, jax.random.key(0)) if callable(drive) else drive
    num_train = _num_train(len(shape.angles), test_fraction)
    _check_options(num_train, len(shape.angles), sequence_length, batch_size, channels)
    init, predict = _make_network(channels, head, shape.frames.shape[1:])
    fixed = None if callable(drive) else jax.tree.map(jnp.asarray, drive)

    def sample(key, split="train"):
        check_split(split)
        return drive(jax.random.fold_in(key, split == "train")) if fixed is None else fixed

    def squared_errors(params, data, frames, sequences):
        """Of `sequences`, places in `frames`, which are places in the drive."""
        scores = predict(params, data.frames[frames], sequences)
        mean, std = _standard(data.angles[:num_train])
        return (mean + std * scores - data.angles[frames[sequences]]) ** 2

    def loss(params, data, key):
        first = jax.random.randint(key, (batch_size, 1), 0, num_train - sequence_length + 1)
        frames = (first + jnp.arange(sequence_length)[None]).reshape(-1)
        sequences = jnp.arange(len(frames)).reshape(batch_size, sequence_length)
        return jnp.mean(squared_errors(params, data, frames, sequences))

    def evaluate(params, data):
        windows = _test_windows(num_train, len(shape.angles), sequence_length)
        errors = squared_errors(params, data, *windows)
        within = errors[sequence_length - 1 :]
        return {"objective": jnp.mean(errors[:, -1]), "loss": jnp.mean(within)}

    return TaskFamily(sample, init, loss, evaluate, no_context, name=f"lane_keeping_{head}")


def split_by_time(num_frames: int, test_fraction: float = 0.15) -> tuple[np.ndarray, np.ndarray]:
    """Places of the frames that train and of those that test, the last ones.

    Raises: ValueError, if either part would be empty.
    """
    places = np.arange(num_frames)
    return tuple(np.split(places, [_num_train(num_frames, test_fraction)]))


def mean_error(drive: Drive, train: np.ndarray, test: np.ndarray) -> float:
    """Mean squared error, in degrees squared, of always predicting the mean training angle."""
    angles = np.asarray(drive.angles, np.float64)
    return float(np.mean((angles[train].mean() - angles[test]) ** 2))


def nearest_error(drive: Drive, train: np.ndarray, test: np.ndarray) -> float:
    """Mean squared error of the angle at the training frame whose pixels are nearest."""
    from sklearn.neighbors import KNeighborsRegressor  # here, for a light `import lohp_jax`

    pixels = np.asarray(drive.frames, np.float64).reshape(len(drive.frames), -1)
    angles = np.asarray(drive.angles, np.float64)
    nearest = KNeighborsRegressor(1).fit(pixels[train], angles[train])
    return float(np.mean((nearest.predict(pixels[test]) - angles[test]) ** 2))


def _make_network(
    channels: Sequence[int], head: str, frame_shape: tuple[int, ...]
) -> tuple[Callable, Callable]:
    """`init(key) -> params` and `apply(params, frames [F, ...], sequences [B, T]) -> scores [B, T]`.

    `sequences` are places in `frames`, each of which passes the convolutions once.
    """
    cnn = make_lane_cnn(channels)
    init_head, apply_head = _make_head(head)

    def init(key):
        cnn_key, head_key = jax.random.split(key)
        return {
            "cnn": cnn.init(cnn_key, jnp.zeros((1, *frame_shape))),
            HEAD: init_head(head_key),
        }

    def apply(params, frames, sequences):
        features = cnn.apply(params["cnn"], frames / 255.0 - 0.5)
        return jax.vmap(functools.partial(apply_head, params[HEAD]))(features[sequences])

    return init, apply


def _make_head(name: str) -> tuple[Callable, Callable]:
    """`init(key) -> params` and `apply(params, features [T, 50]) -> scores [T]`."""

    def make_lstm_head():
        core = make_lstm(_LSTM_UNITS)
        return lambda key: core.init(key, jnp.zeros((1, _FEATURES))), core.apply

    def make_ltc_head():
        wiring = auto_ncp(_LTC_UNITS, 1, inputs=_FEATURES, sparsity=_LTC_SPARSITY)
        init = functools.partial(init_ltc, wiring=wiring)
        return init, lambda params, features: ltc(params, wiring, features)[0][:, 0]

    heads = {"lstm": make_lstm_head, "ltc": make_ltc_head}
    check_option("lane_keeping", "head", name, heads)
    return heads[name]()


def _test_windows(num_train: int, num_frames: int, length: int) -> tuple[jax.Array, jax.Array]:
    """The frames that a test needs, and for each test frame the places in them of its sequence."""
    frames = jnp.arange(num_train - length + 1, num_frames)
    first = jnp.arange(num_frames - num_train)[:, None]
    return frames, first + jnp.arange(length)[None]


def _standard(angles: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation, 1 if all angles are equal."""
    std = jnp.std(angles)
    return jnp.mean(angles), jnp.where(std > 0, std, 1.0)


def _num_train(num_frames: int, test_fraction: float) -> int:
    num_test = round(num_frames * test_fraction)
    if not 0 < num_test < num_frames:
        raise ValueError(
            "split_by_time: expected a test_fraction that leaves frames to train and to test, got "
            f"{test_fraction} of {num_frames} frames."
        )
    return num_frames - num_test


def _check_options(
    num_train: int, num_frames: int, length: int, batch_size: int, channels: Sequence[int]
) -> None:
    if len(channels) != len(LANE_CHANNELS):
        raise ValueError(f"lane_keeping: expected five channels, got {len(channels)}.")
    if batch_size < 1:
        raise ValueError(f"lane_keeping: batch_size must be at least 1, got {batch_size}.")
    if not 1 <= length <= min(num_train, num_frames - num_train):
        raise ValueError(
            f"lane_keeping: expected sequence_length between 1 and the number of frames in either "
            f"part of the drive, {num_train} and {num_frames - num_train}; got {length}."
        )
