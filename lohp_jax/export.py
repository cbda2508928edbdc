"""Weights as files that others read."""

import json
import os
import pathlib
from collections.abc import Iterator
from typing import IO, Any

import jax
import numpy as np

from lohp_jax.files import write_atomically, writing_atomically
from lohp_jax.types import Generator, Params, PyTree

_MAPPED_BYTES = 2**24
_TYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}


def write_weights(path: str | os.PathLike, weights: Params) -> None:
    """Writes weights as safetensors, one tensor per leaf, named by its path joined with dots.

    Args:
      path: of the file; its folder is made.
      weights: pytree of arrays.

    Raises: OSError if the disk is full; a file that was there is then intact.
    """
    import safetensors.numpy  # here, for a light `import lohp_jax`

    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in _named(weights)}
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, safetensors.numpy.save(tensors))


def stream_weights(
    generator: Generator,
    context: PyTree,
    key: jax.Array,
    path: str | os.PathLike,
    *,
    temperature: float = 0.0,
    num_steps: int | None = None,
    guidance: float = 0.0,
) -> None:
    """Generates the weights of one network into a safetensors file, window by window.

    The file is what `write_weights` makes of the one sample of `generate`, but memory holds a batch of
    windows, not the network. safetensors itself writes tensors whole; its format is a header and then
    raw numbers, so that they can be put where they belong.

    Args:
      generator: of a method with `NetworkConfig.window`.
      context: as of `generate`.
      key: as of `generate`.
      path: of the file; its folder is made.
      temperature: as of `generate`.
      num_steps: as of `generate`.
      guidance: as of `generate`.

    Raises: ValueError for a generator that makes networks whole, and as `generate` does; OSError if the
      disk is full; a file that was there is then intact.
    """
    if generator.pieces is None:
        raise ValueError(
            "stream_weights: expected a generator that walks window by window, got one that makes "
            "networks whole, or sees them whole at every step; train one with NetworkConfig(window=...) "
            "and without feedback, or use generate and write_weights."
        )
    options = {"temperature": temperature, "num_steps": num_steps, "guidance": guidance}
    one = jax.random.split(key, 1)[0]  # of the first sample
    pieces = generator.pieces.make(generator.params, context, one, **options)
    header, places, size = _lay_out_file(generator.pieces.like)
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing_atomically(path) as file:
        file.write(header)
        file.flush()
        _reserve(file, size)
        _put(pieces, pathlib.Path(file.name), places)


def _reserve(file: IO[bytes], size: int) -> None:
    """Makes a file as large as it will be, so that a full disk is met here and not in a mapped page."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)


def _put(
    pieces: Iterator[tuple[int, Any, np.ndarray]],
    path: pathlib.Path,
    places: list[tuple[int, int, np.dtype]],
) -> None:
    """Puts pieces of leaves into a file at `places`: first byte, numbers and type of each leaf."""
    mapped, written = None, 0
    for number, index, values in pieces:
        if mapped is None:
            mapped = np.memmap(path, np.uint8, "r+")
        first, count, dtype = places[number]
        mapped[first : first + count * dtype.itemsize].view(dtype)[index] = values
        written += values.nbytes
        if written >= _MAPPED_BYTES:  # let go of: what was written need not stay in memory
            mapped, written = None, 0


def _lay_out_file(like: PyTree) -> tuple[bytes, list[tuple[int, int, np.dtype]], int]:
    """Header of a safetensors file, the place of each leaf in the file, and its size in bytes."""
    named = list(_named(like))
    order = sorted(range(len(named)), key=lambda i: -named[i][1].dtype.itemsize)  # keeps alignment
    entries, offsets, end = {}, [0] * len(named), 0
    for i in order:
        name, leaf = named[i]
        offsets[i], end = end, end + leaf.size * leaf.dtype.itemsize
        shape, span = list(leaf.shape), [offsets[i], end]
        entries[name] = {"dtype": _TYPES[leaf.dtype.name], "shape": shape, "data_offsets": span}
    content = json.dumps(entries, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    begin = 8 + len(content)
    places = [
        (begin + offset, leaf.size, np.dtype(leaf.dtype))
        for offset, (_, leaf) in zip(offsets, named, strict=True)
    ]
    return len(content).to_bytes(8, "little") + content, places, begin + end


def _named(tree: PyTree) -> Iterator[tuple[str, Any]]:
    """Leaves with their paths joined by dots."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf
