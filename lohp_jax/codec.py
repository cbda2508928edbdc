"""Weights as tokens: any pytree of float arrays <-> `[length, channels]`, and back exactly.

Every leaf is cut into rows of `channels` numbers, the last one padded with zeros. Leaves that no
label indexes come first; then, label by label, the slices that belong to it:

    [ shared tokens | tokens of label 0 | tokens of label 1 | ... ]

so that permuting the labels of a task permutes whole blocks of tokens.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.types import Params, PyTree


class Codec(NamedTuple):
    """A bijection between one structure of weights and tokens.

    Attributes:
      encode: `params -> [length, channels]`.
      decode: `[length, channels] -> params`; padding is ignored.
      length: number of tokens.
      mask: `[length, channels]` bool, False where a number is padding.
      features: `[length, F]` float32, what is known of each token: one-hot layer, one-hot kind
        (scalar or vector, matrix, kernel of a convolution), position in its leaf in [0, 1], log10 of
        the layer's fan-in and fan-out.
      shared_length: number of leading tokens that belong to no label.
      num_classes: number of blocks after them; 0 without class axes.
    """

    encode: Callable[[Params], jax.Array]
    decode: Callable[[jax.Array], Params]
    length: int
    mask: np.ndarray
    features: np.ndarray
    shared_length: int
    num_classes: int


class _Leaf(NamedTuple):
    """One leaf: `axis` is its class axis (-1: none), `tokens` how many it takes per label."""

    path: str
    layer: str
    axis: int
    shape: tuple[int, ...]
    dtype: np.dtype
    size: int
    tokens: int


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
    `decode(encode(params))` returns every bit.

    Args:
      params: pytree of floating-point arrays, or of their `jax.ShapeDtypeStruct`.
      channels: width of a token, >= 1.
      reference: centre of the standardisation, a pytree like `params`; None means zero.
      scale: pytree like `params` of positive numbers that broadcast to the leaves, as
        `standard_scale` makes; None for raw weights.
      class_axes: pytree like `params`, the axis of each leaf that counts the labels or -1; see
        `TaskFamily.class_axes`.

    Raises: ValueError for an empty tree, a leaf that is not floating point, `channels` < 1, or class
      axes that disagree on the number of labels.
    """
    if channels < 1:
        raise ValueError(f"make_codec: channels must be at least 1, got {channels}.")
    paths, treedef = jax.tree.flatten_with_path(params)
    if not paths:
        raise ValueError("make_codec: expected a pytree with at least one array, got none.")
    axes = [-1] * len(paths) if class_axes is None else treedef.flatten_up_to(class_axes)
    leaves = [_describe(path, leaf, axis, channels) for (path, leaf), axis in zip(paths, axes)]
    num_classes = _count_classes(leaves)
    if scale is None:
        centres, scales = None, None
    else:
        zeros = [np.float32(0)] * len(leaves)
        centres = zeros if reference is None else treedef.flatten_up_to(reference)
        scales = treedef.flatten_up_to(scale)
    shared = [i for i, leaf in enumerate(leaves) if leaf.axis < 0]
    indexed = [i for i, leaf in enumerate(leaves) if leaf.axis >= 0]
    shared_length = sum(leaves[i].tokens for i in shared)
    class_length = sum(leaves[i].tokens for i in indexed)
    dtype = jnp.result_type(jnp.float32, *(leaf.dtype for leaf in leaves))

    def encode(params: Params) -> jax.Array:
        values = _flatten_like(treedef, leaves, params)
        if scales is not None:
            values = [(v - c) / s for v, c, s in zip(values, centres, scales)]
        tokens = [_to_tokens(v.astype(dtype), leaf, channels) for v, leaf in zip(values, leaves)]
        blocks = [tokens[i][0] for i in shared]
        if indexed:
            by_class = jnp.concatenate([tokens[i] for i in indexed], axis=1)
            blocks.append(by_class.reshape(-1, channels))
        return jnp.concatenate(blocks)

    def decode(tokens: jax.Array) -> Params:
        if tokens.shape != (shared_length + num_classes * class_length, channels):
            expected = (shared_length + num_classes * class_length, channels)
            raise ValueError(f"decode: expected tokens of shape {expected}, got {tokens.shape}.")
        by_class = tokens[shared_length:].reshape(num_classes, class_length, channels)
        values: list = [None] * len(leaves)
        for group, source in ((shared, tokens[None, :shared_length]), (indexed, by_class)):
            start = 0
            for i in group:
                values[i] = _from_tokens(source[:, start : start + leaves[i].tokens], leaves[i])
                start += leaves[i].tokens
        if scales is not None:
            values = [v * s + c for v, c, s in zip(values, centres, scales)]
        return treedef.unflatten([v.astype(leaf.dtype) for v, leaf in zip(values, leaves)])

    order = shared + indexed * max(num_classes, 1)
    mask = np.concatenate([_leaf_mask(leaves[i], channels) for i in order])
    return Codec(
        encode,
        decode,
        length=shared_length + num_classes * class_length,
        mask=mask,
        features=_features([leaves[i] for i in order], leaves),
        shared_length=shared_length,
        num_classes=num_classes,
    )


