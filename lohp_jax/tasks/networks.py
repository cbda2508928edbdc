"""The small classifiers whose weights are learned or generated.

Each ends in a Haiku module named `head`, whose last axis counts the labels. That of "linear" starts
with zeros, so that no label is special. Those of the others start at random, four times as wide as
usual: training then changes the layers below about linearly in the task, and a solution is easier to
predict from it (measured on `digits_partitions`, ridge from the true partition with products of two
classes: .912 held out at four times the width, .898 at the usual one; the teacher gains as well).
"""

import difflib
from collections.abc import Callable
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from lohp_jax.types import Params, PyTree

HEAD = "head"
_WIDE = hk.initializers.VarianceScaling(16.0, "fan_in", "truncated_normal")


class Network(NamedTuple):
    """A pure classifier.

    Attributes:
      init: `(key) -> params`.
      apply: `(params, images [N, height, width, channels]) -> logits [N, num_classes]`.
      class_axes: see `TaskFamily.class_axes`.
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[[Params, jax.Array], jax.Array]
    class_axes: PyTree


def _linear(images: jax.Array) -> jax.Array:
    return hk.Flatten()(images)


def _mlp(images: jax.Array) -> jax.Array:
    return jax.nn.relu(hk.Linear(16)(hk.Flatten()(images)))


def _conv(images: jax.Array) -> jax.Array:
    x = jax.nn.relu(hk.Conv2D(8, 3)(images))
    x = hk.max_pool(x, (2, 2, 1), (2, 2, 1), "SAME")
    x = jax.nn.relu(hk.Conv2D(16, 3)(x))
    x = hk.max_pool(x, (2, 2, 1), (2, 2, 1), "SAME")
    return hk.Flatten()(x)


NETWORKS = {"linear": _linear, "mlp": _mlp, "conv": _conv}


def make_network(name: str, image_shape: tuple[int, ...], num_classes: int) -> Network:
    """Builds a classifier by name.

    Args:
      name: "linear"; "mlp", one hidden layer of 16 rectified units; or "conv", two 3x3 convolutions
        of 8 and 16 channels, each followed by 2x2 max pooling.
      image_shape: (height, width, channels).
      num_classes: number of logits.

    Raises: ValueError for an unknown name.
    """
    if name not in NETWORKS:
        nearest = difflib.get_close_matches(name, NETWORKS, 1, 0)
        raise ValueError(
            f"make_network: expected one of {sorted(NETWORKS)}, got {name!r}; "
            f"did you mean {nearest[0]!r}?"
        )

    def forward(images):
        head_init = jnp.zeros if name == "linear" else _WIDE
        return hk.Linear(num_classes, w_init=head_init, name=HEAD)(NETWORKS[name](images))

    transformed = hk.without_apply_rng(hk.transform(forward))

    def init(key):
        return transformed.init(key, jnp.zeros((1, *image_shape)))

    shapes = jax.eval_shape(init, jax.random.key(0))
    class_axes = hk.data_structures.map(
        lambda module, _, leaf: leaf.ndim - 1 if module == HEAD else -1, shapes
    )
    return Network(init, transformed.apply, class_axes)
