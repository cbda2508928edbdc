"""Images in a folder or a zip archive of the user's."""

import contextlib
import io
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lohp_jax.data.images import ImageSet, by_class, check_one_size, fit_square

if TYPE_CHECKING:
    from PIL import Image

_SUFFIXES = (".jpg", ".jpeg", ".png")


def folder_images(
    path: str | os.PathLike,
    *,
    domain: str | None = None,
    train_per_class: int = 60,
    query_per_class: int = 20,
    image_size: int | None = None,
) -> ImageSet:
    """A labelled image set from files `[...]/DOMAIN/CLASS/NAME`, e.g. those of PACS.

    The folder of a file names its class, the folder above it its domain, where there are domains;
    classes are numbered by name. Both pools are a fixed random choice of the files; only they are
    decoded. The defaults suit the smallest class of PACS, the 80 houses among the sketches.

    Args:
      path: a folder, or a zip archive, of JPEG or PNG files.
      domain: take the files of this domain alone; None for all.
      train_per_class: images per class in the training pool.
      query_per_class: images per class in the query pool.
      image_size: the side in pixels to which every image is cut (to its central square) and
        resized (by area average); None leaves the images as they are.

    Returns: `ImageSet` with three channels, called "FOLDER" or "FOLDER/DOMAIN".

    Raises:
      FileNotFoundError: `path` is neither a folder nor a zip archive.
      ValueError: there are no such files, fewer than two classes, too few images of a class, images
        of several sizes or one that cannot be read; or a number is not positive.
    """
    if min(train_per_class, query_per_class, 1 if image_size is None else image_size) < 1:
        raise ValueError(
            "folder_images: expected positive train_per_class, query_per_class and image_size, "
            f"got {train_per_class}, {query_per_class} and {image_size}."
        )
    names = _in_domain(list_images(path), domain)
    classes = [name.split("/")[-2] for name in names]
    if len(set(classes)) < 2:
        raise ValueError(
            f"folder_images: expected a folder for each of two or more classes in {path}, got "
            f"{sorted(set(classes))}."
        )
    order = np.random.default_rng(0).permutation(len(names))
    chosen = by_class(order, np.array(classes)[order], train_per_class + query_per_class)

    chosen_names = [names[i] for i in chosen.ravel()]
    pixels = read_images(path, chosen_names, lambda image: fit_square(image, image_size))
    pool = (pixels / np.float32(255)).reshape(*chosen.shape, *pixels.shape[1:])
    name = "/".join(part for part in (pathlib.Path(path).stem, domain) if part)
    return ImageSet(pool[:, :train_per_class], pool[:, train_per_class:], name)


def list_images(path: str | os.PathLike) -> list[str]:
    """Relative paths of the JPEG and PNG files in a folder or zip archive, hidden ones left out.

    Returns: paths with "/", in natural order: `frame_2.jpg` comes before `frame_10.jpg`.

    Raises:
      FileNotFoundError: `path` is neither a folder nor a zip archive.
      ValueError: there are no such files.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    elif path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    else:
        found = "another kind of file" if path.exists() else "nothing"
        raise FileNotFoundError(
            f"list_images: expected a folder or a zip archive of images at {path}, found {found}."
        )
    names = [n for n in names if n.lower().endswith(_SUFFIXES) and not _is_hidden(n)]
    if not names:
        raise ValueError(f"list_images: expected {', '.join(_SUFFIXES)} files in {path}, got none.")
    return sorted(names, key=_natural)


def read_images(
    path: str | os.PathLike,
    names: Sequence[str],
    prepare: Callable[["Image.Image"], "Image.Image"],
) -> np.ndarray:
    """Decodes images of a folder or zip archive.

    Args:
      path: as for `list_images`.
      names: one or more of what `list_images` returns.
      prepare: what to do with each RGB image, e.g. resize it.

    Returns: `[N, height, width, 3]` uint8.

    Raises: ValueError, if a file cannot be decoded, or two images differ in size.
    """
    path = pathlib.Path(path).expanduser()
    with contextlib.ExitStack() as stack:
        archive = None if path.is_dir() else stack.enter_context(zipfile.ZipFile(path))
        read = archive.read if archive else lambda name: (path / name).read_bytes()
        images = [_decode(name, read, prepare) for name in names]
    check_one_size("read_images", images)
    return np.stack(images)


def _decode(name: str, read: Callable[[str], bytes], prepare: Callable) -> np.ndarray:
    from PIL import Image  # here, for a light `import lohp_jax`

    try:
        with Image.open(io.BytesIO(read(name))) as file:
            return np.asarray(prepare(_to_rgb(file)))
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"read_images: expected an image, but {name} cannot be read; replace it or take it out "
            f"({error})."
        ) from error


def _to_rgb(file: "Image.Image") -> "Image.Image":
    """The image the right way up, 16 bits brought to 8 rather than cut off at 255."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):
        image = Image.fromarray(np.rint(np.asarray(image, np.float64) / 257).astype(np.uint8))
    return image.convert("RGB")


def _in_domain(names: list[str], domain: str | None) -> list[str]:
    """The names `CLASS/NAME` or, of that domain alone, `DOMAIN/CLASS/NAME`, at any depth."""
    depth = 2 if domain is None else 3
    deep = [name for name in names if len(name.split("/")) >= depth]
    if not deep:
        layout = "CLASS/NAME" if domain is None else "DOMAIN/CLASS/NAME"
        raise ValueError(f"folder_images: expected files {layout}, got e.g. {names[0]}.")
    if domain is None:
        return deep
    domains = sorted({name.split("/")[-3] for name in deep})
    if domain not in domains:
        raise ValueError(f"folder_images: expected domain to be one of {domains}, got {domain!r}.")
    return [name for name in deep if name.split("/")[-3] == domain]


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def _natural(name: str) -> list[str | int]:
    """Sort key that compares runs of digits as numbers."""
    return [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)]
