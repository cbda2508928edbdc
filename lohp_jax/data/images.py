"""Labelled image sets in the class-major form that task families gather from."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


class ImageSet(NamedTuple):
    """Images by class, in two pools that never meet.

    Attributes:
      train: `[classes, images_per_class, height, width, channels]` float32 in [0, 1]; teachers and
        supports draw from it.
      query: the same with its own number of images per class; only `evaluate` reads it.
      name: where the images come from.
    """

    train: np.ndarray
    query: np.ndarray
    name: str


def by_class(images: np.ndarray, labels: np.ndarray, num_per_class: int) -> np.ndarray:
    """The first `num_per_class` images of every class, in the order given.

    Args:
      images: `[N, height, width, channels]`.
      labels: `[N]` integers; the classes are the values that occur, in ascending order.
      num_per_class: how many to keep of each.

    Returns: `[classes, num_per_class, height, width, channels]`.

    Raises: ValueError, if a class has fewer images.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < num_per_class:
        scarce = classes[counts.argmin()]
        raise ValueError(
            f"by_class: expected at least {num_per_class} images of every class, "
            f"got {counts.min()} of class {scarce}; ask for fewer."
        )
    return np.stack([images[labels == c][:num_per_class] for c in classes])


def fit_square(image: "Image.Image", side: int | None) -> "Image.Image":
    """The central square of an image, resized by area average; the image itself for a side of None."""
    from PIL import Image, ImageOps  # here, for a light `import lohp_jax`

    return image if side is None else ImageOps.fit(image, (side, side), Image.Resampling.BOX)


def check_one_size(function: str, images: Sequence[np.ndarray]) -> None:
    """Raises: ValueError, if two images `[height, width, ...]` differ in height or width."""
    sizes = sorted({image.shape[:2] for image in images})
    if len(sizes) > 1:
        raise ValueError(
            f"{function}: expected images of one size, got heights and widths from {sizes[0]} to "
            f"{sizes[-1]}; resize them all, as image_size does."
        )
