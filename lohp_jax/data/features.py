"""Features of a frozen backbone, computed once and kept on disk by what they were computed from."""

import functools
import hashlib
import os
import pathlib
import shlex
import zipfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.files import damaged, writing_atomically
from lohp_jax.types import Params, PyTree

_AT_ONCE = 256


def cached_features(
    apply: Callable[[Params, jax.Array], jax.Array],
    params: Params,
    images: np.ndarray,
    directory: str | os.PathLike | None = None,
) -> np.ndarray:
    """Features of images, read from a file if they were computed before.

    A directory serves one backbone; in it, a file `features-DIGEST.npz` for each array of images, named
    after the digest of its content. It also holds the digest of the weights; `apply` itself cannot be
    digested, so give every architecture a directory of its own.

    Args:
      apply: `(params, images [N, ...]) -> features [N, F]`, pure.
      params: weights of the backbone.
      images: `[..., height, width, channels]` in [0, 1], or bytes, which are divided by 255.
      directory: where files are kept, and made; None keeps none.

    Returns: `[..., F]` float32.

    Raises: ValueError for a file with features of other weights, or a damaged one; nothing is deleted.
      OSError if the disk is full.
    """
    if directory is None:
        return _compute(apply, params, images)
    of_weights, of_images = digest(params), digest(images)
    path = pathlib.Path(directory) / f"features-{of_images[:16]}.npz"
    if path.exists():
        return _read(path, of_weights, of_images)
    features = _compute(apply, params, images)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing_atomically(path) as file:
        np.savez(file, features=features, weights=of_weights, images=of_images)
    return features


def digest(tree: PyTree) -> str:
    """The sha256 of all arrays of a pytree with their paths, types and shapes, in hexadecimal."""
    found = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)} {array.dtype.str} {array.shape}".encode())
        found.update(array.data)
    return found.hexdigest()


def _compute(apply: Callable, params: Params, images: np.ndarray) -> np.ndarray:
    flat = images.reshape(-1, *images.shape[-3:])
    starts = range(0, len(flat), _AT_ONCE)
    pieces = [np.asarray(_run(apply, params, flat[i : i + _AT_ONCE])) for i in starts]
    features = np.concatenate(pieces).astype(np.float32, copy=False)
    return features.reshape(*images.shape[:-3], *features.shape[1:])


@functools.partial(jax.jit, static_argnums=0)
def _run(apply: Callable, params: Params, batch: jax.Array) -> jax.Array:
    return apply(params, batch / 255.0 if batch.dtype == jnp.uint8 else batch)


def _read(path: pathlib.Path, of_weights: str, of_images: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as file:
            features = file["features"]
            weights, images = str(file["weights"]), str(file["images"])
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise damaged(path, error) from error
    if images != of_images:
        raise damaged(path, f"its images have the digest {images[:16]}")
    if weights != of_weights:
        raise ValueError(
            f"cached_features: {path} holds features of another backbone: its weights have the digest "
            f"{weights[:16]}, those given {of_weights[:16]}; give every backbone a directory of its "
            f"own, or make these anew after `rm {shlex.quote(str(path))}`. Nothing was deleted."
        )
    return features
