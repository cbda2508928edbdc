"""Readers: arrays in, arrays out; labelled images also by the name of their source."""

import os
from typing import Any

from lohp_jax.data.digits import digits
from lohp_jax.data.domains import DomainSet, domain_set, folder_domains, rotated_domains
from lohp_jax.data.features import cached_features
from lohp_jax.data.folders import folder_images
from lohp_jax.data.images import ImageSet
from lohp_jax.data.lane import Drive, read_drive, render_drive
from lohp_jax.data.omniglot import omniglot
from lohp_jax.data.text import TextSet, TextSplit, byte_tokens, tfds_text
from lohp_jax.data.tfds import tfds_images
from lohp_jax.data.volume import read_volume, resample_volume, synthetic_volume

__all__ = [
    "DomainSet",
    "Drive",
    "ImageSet",
    "TextSet",
    "TextSplit",
    "byte_tokens",
    "cached_features",
    "digits",
    "domain_set",
    "folder_domains",
    "folder_images",
    "image_set",
    "omniglot",
    "read_drive",
    "read_volume",
    "render_drive",
    "resample_volume",
    "rotated_domains",
    "synthetic_volume",
    "tfds_images",
    "tfds_text",
]

_TFDS = "tfds:"


def image_set(
    source: str, *, data_dir: str | os.PathLike | None = None, **options: Any
) -> ImageSet:
    """The image set that `source` names.

    Args:
      source: "digits", which needs no files, or "tfds:NAME", the TensorFlow Datasets set NAME, e.g.
        "tfds:mnist".
      data_dir: the folder of TensorFlow Datasets; without effect on "digits".
      **options: further arguments of `tfds_images`; "digits" has none.

    Returns: `ImageSet` whose `name` is `source`.

    Raises: ValueError, if `source` is neither, or for options of "digits"; for "tfds:NAME" also what
      `tfds_images` raises.
    """
    if source == "digits":
        if options:
            raise ValueError(
                f"image_set: expected no {', '.join(sorted(options))} with 'digits', which has images "
                "of 8 x 8 in pools of its own; leave it out, or take a 'tfds:NAME'."
            )
        return digits()
    if source.startswith(_TFDS):
        return tfds_images(source.removeprefix(_TFDS), data_dir=data_dir, **options)
    raise ValueError(f"image_set: expected source 'digits' or 'tfds:NAME', got {source!r}.")
