"""Transfer: heads over frozen features, of one image set for training and of others to be tested on."""

import os
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.data.images import ImageSet
from lohp_jax.tasks.backbone import Backbone
from lohp_jax.tasks.images import Tasks, TeacherData, image_family
from lohp_jax.tasks.n_way import all_tasks
from lohp_jax.types import TaskFamily


class AnyOf(NamedTuple):
    """Tasks of several collections, each of which is equally likely, however many it has."""

    collections: tuple[Tasks, ...]

    @property
    def num_labels(self) -> int:
        """Labels of a task."""
        return self.collections[0].num_labels

    def draw(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The classes `[M]` of a task and their labels `[M]`."""
        which_key, draw_key = jax.random.split(key)
        which = jax.random.randint(which_key, (), 0, len(self.collections))
        drawn = [tasks.draw(draw_key) for tasks in self.collections]
        return jax.tree.map(lambda *parts: jnp.stack(parts)[which], *drawn)


def transfer_family(
    source: ImageSet,
    targets: Sequence[ImageSet],
    backbone: Backbone,
    *,
    way: int = 5,
    shots: int = 10,
    network: Literal["linear", "mlp"] = "linear",
    fit: bool = False,
    cache: str | os.PathLike | None = None,
    teacher_data: TeacherData = "full",
    batch_size: int | None = None,
    name: str = "transfer",
) -> TaskFamily:
    """Heads over the features of a frozen backbone: trained on one image set, tested on others.

    A training task is `way` random classes of the source, a held-out task `way` random classes of one
    of the targets, of which training sees nothing. Labels are in a random order. Of every class as many
    images take part as the set with the fewest has, the first of them.

    Args:
      source: the image set of the training tasks.
      targets: image sets of the held-out tasks, each as likely as the others.
      backbone: e.g. of `train_backbone` on the source.
      way: classes of a task.
      shots: support images per label.
      network: of the head, for `make_network`.
      fit: whether images of another size, or number of channels, are resized as `fit_images` does.
      cache: directory for the features, see `cached_features`.
      teacher_data: as of `image_family`.
      batch_size: as of `image_family`.
      name: of the family.

    Raises: ValueError for no targets, a target that is the source, too few classes, or images of
      another shape than the backbone's; what `image_family` and `cached_features` raise.
    """
    check_sets(source, targets, way)
    sets = (source, *targets)
    pools = [_features(images, backbone, fit, cache) for images in sets]
    least = [min(pool[i].shape[1] for pool in pools) for i in (0, 1)]
    train, query = (np.concatenate([pool[i][:, : least[i]] for pool in pools]) for i in (0, 1))
    ends = np.cumsum([len(images.train) for images in sets])
    tasks = [
        all_tasks(range(end - len(images.train), end), way=way)
        for images, end in zip(sets, ends.tolist(), strict=True)
    ]
    return image_family(
        name,
        ImageSet(train, query, f"features of {', '.join(images.name for images in sets)}"),
        {"train": tasks[0], "held_out": AnyOf(tuple(tasks[1:]))},
        network=network,
        shots=shots,
        teacher_data=teacher_data,
        batch_size=batch_size,
    )


def fit_images(images: np.ndarray, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Images `[..., height, width, channels]` brought to another shape.

    Sides by linear interpolation, antialiased where they shrink; one channel is repeated, several are
    averaged to one.

    Raises: ValueError where neither channels are one, nor both the same number.
    """
    height, width, channels = image_shape
    have = images.shape[-1]
    if have != channels and 1 not in (have, channels):
        raise ValueError(
            f"fit_images: expected images of 1 or {channels} channels, got {have}; convert them."
        )
    if have > channels:
        images = images.mean(axis=-1, keepdims=True)
    shape = (*images.shape[:-3], height, width, images.shape[-1])
    if shape != images.shape:
        images = np.asarray(jax.image.resize(jnp.asarray(images), shape, "linear"))
    return np.repeat(images, channels, axis=-1) if have < channels else images


def _features(
    images: ImageSet, backbone: Backbone, fit: bool, cache: str | os.PathLike | None
) -> tuple[np.ndarray, np.ndarray]:
    """Features of both pools."""
    if not fit and images.train.shape[2:] != backbone.image_shape:
        raise ValueError(
            f"transfer_family: expected images of shape {backbone.image_shape}, as of the backbone, got "
            f"{images.train.shape[2:]} of {images.name!r}; read them with "
            f"image_size={backbone.image_shape[0]}, or give fit=True."
        )
    pools = (images.train, images.query)
    if fit:
        pools = [fit_images(pool, backbone.image_shape) for pool in pools]
    return tuple(backbone.features(pool, cache) for pool in pools)


def check_sets(source: ImageSet, targets: Sequence[ImageSet], way: int) -> None:
    """Raises: ValueError for no targets, a target that is the source, or too few classes."""
    if not targets:
        raise ValueError("transfer_family: expected one target or more, got none.")
    for target in targets:
        if target.name == source.name:
            raise ValueError(
                "transfer_family: expected targets other than the source, got "
                f"{target.name!r} for both; held-out tasks would be those of training."
            )
    for images in (source, *targets):
        if len(images.train) <= way:
            raise ValueError(
                f"transfer_family: expected more than way={way} classes, got {len(images.train)} in "
                f"{images.name!r}; ask for a smaller way, or take another image set."
            )
