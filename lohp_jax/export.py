"""Weights as files that others read."""

import os
import pathlib

import jax
import numpy as np

from lohp_jax.files import write_atomically
from lohp_jax.types import Params


def write_weights(path: str | os.PathLike, weights: Params) -> None:
    """Writes weights as safetensors, one tensor per leaf, named by its path joined with dots.

    Args:
      path: of the file; its folder is made.
      weights: pytree of arrays.

    Raises: OSError if the disk is full; a file that was there is then intact.
    """
    import safetensors.numpy  # here, for a light `import lohp_jax`

    named = jax.tree.flatten_with_path(weights)[0]
    tensors = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.ascontiguousarray(leaf)
        for path, leaf in named
    }
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, safetensors.numpy.save(tensors))
