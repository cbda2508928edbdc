"""Compressing a volume into the weights of a small sine network (SIREN, Sitzmann et al., 2020)."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.data.volume import check_volume, synthetic_volume
from lohp_jax.tasks.splits import check_split
from lohp_jax.types import Params, TaskFamily
from lohp_jax.workloads.single import no_context

_HIDDEN_LAYERS = 6  # of the HUB paper's seven
_WIDEN = 2.2  # its "frequency rate", width of the first layer over that of the others
_RANGE = 100.0  # intensities are learned on a scale from 0 to this
_BYTES_PER_WEIGHT = 4
_CHUNK = 16384  # voxels at a time, where all are needed


def siren(
    volume: np.ndarray | None = None,
    *,
    size: int = 64,
    ratio: float = 256.0,
    hidden_layers: int = _HIDDEN_LAYERS,
    w0: float = 20.0,
    batch_size: int | None = 100_000,
) -> TaskFamily:
    """Learns intensity as a function of position, with fewer bytes of weights than the volume has.

    Defaults are of the HUB paper (A.1): seven layers, batches of 100,000 coordinates, a ratio of 256. It
    trains with `optax.adamax(optax.cosine_decay_schedule(1e-3, num_steps))`, on volumes of HiP-CT. The
    weights, float32, take at most 1 / `ratio` of the volume's bytes: 512 of them for 64³ voxels of 16
    bits at ratio 256, of which the widest network that fits, (3, 17, 8, 8, 8, 8, 8, 1), uses 509. The
    loss is the mean squared error of intensities that are scaled to [0, 100]; `evaluate` sees every
    voxel and also returns, in dB and over the unscaled intensities, `psnr_type`, whose peak is that of
    the type (65535), and `psnr_data`, whose peak is the volume's own range.

    Args:
      volume: `[X, Y, Z]` uint8 or uint16, see `read_volume`; then the family is this one task, in both
        splits. None: every task is a `synthetic_volume` of its own.
      size: of a synthetic volume.
      ratio: of compression.
      hidden_layers: sine layers, the first 2.2 times as wide as the others; a linear one follows.
      w0: frequency of the sines.
      batch_size: voxels per evaluation of the loss, drawn with its key and with replacement; None for
        all, whose memory grows with the volume.

    Raises: ValueError for another array, numbers out of range, or a ratio that leaves no weights.
    """
    _check_options(ratio, hidden_layers, w0, batch_size)
    volume = None if volume is None else _native_volume(volume)
    shape = (size,) * 3 if volume is None else volume.shape
    dtype = np.dtype(np.uint16) if volume is None else volume.dtype
    num_voxels = math.prod(shape)
    num_weights = int(num_voxels * dtype.itemsize / ratio / _BYTES_PER_WEIGHT)
    widths = siren_widths(num_weights, hidden_layers)

    def sample(key, split="train"):
        check_split(split)
        if volume is not None:
            return scale_volume(jnp.asarray(volume))
        return scale_volume(synthetic_volume(jax.random.fold_in(key, split == "train"), size))

    def loss(params, data, key):
        if batch_size is None:
            voxels = jnp.arange(num_voxels)
        else:
            voxels = jax.random.randint(key, (batch_size,), 0, num_voxels)
        target = data["intensity"].reshape(-1)[voxels]
        outputs = jax.vmap(lambda voxel: siren_apply(params, position(voxel, shape), w0=w0))(voxels)
        return jnp.mean((outputs - target) ** 2)

    def evaluate(params, data):
        error = jnp.mean((render(params, shape, w0=w0) - data["intensity"]) ** 2)
        return {"objective": error, "loss": error, **_psnr(error, data, dtype)}

    return TaskFamily(
        sample, lambda key: init_siren(key, widths, w0=w0), loss, evaluate, no_context, name="siren"
    )


def siren_widths(num_weights: int, hidden_layers: int = _HIDDEN_LAYERS) -> tuple[int, ...]:
    """Layer sizes (3, int(2.2 f), f, ..., f, 1) with the largest f whose weights fit.

    Args:
      num_weights: the most that there may be, biases included.
      hidden_layers: how many sine layers.

    Raises: ValueError, if not even f = 1 fits.
    """
    widths = None
    for width in range(1, num_weights + 1):
        wider = (3, int(width * _WIDEN), *[width] * (hidden_layers - 1), 1)
        if sum((m + 1) * n for m, n in itertools.pairwise(wider)) > num_weights:
            break
        widths = wider
    if widths is None:
        raise ValueError(
            f"siren_widths: no network with {hidden_layers} sine layers fits into {num_weights} "
            "weights; use a smaller ratio or a larger volume."
        )
    return widths


def init_siren(key: jax.Array, widths: tuple[int, ...], *, w0: float = 20.0) -> Params:
    """Random weights: U(-1/n, 1/n) of n inputs in the first layer, U(-√(6/n)/w0, √(6/n)/w0) then.

    Biases are U(-1/√n, 1/√n).

    Args:
      key: randomness.
      widths: from the input, 3, to the output, 1.
      w0: frequency of the sines.

    Returns: `{"linear_0": {"w": [3, n_1], "b": [n_1]}, "linear_1": ..., ...}`.
    """
    params = {}
    for i, (n, m) in enumerate(itertools.pairwise(widths)):
        w_key, b_key = jax.random.split(jax.random.fold_in(key, i))
        w_limit, b_limit = math.sqrt(6 / n) / w0 if i else 1 / n, 1 / math.sqrt(n)
        params[f"linear_{i}"] = {
            "w": jax.random.uniform(w_key, (n, m), jnp.float32, -w_limit, w_limit),
            "b": jax.random.uniform(b_key, (m,), jnp.float32, -b_limit, b_limit),
        }
    return params


def siren_apply(params: Params, coordinates: jax.Array, *, w0: float = 20.0) -> jax.Array:
    """Intensity, scalar on the scale [0, 100], at `coordinates` `[3]` in [-1, 1]: x <- sin(w0(Wx+b))."""
    x, last = coordinates, len(params) - 1
    for i in range(last + 1):
        x = x @ params[f"linear_{i}"]["w"] + params[f"linear_{i}"]["b"]
        x = x if i == last else jnp.sin(w0 * x)
    return x[0]


def render(params: Params, shape: tuple[int, ...], *, w0: float = 20.0) -> jax.Array:
    """The volume of a network, `shape`, on the scale [0, 100]; in chunks, to bound the memory."""

    def intensity(voxel):
        return siren_apply(params, position(voxel, shape), w0=w0)

    voxels = jnp.arange(math.prod(shape))
    return jax.lax.map(intensity, voxels, batch_size=_CHUNK).reshape(shape)


def position(voxel: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Coordinates `[3]` in [-1, 1] of the voxel with number `voxel`, in C order; corners at ±1."""
    index = jnp.stack(jnp.unravel_index(voxel, shape)).astype(jnp.float32)
    return 2.0 * index / (jnp.asarray(shape, jnp.float32) - 1.0) - 1.0


