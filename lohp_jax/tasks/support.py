"""What can be seen of a support without a network: its faults, and an order of its labels.

The names of the labels mean nothing, but a network that starts at theta_0 tells them apart: a task
and the same task under other names have different solutions. Where weights are learned, stored or
compared, labels therefore go by their canonical order, which leaves one name for each task to learn.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.types import Params, PyTree, TaskFamily


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


def class_means(context: dict, num_classes: int) -> jax.Array:
    """`[num_classes, pixels]` mean support image of each label."""
    images = context["images"].reshape(len(context["images"]), -1)
    member = jax.nn.one_hot(context["labels"], num_classes, dtype=images.dtype)
    return (member.T @ images) / jnp.maximum(member.sum(axis=0), 1.0)[:, None]


def canonical_order(family: TaskFamily, context: dict) -> tuple[dict, jax.Array | None]:
    """Renames the labels of a context to an order that depends on their examples alone.

    Labels are sorted by a fixed random projection of their mean support image. A family without class
    axes keeps its contexts as they are.

    Returns: the context, and `[num_classes]` the new name of each label, for `relabel`.
    """
    if family.class_axes is None:
        return context, None
    means = class_means(context, family.num_classes)
    direction = jax.random.normal(jax.random.key(0), means.shape[1:])
    rank = jnp.argsort(jnp.argsort(means @ direction))
    return {**context, "labels": rank[context["labels"]]}, rank


def name_canonically(family: TaskFamily, data: PyTree, key: jax.Array) -> PyTree:
    """The same task with its labels in the canonical order of the support that `key` draws."""
    if family.rename is None:
        return data
    _, rank = canonical_order(family, family.context(data, key))
    return family.rename(data, rank)


def check_context(context: PyTree, *, num_classes: int, image_shape: tuple[int, ...]) -> None:
    """Refuses a context that a generator of image classifiers cannot use.

    Raises: ValueError that says what was expected, what came and what to do.
    """
    if not isinstance(context, dict) or not {"images", "labels"} <= context.keys():
        raise ValueError(
            "generate: expected a context {'images': ..., 'labels': ...}, got "
            f"{sorted(context) if isinstance(context, dict) else type(context).__name__}."
        )
    images, labels = np.asarray(context["images"]), np.asarray(context["labels"])
    if images.ndim != 4 or images.shape[1:] != image_shape:
        raise ValueError(
            f"generate: expected images of shape [n, {', '.join(map(str, image_shape))}], "
            f"got {list(images.shape)}."
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"generate: expected {len(images)} integer labels, got {labels.dtype}{list(labels.shape)}."
        )
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(
            f"generate: expected floating-point images in [0, 1], got {images.dtype}; "
            "divide by the largest value a pixel can have."
        )
    if not ((images >= 0) & (images <= 1)).all():  # NaN is neither
        raise ValueError(
            f"generate: expected images in [0, 1], got values from {images.min()} to {images.max()}; "
            "take out NaN, and divide by the largest value a pixel can have."
        )
    wanted, got = set(range(num_classes)), set(labels.tolist())
    if got != wanted:
        raise ValueError(
            f"generate: expected examples of every label 0..{num_classes - 1} and no other; "
            f"missing {sorted(wanted - got)}, unknown {sorted(got - wanted)}."
        )
