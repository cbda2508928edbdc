"""Omniglot: 1,623 characters of 50 alphabets, each drawn by 20 people (Lake et al., 2015)."""

import functools
import os

import numpy as np

from lohp_jax.data.tfds import read_all

NAME = "omniglot"


def omniglot(*, data_dir: str | os.PathLike | None = None, image_size: int = 28) -> np.ndarray:
    """All characters of Omniglot, as a set of TFDS that was prepared beforehand; downloads nothing.

    The splits of TFDS, "train" and "test", are the background and evaluation sets of its authors, 964
    and 659 characters. Few-shot learning cuts all of them anew, see `split_characters`. Reading takes
    half a minute; it is done once in a process.

    Args:
      data_dir: the folder of TFDS; by default `$TFDS_DATA_DIR`, or else `~/tensorflow_datasets`.
      image_size: the side in pixels to which images of 105 x 105 are resized, by area average.

    Returns: `[1623, 20, image_size, image_size, 1]` uint8, characters in the order of their labels in
      TFDS; ink is 255, paper 0. Not to be written to.

    Raises: FileNotFoundError, if the set is not prepared, with the command that does it; ValueError for
      an `image_size` that is not positive.
    """
    if image_size < 1:
        raise ValueError(f"omniglot: image_size must be at least 1, got {image_size}.")
    return _read(None if data_dir is None else os.fspath(data_dir), image_size)


@functools.lru_cache(maxsize=2)
def _read(data_dir: str | None, image_size: int) -> np.ndarray:
    images, labels = read_all(NAME, ("train", "test"), data_dir, image_size, mode="L")
    count = len(np.unique(labels))
    order = np.argsort(labels, kind="stable")
    characters = 255 - np.stack(images)[order].reshape(count, -1, image_size, image_size, 1)
    characters.flags.writeable = False
    return characters