def scale_volume(volume: jax.Array) -> dict[str, jax.Array]:
    """The data of a task: `intensity`, from 0 to 100, and the `low` and `high` that it stands for."""
    volume = volume.astype(jnp.float32)
    low, high = jnp.min(volume), jnp.max(volume)
    return {"intensity": (volume - low) / (high - low) * _RANGE, "low": low, "high": high}


def _psnr(error: jax.Array, data: dict[str, jax.Array], dtype: np.dtype) -> dict[str, jax.Array]:
    """The mean squared `error` in dB below the peak of the type, and of the volume itself."""
    relative = error / _RANGE**2
    peak = jnp.iinfo(dtype).max / (data["high"] - data["low"])
    return {
        "psnr_type": 20.0 * jnp.log10(peak) - 10.0 * jnp.log10(relative),
        "psnr_data": -10.0 * jnp.log10(relative),
    }


def _native_volume(volume: np.ndarray) -> np.ndarray:
    """The volume in the byte order of this machine, once it is checked."""
    volume = np.asarray(volume)
    volume = volume.astype(volume.dtype.newbyteorder("="), copy=False)
    if volume.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"siren: expected a volume of uint8 or uint16, which has a known number of bytes, got "
            f"{volume.dtype}; use `resample_volume`."
        )
    check_volume("siren", volume)
    return volume


def _check_options(ratio: float, hidden_layers: int, w0: float, batch_size: int | None) -> None:
    for name, value in (("ratio", ratio), ("w0", w0)):
        if not 0 < value < math.inf:
            raise ValueError(f"siren: {name} must be positive and finite, got {value}.")
    for name, value in (("hidden_layers", hidden_layers), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"siren: {name} must be at least 1, got {value}.")
