"""Trunks: token sequences in, token sequences out, under a condition.

Sequences come in rows, one per label: row c is the network as label c sees it, the shared layers
followed by its own slice of the head. All rows share their weights and exchange only means over the
rows, so that permuting the rows of the input permutes the rows of the output.
"""

import dataclasses
from collections.abc import Sequence

import haiku as hk
import jax
import jax.numpy as jnp


def convolve(x: jax.Array, width: int, name: str) -> jax.Array:
    """Convolution of kernel size 3 along axis -2, as one matrix product over three shifted copies.

    On a CPU its backward pass is faster than that of XLA's convolution.
    """
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(1, 1), (0, 0)])
    length = x.shape[-2]
    shifted = [padded[..., i : i + length, :] for i in range(3)]
    return hk.Linear(width, name=name)(jnp.concatenate(shifted, axis=-1))


@dataclasses.dataclass
class Block(hk.Module):
    """Residual block: normalise, convolve, exchange between rows, modulate, project."""

    width: int
    name: str | None = None

    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        """`[rows, length, channels]`, `[rows, E]` -> `[rows, length, width]`."""
        h = hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(x)
        h = convolve(h, self.width, "convolution")
        h += hk.Linear(self.width, name="rows")(h.mean(axis=0, keepdims=True))
        scale, shift = jnp.split(
            hk.Linear(2 * self.width, name="modulation")(condition), 2, axis=-1
        )
        h = jax.nn.silu(h * (1.0 + scale[:, None, :]) + shift[:, None, :])
        h = hk.Linear(self.width, name="projection")(h)
        skip = x if x.shape[-1] == self.width else hk.Linear(self.width, name="skip")(x)
        return skip + h


@dataclasses.dataclass
class UNet(hk.Module):
    """1-D U-Net over tokens (Ronneberger et al., 2015), as in Lo-Hp; the conditioning is ours.

    Attributes:
      widths: channels of each resolution; every further entry halves the length.
      channels: width of the output, whose layer starts at zero.
    """

    widths: Sequence[int]
    channels: int
    name: str | None = None

    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        """`[rows, length, C]` tokens, `[rows, E]` condition -> `[rows, length, channels]`."""
        rows, length, _ = x.shape
        stride = 2 ** (len(self.widths) - 1)
        # two tokens or more at the lowest resolution: with one, jaxlib 0.10 crashes on a CPU
        padded = max(length + -length % stride, 2 * stride)
        x = jnp.pad(x, [(0, 0), (0, padded - length), (0, 0)])
        position = hk.get_parameter(
            "position", (x.shape[1], self.widths[0]), init=hk.initializers.RandomNormal(0.5)
        )
        lifted = hk.Linear(x.shape[1] * self.widths[0], name="lift")(condition)
        h = hk.Linear(self.widths[0], name="tokens")(x) + position[None]
        h += lifted.reshape(rows, -1, self.widths[0])
        skips = []
        levels = list(enumerate(self.widths[:-1]))
        for level, width in levels:
            h = Block(width, name=f"down_{level}")(h, condition)
            skips.append(h)
            h = h.reshape(rows, h.shape[1] // 2, 2 * width)
        h = Block(self.widths[-1], name="middle")(h, condition)
        for level, width in reversed(levels):
            h = hk.Linear(2 * width, name=f"expand_{level}")(h).reshape(rows, -1, width)
            h = Block(width, name=f"up_{level}")(jnp.concatenate([h, skips.pop()], -1), condition)
        out = hk.Linear(self.channels, w_init=jnp.zeros, name="output")(jax.nn.silu(h))
        return out[:, :length]


@dataclasses.dataclass
class MLPTrunk(hk.Module):
    """Dense layers over a whole row, behind the interface of `UNet`; for a small number of weights."""

    widths: Sequence[int]
    channels: int
    name: str | None = None

    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        """`[rows, length, C]` tokens, `[rows, E]` condition -> `[rows, length, channels]`."""
        rows, length, _ = x.shape
        h = jnp.concatenate([x.reshape(rows, -1), condition], axis=-1)
        for width in self.widths:
            h = jax.nn.silu(hk.Linear(width)(h) + hk.Linear(width)(h.mean(axis=0, keepdims=True)))
        out = hk.Linear(length * self.channels, w_init=jnp.zeros, name="output")(h)
        return out.reshape(rows, length, self.channels)
