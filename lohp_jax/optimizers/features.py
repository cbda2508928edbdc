"""What learned optimizers see of one tensor: accumulators over time and features of every parameter.

Shared by VeLO (Metz et al., 2022, arXiv 2211.09760) and its relatives. Arrays here belong to one tensor
of shape S; a scalar counts as a tensor of one entry. The features are lists of channels, each of a
shape that broadcasts to S, so that no array of all parameters times all channels is ever formed: XLA
fuses the channels into the sums that the first layer takes of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

DECAYS = (0.9, 0.99, 0.999)
"""Of the momenta and of the factored second moments."""
NUM_CHANNELS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
"""Channels of each group of features, 30 in all."""
_LARGEST_GRADIENT = 1000.0
_FLOOR = 1e-9


class Accumulators(NamedTuple):
    """Running means of one tensor, without bias correction; the last axis is that of the decays.

    Attributes:
      momentum: `S + (3,)`, of the gradient.
      rms: `S + (1,)`, of its square.
      row: second moment without the largest axis, last axis 3; for vectors and scalars `S + (3,)`.
      col: without the second largest axis; empty for vectors and scalars.
    """

    momentum: jax.Array
    rms: jax.Array
    row: jax.Array
    col: jax.Array


def clip_gradient(gradient: jax.Array) -> jax.Array:
    """Every entry clipped to [-1000, 1000]; NaN passes."""
    return jnp.clip(gradient, -_LARGEST_GRADIENT, _LARGEST_GRADIENT)


def factored_axes(shape: Sequence[int]) -> tuple[int, int] | None:
    """Largest and second largest axis (of equal ones the later is larger); None below two axes."""
    if len(shape) < 2:
        return None
    second, largest = np.argsort(shape, kind="stable")[-2:]
    return int(largest), int(second)


def init_accumulators(param: jax.Array) -> Accumulators:
    """Zeros for a tensor."""
    shape, axes = param.shape, factored_axes(param.shape)
    count = len(DECAYS)
    row, col = (*shape, count), (0, count)
    if axes:
        row, col = ((*(n for i, n in enumerate(shape) if i != axis), count) for axis in axes)
    shapes = (*shape, count), (*shape, 1), row, col
    return Accumulators(*(jnp.zeros(s, jnp.float32) for s in shapes))


def update_accumulators(
    old: Accumulators, gradient: jax.Array, *, rms_decay: float = 0.999
) -> Accumulators:
    """One step with a clipped gradient."""

    def moved(mean, value, decays=DECAYS):
        decay = jnp.expand_dims(jnp.float32(decays), tuple(range(value.ndim)))
        return decay * mean + (1 - decay) * value[..., None]

    square, axes = gradient**2, factored_axes(gradient.shape)
    momentum, rms = moved(old.momentum, gradient), moved(old.rms, square, (rms_decay,))
    if not axes:
        return Accumulators(momentum, rms, moved(old.row, square + 1e-30), old.col)
    row, col = (
        moved(mean, jnp.mean(square + 1e-30, axis))
        for mean, axis in zip(old[2:], axes, strict=True)
    )
    return Accumulators(momentum, rms, row, col)


def channels(
    accumulators: Accumulators, gradient: jax.Array, param: jax.Array, *, rms_floor: float
) -> list[list[jax.Array]]:
    """The 14 groups of features, each a list of channels that broadcast to S, not yet normalised.

    Args:
      accumulators: after this step's update.
      gradient: `S`, clipped.
      param: `S`.
      rms_floor: added to the running mean square under the root.
    """
    momentum, rms = _split(accumulators.momentum), accumulators.rms[..., 0]
    scale = jax.lax.rsqrt(rms + rms_floor)
    axes = factored_axes(param.shape)
    if axes:
        row, col = (
            _split(jnp.expand_dims(x, axis)) for x, axis in zip(accumulators[2:], axes, strict=True)
        )
        second = axes[1]  # row keeps it, now beside the reduced axis
        row_scale = [_rsqrt(r / (r.mean(second, keepdims=True) + _FLOOR)) for r in row]
        factors = [r * _rsqrt(c) for r, c in zip(row_scale, col, strict=True)]
        momentum_factors = factors
    else:
        row = col = _split(accumulators.row)
        factors = [_rsqrt(d + _FLOOR) for d in row]
        momentum_factors = [jax.lax.rsqrt(d) for d in row]
    return [
        [gradient],
        [jnp.clip(gradient, -0.1, 0.1)],
        [param],
        momentum,
        [rms],
        [m * scale for m in momentum],
        [scale],
        [gradient * f for f in factors],
        [gradient * scale],
        row,
        col,
        [jax.lax.rsqrt(r + 1e-8) for r in row],
        [jax.lax.rsqrt(c + 1e-8) for c in col],
        [m * f for m, f in zip(momentum, momentum_factors, strict=True)],
    ]


def perceptron(
    groups: list[list[jax.Array]],
    weights: dict[str, jax.Array],
    *,
    normalise_over: tuple[int, ...] | None,
    normalise_floor: float,
) -> list[jax.Array]:
    """Two hidden rectified layers over the normalised channels of every parameter.

    Args:
      groups: of `channels`.
      weights: `w0__k` `[n_k, hidden]` for group k, `b0`, `w1`, `b1`, `w2`, `b2`.
      normalise_over: axes whose mean square becomes 1; None for all of S.
      normalise_floor: added to the mean square.

    Returns: the outputs, each of a shape that broadcasts to S.
    """
    hidden = list(weights["b0"])
    for k, group in enumerate(groups):
        for channel, row in zip(group, weights[f"w0__{k}"], strict=True):
            size = jnp.mean(channel**2, normalise_over, keepdims=True)
            normal = channel * jax.lax.rsqrt(normalise_floor + size)
            hidden = [h + normal * w for h, w in zip(hidden, row, strict=True)]
    for layer in ("1", "2"):
        rectified = [jax.nn.relu(h) for h in hidden]
        hidden = [
            sum((h * w for h, w in zip(rectified, column, strict=True)), start=bias)
            for column, bias in zip(weights[f"w{layer}"].T, weights[f"b{layer}"], strict=True)
        ]
    return hidden


def _split(array: jax.Array) -> list[jax.Array]:
    """The channels of the last axis."""
    return [array[..., i] for i in range(array.shape[-1])]


def _rsqrt(x: jax.Array) -> jax.Array:
    return jax.lax.rsqrt(jnp.maximum(x, _FLOOR))
