"""What a generator knows of a task: a set encoder over the examples of its context."""

import dataclasses
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from lohp_jax.networks.classifiers import conv_2d
from lohp_jax.types import Encoder

_MOST_PIXELS = 144
"""Images of more pixels than this (12 x 12) pass a convolutional stem that brings them below it."""


class Reading(NamedTuple):
    """A context as the encoder takes it.

    Attributes:
      images: `[n, height, width, channels]` images of the examples, or None.
      features: `[n, F]` all other numbers of the examples.
      member: `[n, rows]` which row an example belongs to, one-hot; one row where there are no labels.
      task: `[G]` numbers that describe the task as a whole.
    """

    images: jax.Array | None
    features: jax.Array
    member: jax.Array
    task: jax.Array


@dataclasses.dataclass
class SetEncoder(hk.Module):
    """Examples -> one embedding per label, or one for the task.

    Every example is assigned, softly, to learned codes; a label is described by the histogram of the
    codes of its examples and by their mean, beside those of all labels together. So permuting the
    labels permutes the rows of the result, and the order of the examples does not matter (Zaheer et
    al., 2017, Deep Sets).

    Attributes:
      width: size of an embedding, and number of codes.
    """

    width: int
    name: str | None = None

    def __call__(self, reading: Reading) -> jax.Array:
        """A `Reading` -> `[rows, width]`; a row without examples gets that of an empty set."""
        rows = reading.member.shape[1]
        parts = []
        if reading.features.shape[1] or reading.images is not None:
            parts += self._describe_set(_features(reading), reading.member)
        if reading.task.size:
            parts.append(jnp.broadcast_to(reading.task, (rows, reading.task.size)))
        seen = jnp.concatenate(parts, axis=-1)
        return hk.nets.MLP([2 * self.width, self.width], name="label")(seen)

    def _describe_set(self, features: jax.Array, member: jax.Array) -> list[jax.Array]:
        hidden = hk.nets.MLP([2 * self.width] * 2, activate_final=True, name="example")(features)
        codes = jax.nn.softmax(4.0 * hk.Linear(self.width, name="codes")(hidden), axis=-1)
        codes *= self.width  # 1 where all codes share an example evenly
        share = member.T / jnp.maximum(member.sum(axis=0), 1.0)[:, None]
        if member.shape[1] == 1:  # nothing to set it off against; its size says something
            return [share @ x for x in (codes, features)] + [_normalise(share @ codes)]
        return [x for values in (codes, features) for x in _contrast(share @ values)]


def set_encoder(read, width: int) -> Encoder:
    """A `SetEncoder` behind `read: context -> Reading`, as a pair of pure functions."""
    transformed = hk.without_apply_rng(
        hk.transform(lambda context: SetEncoder(width, name="set")(read(context)))
    )
    return Encoder(transformed.init, transformed.apply)


def _features(reading: Reading) -> jax.Array:
    if reading.images is None:
        return reading.features
    return jnp.concatenate([hk.Flatten()(_stem(reading.images)), reading.features], axis=-1)


def _stem(images: jax.Array) -> jax.Array:
    """Convolutions of stride two until an image has few enough positions; small ones stay pixels."""
    width = 16
    while images.shape[1] * images.shape[2] > _MOST_PIXELS:
        images = jax.nn.silu(conv_2d(images, width, 3, stride=2, name="stem"))
        width *= 2
    return images


def _contrast(means: jax.Array) -> list[jax.Array]:
    """`[labels, C]` -> the same, its difference from the mean over labels, and that mean.

    Each is normalised: tasks that differ by few examples differ little before.
    """
    everything = jnp.broadcast_to(means.mean(axis=0, keepdims=True), means.shape)
    return [_normalise(x) for x in (means, means - everything, everything)]


def _normalise(x: jax.Array) -> jax.Array:
    return hk.LayerNorm(axis=-1, create_scale=False, create_offset=False)(x)
