"""What the closed-form baselines see of a support, and how labels are renamed."""

import jax
import jax.numpy as jnp

from lohp_jax.types import Params, PyTree


def class_means(context: dict, num_classes: int) -> jax.Array:
    """`[num_classes, pixels]` mean support image of each label."""
    images = context["images"].reshape(len(context["images"]), -1)
    member = jax.nn.one_hot(context["labels"], num_classes, dtype=images.dtype)
    return (member.T @ images) / jnp.maximum(member.sum(axis=0), 1.0)[:, None]


def relabel(params: Params, class_axes: PyTree | None, order: jax.Array) -> Params:
    """Weights of the task whose label c was label `order[c]`: permutes every class axis.

    Args:
      params: weights.
      class_axes: of the family; None or -1 leaves a leaf alone.
      order: `[num_classes]` int32.
    """
    if class_axes is None:
        return params
    return jax.tree.map(
        lambda leaf, axis: jnp.take(leaf, order, axis=axis) if axis >= 0 else leaf,
        params,
        class_axes,
    )
