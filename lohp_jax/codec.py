"""Weights as tokens: any pytree of float arrays <-> `[length, channels]`, and back exactly.

Every leaf is cut into rows of `channels` numbers, the last one padded with zeros. Leaves that no
label indexes come first; then, label by label, the slices that belong to it:

    [ shared tokens | tokens of label 0 | tokens of label 1 | ... ]

so that permuting the labels of a task permutes whole blocks of tokens.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.checks import check_number_type
from lohp_jax.types import Codec, Params, PyTree, TokenLeaf


class _Layout(NamedTuple):
    """The leaves in the order of the pytree; `shared` and `indexed` number them by class axis."""

    treedef: Any
    leaves: list[TokenLeaf]
    shared: list[int]
    indexed: list[int]
    num_classes: int
    channels: int

    @property
    def order(self) -> list[int]:
        """Numbers of the leaves as the tokens have them."""
        return self.shared + self.indexed * self.num_classes

    @property
    def shared_length(self) -> int:
        """Tokens of leaves that no label indexes."""
        return sum(self.leaves[i].tokens for i in self.shared)

    @property
    def dtype(self) -> np.dtype:
        """Of the tokens."""
        return jnp.result_type(jnp.float32, *(leaf.dtype for leaf in self.leaves))


def make_codec(
    params: Params,
    *,
    channels: int,
    reference: Params | None = None,
    scale: PyTree | None = None,
    class_axes: PyTree | None = None,
) -> Codec:
    """Builds the codec of weights shaped like `params`.

    With a scale, tokens hold the standardised weights (theta - reference) / scale. Without one
    nothing is standardised, the reference included: tokens hold the weights themselves and
    `decode(encode(params))` returns every bit. Tokens are float32, or float64 if a leaf is.

    Args:
      params: pytree of floating-point arrays, or of their `jax.ShapeDtypeStruct`.
      channels: width of a token, >= 1.
      reference: centre of the standardisation, a pytree like `params`; None means zero.
      scale: pytree like `params` of positive numbers, see `standard_scale`; None for raw weights.
      class_axes: pytree like `params`, the axis of each leaf that counts the labels or -1; see
        `TaskFamily.class_axes`.

    Raises: ValueError for an empty tree, a leaf that is no floating-point array, `channels` < 1, axes
      that do not fit, or trees of other structures. `encode` and `decode` raise it for other shapes.
    """
    layout = _make_layout(params, channels, class_axes)
    centres, scales = _standardisation(layout.treedef, reference, scale)
    mask = np.concatenate([_leaf_mask(layout.leaves[i], channels) for i in layout.order])

    def lay_out(params: Params) -> jax.Array:
        return _pack(layout, _checked_leaves(layout, params))

    def encode(params: Params) -> jax.Array:
        values = _checked_leaves(layout, params)
        if scales is not None:
            values = [(v - c) / s for v, c, s in zip(values, centres, scales, strict=True)]
        return _pack(layout, values)

    def decode(tokens: jax.Array) -> Params:
        if tokens.shape != mask.shape:
            raise ValueError(f"decode: expected tokens of shape {mask.shape}, got {tokens.shape}.")
        values = _unpack(layout, tokens)
        if scales is not None:
            values = [v * s + c for v, c, s in zip(values, centres, scales, strict=True)]
        dtypes = [leaf.dtype for leaf in layout.leaves]
        return layout.treedef.unflatten(map(jax.lax.convert_element_type, values, dtypes))

    return Codec(
        encode,
        decode,
        length=len(mask),
        mask=mask,
        shared_length=layout.shared_length,
        num_classes=layout.num_classes,
        lay_out=lay_out,
        describe=functools.partial(_features, layout),
        leaves=tuple(layout.leaves[i] for i in layout.shared + layout.indexed),
        standard=None if scales is None else (centres, scales),
    )


def standard_scale(weights: Params, reference: Params, *, floor: float = 1e-3) -> PyTree:
    """Root mean square of `weights - reference`, one number per leaf.

    Args:
      weights: pytree with a leading batch axis, e.g. the ends of many trajectories.
      reference: pytree without it.
      floor: smallest scale returned, relative to the largest, so that a leaf which no trajectory
        moves stays finite; a tree that never moves gets ones.

    Returns: pytree like `reference` of float32 scalars.

    Raises: ValueError for complex weights.
    """

    def distance(weights, reference):
        if jnp.iscomplexobj(weights) or jnp.iscomplexobj(reference):
            raise ValueError(
                f"standard_scale: expected real weights, got {weights.dtype} and {reference.dtype}; "
                "take the scale of each part."
            )
        moved = weights.astype(jnp.float32) - reference.astype(jnp.float32)[None]
        return root_mean_square(moved)

    leaves, structure = jax.tree.flatten(jax.tree.map(distance, weights, reference))
    return structure.unflatten(list(floored(jnp.stack(leaves), floor=floor)))


def root_mean_square(x: jax.Array) -> jax.Array:
    """Scalar; 0 of an empty array, and right where squares leave the range of the numbers."""
    largest = jnp.max(jnp.abs(x), initial=0.0)
    unit = jnp.where(largest > 0, largest, 1.0)
    return largest * jnp.sqrt(jnp.sum((x / unit) ** 2) / max(x.size, 1))


def floored(rms: jax.Array, *, floor: float = 1e-3) -> jax.Array:
    """`[leaves]` root mean squares as scales, see `standard_scale`."""
    largest = jnp.max(rms)
    return jnp.where(largest > 0, jnp.maximum(rms, floor * largest), 1.0).astype(jnp.float32)


def _make_layout(params: Params, channels: int, class_axes: PyTree | None) -> _Layout:
    if channels < 1:
        raise ValueError(f"make_codec: channels must be at least 1, got {channels}.")
    paths, treedef = jax.tree.flatten_with_path(params)
    if not paths:
        raise ValueError("make_codec: expected a pytree with at least one array, got none.")
    axes = [-1] * len(paths) if class_axes is None else treedef.flatten_up_to(class_axes)
    leaves = [
        _describe(number, *path, axis, channels)
        for number, (path, axis) in enumerate(zip(paths, axes, strict=True))
    ]
    shared = [i for i, leaf in enumerate(leaves) if leaf.axis < 0]
    indexed = [i for i, leaf in enumerate(leaves) if leaf.axis >= 0]
    counts = {leaves[i].path: leaves[i].shape[leaves[i].axis] for i in indexed}
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"make_codec: class axes must agree on the number of labels, got {counts}."
        )
    return _Layout(treedef, leaves, shared, indexed, next(iter(counts.values()), 0), channels)


def _describe(number: int, path: tuple, value: Any, axis: int, channels: int) -> TokenLeaf:
    name = jax.tree_util.keystr(path)
    dtype = getattr(value, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"make_codec: expected floating-point arrays, got {dtype or type(value).__name__} at "
            f"{name}; keep counters and masks out of the weights."
        )
    check_number_type("make_codec", name, dtype)
    shape = tuple(value.shape)
    if not -1 <= axis < len(shape):
        raise ValueError(
            f"make_codec: expected a class axis of {name}, whose shape is {shape}, or -1; "
            f"got {axis}."
        )
    size = math.prod(shape[:axis] + shape[axis + 1 :] if axis >= 0 else shape)
    layer = jax.tree_util.keystr(path[:-1])
    return TokenLeaf(number, name, layer, axis, shape, dtype, size, math.ceil(size / channels))


def _standardisation(
    treedef, reference: Params | None, scale: PyTree | None
) -> tuple[list | None, list | None]:
    """Centres and scales leaf by leaf; None for raw weights."""
    if scale is None:
        return None, None
    zeros = [np.float32(0)] * treedef.num_leaves
    centres = zeros if reference is None else treedef.flatten_up_to(reference)
    return centres, treedef.flatten_up_to(scale)


def _checked_leaves(layout: _Layout, params: Params) -> list[jax.Array]:
    """Leaves of `params` in the type of the tokens; raises where structure or shapes differ."""
    values, treedef = jax.tree.flatten(params)
    if treedef != layout.treedef:
        raise ValueError(
            f"encode: expected weights with structure {layout.treedef}, got {treedef}."
        )
    for value, leaf in zip(values, layout.leaves, strict=True):
        if value.shape != leaf.shape:
            raise ValueError(
                f"encode: expected shape {leaf.shape} at {leaf.path}, got {value.shape}."
            )
        if jnp.iscomplexobj(value):
            raise ValueError(
                f"encode: expected real weights at {leaf.path}, got {value.dtype}; encode its two parts."
            )
    return [value.astype(layout.dtype) for value in values]


def _pack(layout: _Layout, values: list[jax.Array]) -> jax.Array:
    """`[length, channels]` from the leaves."""
    channels = layout.channels
    tokens = [_to_tokens(*pair, channels) for pair in zip(values, layout.leaves, strict=True)]
    blocks = [tokens[i][0] for i in layout.shared]
    if layout.indexed:
        by_class = jnp.concatenate([tokens[i] for i in layout.indexed], axis=1)
        blocks.append(by_class.reshape(-1, channels))
    return jnp.concatenate(blocks)


def _unpack(layout: _Layout, tokens: jax.Array) -> list[jax.Array]:
    """Inverse of `_pack`."""
    class_length = sum(layout.leaves[i].tokens for i in layout.indexed)
    by_class = tokens[layout.shared_length :].reshape(
        layout.num_classes, class_length, layout.channels
    )
    values = [None] * len(layout.leaves)
    for group, source in ((layout.shared, tokens[None]), (layout.indexed, by_class)):
        start = 0
        for i in group:
            stop = start + layout.leaves[i].tokens
            values[i] = _from_tokens(source[:, start:stop], layout.leaves[i])
            start = stop
    return values


def _to_tokens(value: jax.Array, leaf: TokenLeaf, channels: int) -> jax.Array:
    """`[labels or 1, tokens, channels]`, zero-padded."""
    rows = value[None] if leaf.axis < 0 else jnp.moveaxis(value, leaf.axis, 0)
    rows = rows.reshape(rows.shape[0], leaf.size)
    padded = jnp.pad(rows, ((0, 0), (0, leaf.tokens * channels - leaf.size)))
    return padded.reshape(rows.shape[0], leaf.tokens, channels)


def _from_tokens(tokens: jax.Array, leaf: TokenLeaf) -> jax.Array:
    """Inverse of `_to_tokens`, with the class axis back in its place."""
    rows = tokens.reshape(tokens.shape[0], math.prod(tokens.shape[1:]))[:, : leaf.size]
    if leaf.axis < 0:
        return rows.reshape(leaf.shape)
    rest = leaf.shape[: leaf.axis] + leaf.shape[leaf.axis + 1 :]
    return jnp.moveaxis(rows.reshape(rows.shape[0], *rest), 0, leaf.axis)


def _leaf_mask(leaf: TokenLeaf, channels: int) -> np.ndarray:
    return (np.arange(leaf.tokens * channels) < leaf.size).reshape(leaf.tokens, channels)


def leaf_features(leaves: Sequence[TokenLeaf]) -> np.ndarray:
    """`[leaves, F - 1]` float32, what all tokens of a leaf have in common; see `Codec.features`.

    Args:
      leaves: all of a codec; the rows of the result are in their order, layers in that of the pytree.
    """
    by_number = sorted(leaves, key=lambda leaf: leaf.number)
    layers = list(dict.fromkeys(leaf.layer for leaf in by_number))
    fans = {leaf.layer: (1, 1) for leaf in by_number}
    fans |= {
        leaf.layer: (math.prod(leaf.shape[:-1]), leaf.shape[-1])
        for leaf in by_number
        if len(leaf.shape) >= 2
    }
    rows = []
    for leaf in leaves:
        layer = np.eye(len(layers))[layers.index(leaf.layer)]
        kind = np.eye(3)[np.clip(len(leaf.shape) - 1, 0, 2)]
        rows.append(np.concatenate([layer, kind, np.log10(np.maximum(fans[leaf.layer], 1))]))
    return np.stack(rows).astype(np.float32)


def _features(layout: _Layout) -> np.ndarray:
    """`Codec.features`."""
    known = leaf_features(layout.leaves)
    rows = []
    for i in layout.order:
        tokens = layout.leaves[i].tokens
        place = np.linspace(0, 1, tokens)[:, None]
        rows.append(np.hstack([np.tile(known[i], (tokens, 1)), place]))
    return np.concatenate(rows).astype(np.float32)
