"""Labelled images of the same classes in several domains, e.g. turned by several angles."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lohp_jax.data.digits import digits
from lohp_jax.data.folders import folder_images, list_images
from lohp_jax.data.images import ImageSet, check_one_size
from lohp_jax.data.tfds import tfds_images

ANGLES = (0, 15, 30, 45, 60, 75)
"""Degrees: the domains of Rotated MNIST (Ghifary et al., 2015), as DomainBed has them."""
_FOLDER, _TFDS = "folder:", "tfds:"


class DomainSet(NamedTuple):
    """Images by domain and class, in two pools that never meet; domains share no image.

    Attributes:
      train: `[domains, classes, images, height, width, channels]` float32 in [0, 1]; teachers and
        supports draw from it.
      query: the same with its own number of images per domain and class; only `evaluate` reads it.
      domains: names of the domains.
      name: where the images come from.
    """

    train: np.ndarray
    query: np.ndarray
    domains: tuple[str, ...]
    name: str


def domain_set(
    source: str, *, data_dir: str | os.PathLike | None = None, **options: Any
) -> DomainSet:
    """The images in several domains that `source` names.

    Args:
      source: "digits", the shipped digits turned by `ANGLES`; "tfds:NAME", an image set of TensorFlow
        Datasets turned likewise, e.g. "tfds:mnist" for Rotated MNIST; or "folder:PATH", a folder or zip
        archive for `folder_domains`, e.g. that of PACS.
      data_dir: the folder of TensorFlow Datasets; without effect on the other two.
      **options: further arguments of `tfds_images` or `folder_domains`; "digits" has none.

    Raises: ValueError, if `source` is none of these; also what `rotated_domains`, `folder_domains` and
      `tfds_images` raise.
    """
    if source == "digits":
        return rotated_domains(digits(**options))
    if source.startswith(_TFDS):
        name = source.removeprefix(_TFDS)
        return rotated_domains(tfds_images(name, data_dir=data_dir, **options))
    if source.startswith(_FOLDER):
        return folder_domains(source.removeprefix(_FOLDER), **options)
    raise ValueError(
        f"domain_set: expected source 'digits', 'tfds:NAME' or 'folder:PATH', got {source!r}."
    )


def rotated_domains(images: ImageSet, angles: Sequence[float] = ANGLES) -> DomainSet:
    """A domain for each angle, whose images are turned by it counterclockwise.

    The images of a class are dealt to the angles in equal parts, so that no two domains show the same
    image (Gulrajani & Lopez-Paz, 2021, do so with all of MNIST; here each pool is dealt on its own).
    Turned images keep their size: values between pixels are linear, what comes in from outside is 0.

    Args:
      images: square, in [0, 1].
      angles: in degrees, two or more, all different.

    Returns: `DomainSet` whose domains are called by their angles, e.g. "15".

    Raises: ValueError for images that are not square, fewer than two angles or equal ones, or a pool
      with fewer images of a class than there are angles.
    """
    from scipy import ndimage  # here, for a light `import lohp_jax`

    names = tuple(f"{angle:g}" for angle in angles)
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"rotated_domains: expected two or more different angles, got {names}.")
    height, width = images.train.shape[2:4]
    if height != width:
        raise ValueError(
            f"rotated_domains: expected square images, got {height} x {width}; cut them to squares, as "
            "image_size does."
        )
    pools = []
    for pool, kind in ((images.train, "training"), (images.query, "query")):
        share = pool.shape[1] // len(angles)
        if not share:
            raise ValueError(
                f"rotated_domains: expected at least {len(angles)} {kind} images of each class, one for "
                f"each angle, got {pool.shape[1]}; ask for more images or fewer angles."
            )
        parts = [pool[:, i * share : (i + 1) * share] for i in range(len(angles))]
        turned = [
            ndimage.rotate(part, angle, axes=(2, 3), reshape=False, order=1)
            for part, angle in zip(parts, angles, strict=True)
        ]
        pools.append(np.stack(turned))
    return DomainSet(*pools, names, f"rotated {images.name}")


def folder_domains(
    path: str | os.PathLike,
    *,
    train_per_class: int = 60,
    query_per_class: int = 20,
    image_size: int | None = None,
) -> DomainSet:
    """All domains of images in files `[...]/DOMAIN/CLASS/NAME`, e.g. those of PACS.

    Args:
      path: as of `folder_images`, as are the other arguments.
      train_per_class: images per domain and class in the training pool.
      query_per_class: images per domain and class in the query pool.
      image_size: side to which every image is brought; None leaves the images as they are.

    Returns: `DomainSet` with three channels and domains in the order of their names.

    Raises: what `folder_images` raises; ValueError also for fewer than two domains, classes that are not
      the same in all of them, too few images of a class in a domain, or images of several sizes.
    """
    classes: dict[str, set[str]] = {}
    for file in list_images(path):
        places = file.split("/")[-3:-1]
        if len(places) == 2:
            classes.setdefault(places[0], set()).add(places[1])
    if len(classes) < 2:
        raise ValueError(
            f"folder_domains: expected files DOMAIN/CLASS/NAME of two or more domains in {path}, got "
            f"domains {sorted(classes)}."
        )
    every = set().union(*classes.values())
    for domain in sorted(classes):
        if missing := sorted(every - classes[domain]):
            raise ValueError(
                f"folder_domains: expected the same classes in every domain, got none of {missing} in "
                f"{domain!r}; add them there, or take them out of the others."
            )
    sizes = {
        "train_per_class": train_per_class,
        "query_per_class": query_per_class,
        "image_size": image_size,
    }
    sets = [_of_domain(path, domain, sizes) for domain in sorted(classes)]
    check_one_size("folder_domains", [one.train[0, 0] for one in sets])
    pools = (np.stack([getattr(one, pool) for one in sets]) for pool in ("train", "query"))
    return DomainSet(*pools, tuple(sorted(classes)), sets[0].name.rpartition("/")[0])


def _of_domain(path: str | os.PathLike, domain: str, sizes: dict[str, Any]) -> ImageSet:
    try:
        return folder_images(path, domain=domain, **sizes)
    except ValueError as error:
        raise ValueError(f"folder_domains: domain {domain!r}: {error}") from error
