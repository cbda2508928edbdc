"""Windows of tokens: parts of a network that are small enough to hold, whatever its size.

The tokens of a codec, `[ shared | label 0 | label 1 | ... ]`, are cut block by block into runs of `size`
tokens, so that a window belongs to all labels or to one, and shared tokens are in one window only:

    windows 0 .. shared - 1           over the shared tokens
    shared + label * own + k          window k over the tokens of a label

The last window of a block is padded. A token's *place* is where it stands in the shared tokens followed
by those of one label; tokens of several labels have the same places.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.types import Codec, TokenLeaf, Windows


class Span(NamedTuple):
    """A run of numbers of one leaf in a window.

    Attributes:
      leaf: whose.
      index: of the flattened leaf, a slice or int64 numbers.
      start: of the flattened window, whose numbers these are from here ...
      stop: ... to here.
    """

    leaf: TokenLeaf
    index: slice | np.ndarray
    start: int
    stop: int


class Numbers(NamedTuple):
    """What stands in a window; arrays of jax, so that the number of the window may be traced.

    Attributes:
      label: int32 scalar, whose tokens these are; -1 for shared ones.
      place: `[size]` int32 places of the tokens, valid also where they are padding.
      leaf: `[size]` int32, of `codec.leaves`.
      offset: `[size, channels]` int32, which number of the leaf, or of a label's slice of it.
      real: `[size, channels]` bool, False where a number is padding.
    """

    label: jax.Array
    place: jax.Array
    leaf: jax.Array
    offset: jax.Array
    real: jax.Array


def make_windows(codec: Codec, size: int) -> Windows:
    """Cuts the tokens of a codec into windows of `size`.

    Raises: ValueError for a size below 1, or one that no block of tokens fills.
    """
    own = sum(leaf.tokens for leaf in codec.leaves if leaf.axis >= 0)
    longest = max(codec.shared_length, own)
    if not 1 <= size <= longest:
        raise ValueError(
            f"make_windows: window must be between 1 and {longest} tokens of {codec.mask.shape[1]} "
            f"weights, the most that stand together in these weights, got {size}; choose less, or None "
            "for the whole network at once."
        )
    return Windows(codec, size, -(-codec.shared_length // size), -(-own // size))


def num_places(windows: Windows) -> int:
    """Places of tokens: those of the shared tokens and of one label."""
    return sum(leaf.tokens for leaf in windows.codec.leaves)


def weights_in_windows(windows: Windows) -> np.ndarray:
    """`[count]` int64, how many numbers of a window are no padding."""
    codec = windows.codec
    by_token = codec.mask.sum(axis=1)
    blocks = [by_token[: codec.shared_length]] if codec.shared_length else []
    if codec.num_classes:
        blocks += list(by_token[codec.shared_length :].reshape(codec.num_classes, -1))
    counts = [np.add.reduceat(b, np.arange(0, len(b), windows.size)) for b in blocks if len(b)]
    return np.concatenate(counts)


def numbers_in(windows: Windows, index: jax.Array | int) -> Numbers:
    """What stands in a window, computed from its number alone: nothing of the size of the network."""
    codec, leaves = windows.codec, windows.codec.leaves
    index = jnp.asarray(index, jnp.int32)
    label, first, length = _block(windows, index, jnp.where)
    within = first + jnp.arange(windows.size, dtype=jnp.int32)
    place = within + jnp.where(label < 0, 0, codec.shared_length)
    place = jnp.minimum(place, num_places(windows) - 1)
    ends = np.cumsum([leaf.tokens for leaf in leaves], dtype=np.int32)
    leaf = jnp.searchsorted(jnp.asarray(ends), place, side="right").astype(jnp.int32)
    begins = jnp.asarray(ends - np.array([leaf.tokens for leaf in leaves], np.int32))
    sizes = jnp.asarray(np.array([leaf.size for leaf in leaves], np.int32))
    channels = codec.mask.shape[1]
    offset = (place - begins[leaf])[:, None] * channels + jnp.arange(channels, dtype=jnp.int32)[
        None
    ]
    real = (offset < sizes[leaf][:, None]) & (within < length)[:, None]
    return Numbers(label, place, leaf, offset, real)


def spans_in(windows: Windows, index: int) -> list[Span]:
    """The runs of numbers that a window consists of; padding is in none of them."""
    codec, channels = windows.codec, windows.codec.mask.shape[1]
    label, first, length = _block(windows, int(index), lambda c, a, b: a if c else b)
    stop = min(first + windows.size, length)
    found, begin = [], 0
    for leaf in codec.leaves:
        if (leaf.axis >= 0) != (label >= 0):
            continue
        low, high = max(first, begin), min(stop, begin + leaf.tokens)
        if low < high:
            offsets = (low - begin) * channels, min((high - begin) * channels, leaf.size)
            at = (low - first) * channels
            inside = _inside_leaf(leaf, label, *offsets)
            found.append(Span(leaf, inside, at, at + offsets[1] - offsets[0]))
        begin += leaf.tokens
    return found


def renamed(windows: Windows, index: int, names: np.ndarray | None) -> int:
    """The window at the same place of label `names[c]`, of one of label c; None renames nothing."""
    label = (index - windows.shared) // max(windows.own, 1)
    if names is None or index < windows.shared:
        return index
    return int(index + (names[label] - label) * windows.own)


def cut_tokens(windows: Windows, tokens: jax.Array) -> jax.Array:
    """`[length, ...]` -> `[count, size, ...]`, padded with zeros."""
    codec, size, blocks = windows.codec, windows.size, []
    if codec.shared_length:
        blocks.append(_cut(tokens[None, : codec.shared_length], size))
    if windows.own:
        own = tokens[codec.shared_length :].reshape(codec.num_classes, -1, *tokens.shape[1:])
        blocks.append(_cut(own, size))
    return jnp.concatenate(blocks)


def join_tokens(windows: Windows, pieces: jax.Array) -> jax.Array:
    """Inverse of `cut_tokens`; what stands in the padding is dropped."""
    codec, of_token, blocks = windows.codec, pieces.shape[2:], []
    if codec.shared_length:
        shared = pieces[: windows.shared].reshape(-1, *of_token)
        blocks.append(shared[: codec.shared_length])
    if windows.own:
        own = pieces[windows.shared :].reshape(codec.num_classes, -1, *of_token)
        length = (codec.length - codec.shared_length) // codec.num_classes
        blocks.append(own[:, :length].reshape(-1, *of_token))
    return jnp.concatenate(blocks)


def rows_in(windows: Windows, index: jax.Array | int) -> jax.Array:
    """`[size]` int32, which of all tokens stand in a window; `codec.length` where it is padded."""
    label, first, length = _block(windows, jnp.asarray(index, jnp.int32), jnp.where)
    within = first + jnp.arange(windows.size, dtype=jnp.int32)
    begin = jnp.where(label < 0, 0, windows.codec.shared_length + label * length)
    return jnp.where(within < length, begin + within, windows.codec.length)


def take_tokens(windows: Windows, tokens: np.ndarray, index: int) -> np.ndarray:
    """Row `index` of `cut_tokens`, on the host and without the others."""
    label, first, length = _block(windows, int(index), lambda c, a, b: a if c else b)
    stop = min(first + windows.size, length)
    begin = 0 if label < 0 else windows.codec.shared_length + label * length
    piece = np.zeros((windows.size, tokens.shape[-1]), tokens.dtype)
    piece[: stop - first] = tokens[begin + first : begin + stop]
    return piece


def standardise(codec: Codec, span: Span, values: np.ndarray) -> np.ndarray:
    """The numbers of a span, `[..., stop - start]`, as tokens have them."""
    if codec.standard is None:
        return values
    centre, scale = _standard_of(codec, span)
    return (values - centre) / scale


def restore(codec: Codec, span: Span, values: np.ndarray) -> np.ndarray:
    """Inverse of `standardise`, in the type of the leaf."""
    if codec.standard is not None:
        centre, scale = _standard_of(codec, span)
        values = values * scale + centre
    return values.astype(span.leaf.dtype)


def _standard_of(codec: Codec, span: Span) -> tuple[np.ndarray, np.ndarray]:
    shape = span.leaf.shape
    whole = (np.asarray(group[span.leaf.number]) for group in codec.standard)
    return tuple(
        x if x.ndim == 0 else np.broadcast_to(x, shape).reshape(-1)[span.index] for x in whole
    )


def _block(windows: Windows, index, where) -> tuple:
    """Label of a window (-1: shared), its first token within its block, and the block's length."""
    codec = windows.codec
    own_length = num_places(windows) - codec.shared_length
    after = index - windows.shared
    label = where(after < 0, -1, after // max(windows.own, 1))
    window = where(after < 0, index, after % max(windows.own, 1))
    return label, window * windows.size, where(after < 0, codec.shared_length, own_length)


def _inside_leaf(leaf: TokenLeaf, label: int, start: int, stop: int) -> slice | np.ndarray:
    """Where numbers `start` to `stop` of a leaf, or of a label's slice of it, stand in the leaf."""
    if leaf.axis < 0:
        return slice(start, stop)
    after = int(np.prod(leaf.shape[leaf.axis + 1 :], dtype=np.int64))
    if after == leaf.size:  # the labels come first: their slices are whole runs
        return slice(label * after + start, label * after + stop)
    outer, inner = np.divmod(np.arange(start, stop, dtype=np.int64), after)
    return (outer * leaf.shape[leaf.axis] + label) * after + inner


def _cut(blocks: jax.Array, size: int) -> jax.Array:
    """`[B, length, ...]` -> `[B * ceil(length / size), size, ...]`."""
    of_token = blocks.shape[2:]
    padding = [(0, 0), (0, -blocks.shape[1] % size), *[(0, 0)] * len(of_token)]
    return jnp.pad(blocks, padding).reshape(-1, size, *of_token)


def flat_leaves(leaves: Sequence[np.ndarray], leading: int) -> list[np.ndarray]:
    """Leaves with all but their `leading` axes made one; views of contiguous arrays."""
    sizes = [int(np.prod(leaf.shape[leading:], dtype=np.int64)) for leaf in leaves]
    return [leaf.reshape(*leaf.shape[:leading], n) for leaf, n in zip(leaves, sizes, strict=True)]