def standard_scale(weights: Params, reference: Params, *, floor: float = 1e-3) -> PyTree:
    """Root mean square of `weights - reference`, one number per leaf.

    Args:
      weights: pytree with a leading batch axis, e.g. the ends of many trajectories.
      reference: pytree without it.
      floor: smallest scale returned, relative to the largest, so that a leaf which no trajectory
        moves stays finite; a tree that never moves gets ones.

    Returns: pytree like `reference` of float32 scalars.
    """
    rms = jax.tree.map(lambda w, r: jnp.sqrt(jnp.mean((w - r) ** 2)), weights, reference)
    largest = jnp.max(jnp.stack(jax.tree.leaves(rms)))
    return jax.tree.map(
        lambda r: jnp.where(largest > 0, jnp.maximum(r, floor * largest), 1.0).astype(jnp.float32),
        rms,
    )


def _describe(path, leaf, axis: int, channels: int) -> _Leaf:
    name = jax.tree_util.keystr(path)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
            f"make_codec: expected floating-point leaves, got {leaf.dtype} at {name}; "
            "keep counters and masks out of the weights."
        )
    shape = tuple(leaf.shape)
    if axis >= len(shape):
        raise ValueError(f"make_codec: class axis {axis} of {name} exceeds its shape {shape}.")
    size = math.prod(shape) // (shape[axis] if axis >= 0 else 1)
    layer = jax.tree_util.keystr(path[:-1])
    return _Leaf(name, layer, axis, shape, leaf.dtype, size, math.ceil(size / channels))


def _count_classes(leaves: list[_Leaf]) -> int:
    counts = {leaf.path: leaf.shape[leaf.axis] for leaf in leaves if leaf.axis >= 0}
    if len(set(counts.values())) > 1:
        raise ValueError(f"make_codec: class axes must agree on the number of labels, got {counts}.")
    return next(iter(counts.values()), 0)


def _flatten_like(treedef, leaves: list[_Leaf], params: Params) -> list[jax.Array]:
    """Leaves of `params`; raises where the structure or a shape differs."""
    values, actual = jax.tree.flatten(params)
    if actual != treedef:
        raise ValueError(f"encode: expected weights with structure {treedef}, got {actual}.")
    for value, leaf in zip(values, leaves):
        if value.shape != leaf.shape:
            raise ValueError(f"encode: expected shape {leaf.shape} at {leaf.path}, got {value.shape}.")
    return values


def _to_tokens(value: jax.Array, leaf: _Leaf, channels: int) -> jax.Array:
    """`[labels or 1, tokens, channels]`, zero-padded."""
    rows = jnp.moveaxis(value, leaf.axis, 0) if leaf.axis >= 0 else value
    rows = rows.reshape(-1, leaf.size)
    padded = jnp.pad(rows, ((0, 0), (0, leaf.tokens * channels - leaf.size)))
    return padded.reshape(rows.shape[0], leaf.tokens, channels)


def _from_tokens(tokens: jax.Array, leaf: _Leaf) -> jax.Array:
    """Inverse of `_to_tokens`, with the class axis back in its place."""
    rows = tokens.reshape(tokens.shape[0], -1)[:, : leaf.size]
    if leaf.axis < 0:
        return rows.reshape(leaf.shape)
    rest = leaf.shape[: leaf.axis] + leaf.shape[leaf.axis + 1 :]
    return jnp.moveaxis(rows.reshape(-1, *rest), 0, leaf.axis)


def _leaf_mask(leaf: _Leaf, channels: int) -> np.ndarray:
    return (np.arange(leaf.tokens * channels) < leaf.size).reshape(leaf.tokens, channels)


def _features(order: list[_Leaf], leaves: list[_Leaf]) -> np.ndarray:
    layers = list(dict.fromkeys(leaf.layer for leaf in leaves))
    fans = {leaf.layer: (1, 1) for leaf in leaves}
    for leaf in leaves:
        if len(leaf.shape) >= 2:
            fans[leaf.layer] = (math.prod(leaf.shape[:-1]), leaf.shape[-1])
    rows = []
    for leaf in order:
        kind = 0 if len(leaf.shape) < 2 else 1 if len(leaf.shape) == 2 else 2
        known = np.concatenate(
            [np.eye(len(layers))[layers.index(leaf.layer)], np.eye(3)[kind], np.log10(fans[leaf.layer])]
        )
        position = np.linspace(0, 1, leaf.tokens)[:, None]
        rows.append(np.hstack([np.tile(known, (leaf.tokens, 1)), position]))
    return np.concatenate(rows).astype(np.float32)
