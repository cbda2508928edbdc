"""What learned optimizers see of one tensor: accumulators over time and features of every parameter.

Shared by VeLO (Metz et al., 2022, arXiv 2211.09760) and its relatives. Arrays here belong to one tensor
of shape S; a scalar counts as a tensor of one entry. No array of all parameters times all channels is
ever formed: a first pass over the parameters takes the mean square of every channel, a second one
forms each channel anew inside the sums of the first layer.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.checks import check_number_type
from lohp_jax.types import PyTree

DECAYS = (0.9, 0.99, 0.999)
"""Of the momenta and of the factored second moments."""
NUM_CHANNELS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
"""Channels of each group of features, 30 in all."""
_LARGEST_GRADIENT = 1000.0
_FLOOR = 1e-9
_LARGE, _FEW = 2**16, 8
_LONG_LOOP = 2**12


class Accumulators(NamedTuple):
    """Running means of one tensor, without bias correction.

    Attributes:
      momentum: `(3,) + S`, of the gradient, by decay.
      rms: `S`, of its square.
      row: `(3,) + S` but for the largest axis, which is 1: means of the square over that axis. Vectors
        and scalars keep it all.
      col: the same for the second largest axis; empty for vectors and scalars.
    """

    momentum: jax.Array
    rms: jax.Array
    row: jax.Array
    col: jax.Array


def clip_gradient(gradient: jax.Array) -> jax.Array:
    """Every entry clipped to [-1000, 1000]; NaN passes."""
    return jnp.clip(gradient, -_LARGEST_GRADIENT, _LARGEST_GRADIENT)


def factored_axes(shape: Sequence[int]) -> tuple[int, int] | None:
    """Largest and second largest axis (of equal ones the later is larger); None below two axes."""
    if len(shape) < 2:
        return None
    second, largest = np.argsort(shape, kind="stable")[-2:]
    return int(largest), int(second)


def check_tensors(rule: str, params: PyTree) -> None:
    """Raises a ValueError for leaves that are not real floating-point numbers, or have no entries."""
    for path, leaf in jax.tree.leaves_with_path(params):
        if hasattr(leaf, "dtype"):
            check_number_type(rule, jax.tree_util.keystr(path) or "the parameter", leaf.dtype)
        dtype, shape = jnp.result_type(leaf), jnp.shape(leaf)
        if math.prod(shape) and jnp.issubdtype(dtype, jnp.floating):
            continue
        raise ValueError(
            f"{rule}: expected floating-point parameters with entries, got {dtype}{[*shape]}"
            f"{'' if math.prod(shape) else ' with no entries'} at "
            f"{jax.tree_util.keystr(path) or 'the root'}; leave it out with optax.masked."
        )


def check_like(rule: str, expected: PyTree, **trees: PyTree) -> None:
    """Raises a ValueError for a tree of `update` that is None, or unlike the parameters of `init`.

    Scalars and tensors of shape `[1]` are alike.
    """
    structure = jax.tree.structure(expected)
    shapes = [jnp.shape(leaf) or (1,) for leaf in jax.tree.leaves(expected)]
    for name, tree in trees.items():
        if tree is None:
            raise ValueError(f"{rule}: update needs the {name}, got None.")
        actual = [jnp.shape(leaf) or (1,) for leaf in jax.tree.leaves(tree)]
        if jax.tree.structure(tree) != structure or actual != shapes:
            raise ValueError(
                f"{rule}: the {name} of update are unlike the parameters of init, expected "
                f"{jax.tree.map(jnp.shape, expected)}, got {jax.tree.map(jnp.shape, tree)}; "
                "call init for new parameters."
            )


def init_tensors(params: PyTree) -> Accumulators:
    """`Accumulators` of pytrees like the parameters, all zero."""
    leaves, structure = jax.tree.flatten(params)
    return join_tensors([init_accumulators(jnp.atleast_1d(leaf)) for leaf in leaves], structure)


def split_tensors(accumulators: Accumulators) -> list[Accumulators]:
    """`Accumulators` of pytrees -> one for every tensor."""
    columns = [jax.tree.leaves(tree) for tree in accumulators]
    return [Accumulators(*row) for row in zip(*columns, strict=True)]


def join_tensors(tensors: Sequence[Accumulators], structure: Any) -> Accumulators:
    """One `Accumulators` for every tensor -> of pytrees."""
    fields = range(len(Accumulators._fields))
    return Accumulators(*(structure.unflatten([tensor[i] for tensor in tensors]) for i in fields))


def init_accumulators(param: jax.Array) -> Accumulators:
    """Zeros for a tensor."""
    shape, axes = param.shape, factored_axes(param.shape)
    count = len(DECAYS)
    row, col = (count, *shape), (0,)
    if axes:
        row, col = ((count, *(1 if i == axis else n for i, n in enumerate(shape))) for axis in axes)
    return Accumulators(*(jnp.zeros(s, jnp.float32) for s in ((count, *shape), shape, row, col)))


@functools.partial(jax.jit, static_argnames="rms_decay")
def update_accumulators(
    old: Accumulators, gradient: jax.Array, *, rms_decay: float = 0.999
) -> Accumulators:
    """One step; the gradient need not have been clipped."""
    gradient = clip_gradient(gradient)
    decays = np.float32(DECAYS).reshape(-1, *[1] * gradient.ndim)
    square, axes = gradient**2, factored_axes(gradient.shape)

    def moved(mean, value):
        return decays * mean + (1 - decays) * value[None]

    momentum, rms = moved(old.momentum, gradient), rms_decay * old.rms + (1 - rms_decay) * square
    if not axes:
        return Accumulators(momentum, rms, moved(old.row, square + 1e-30), old.col)
    row, col = (
        moved(mean, jnp.mean(square, axis, keepdims=True) + 1e-30)
        for mean, axis in zip(old[2:], axes, strict=True)
    )
    return Accumulators(momentum, rms, row, col)


def map_tensors(
    function: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    tensors: Sequence[PyTree],
    rows: PyTree = (),
) -> tuple[list[PyTree], PyTree]:
    """`function(tensor, row)` for every tensor; those of equal shapes in one `jax.vmap`.

    A large tensor with few like it stays alone: that needs no copy, but compiles it anew.

    Args:
      function: returns what stays apart for every tensor, and its row of what is put together. What
        stays apart should end in a division: XLA would repeat sums and products for every tensor.
      tensors: N pytrees of arrays.
      rows: arrays with a leading axis N.

    Returns: list of N pytrees, and arrays with a leading axis N.
    """
    if not tensors:
        return [], rows
    equal: dict[Any, list[int]] = {}
    for j, tensor in enumerate(tensors):
        leaves, structure = jax.tree.flatten(tensor)
        equal.setdefault((structure, *(leaf.shape for leaf in leaves)), []).append(j)
    groups = []
    for members in equal.values():
        size = max(leaf.size for leaf in jax.tree.leaves(tensors[members[0]]))
        alone = len(members) == 1 or (size > _LARGE and len(members) <= _FEW)
        groups += [[j] for j in members] if alone else [members]
    apart: list[PyTree] = [None] * len(tensors)
    together = []
    for members in groups:
        own = jax.tree.map(lambda x, members=members: x[np.array(members)], rows)
        if len(members) == 1:
            inputs = tensors[members[0]], jax.tree.map(lambda x: x[0], own)
            results, row = jax.tree.map(lambda x: x[None], function(*inputs))
        else:
            same = [tensors[j] for j in members]
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *same)
            results, row = jax.vmap(function)(stacked, own)
        together.append(row)
        for i, j in enumerate(members):
            apart[j] = jax.tree.map(lambda x, i=i: x[i], results)
    order = np.argsort(np.concatenate(groups))
    return apart, jax.tree.map(lambda *parts: jnp.concatenate(parts)[order], *together)


@functools.partial(jax.jit, static_argnames=("rms_floor", "axes", "mean_floor"))
def perceptron(
    accumulators: Accumulators,
    gradient: jax.Array,
    param: jax.Array,
    weights: dict[str, jax.Array],
    *,
    rms_floor: float,
    axes: tuple[int, ...],
    mean_floor: float,
) -> list[jax.Array]:
    """Two hidden rectified layers over the 30 normalised channels of every parameter.

    Args:
      accumulators: after this step's update.
      gradient: `S`, clipped.
      param: `S`.
      weights: `w0__k` `[n_k, hidden]` for group k of channels, `b0`, `w1`, `b1`, `w2`, `b2`.
      rms_floor: added to the running mean square under the root.
      axes: over which the mean square of a channel becomes 1.
      mean_floor: added to that mean square.

    Returns: the outputs, each `S`.
    """
    hidden = _first_layer(accumulators, gradient, param, weights, rms_floor, axes, mean_floor)
    for layer in ("1", "2"):
        rectified = [jax.nn.relu(h) for h in hidden]
        hidden = [
            sum((h * w for h, w in zip(rectified, column, strict=True)), start=bias)
            for column, bias in zip(weights[f"w{layer}"].T, weights[f"b{layer}"], strict=True)
        ]
    return hidden


def _first_layer(
    accumulators, gradient, param, weights, rms_floor, axes, mean_floor
) -> list[jax.Array]:
    """Sums over the channels; their products are regrouped by what they have in common."""
    momentum, rms, row, col = accumulators
    factors = _factors(row, col, param.shape)
    sizes = _mean_squares(accumulators, gradient, param, factors, rms_floor, axes)
    w = {k: _scaled(weights[f"w0__{k}"], size, mean_floor) for k, size in sizes.items()}
    sides = _side_sums(row, col, weights, axes, mean_floor, param.shape)
    root, small = jax.lax.rsqrt(rms + rms_floor), _small(gradient)
    hidden = []
    for h, bias in enumerate(weights["b0"]):
        slope = w[0][0][h] + root * w[8][0][h]
        total = bias + small * w[1][0][h] + param * w[2][0][h] + rms * w[4][0][h]
        total += root * w[6][0][h] + sum(side[h] for side in sides)
        for d, (for_gradient, for_momentum, shared) in enumerate(zip(*factors, strict=True)):
            slope += for_gradient * shared * w[7][d][h]
            own = w[3][d][h] + root * w[5][d][h] + for_momentum * shared * w[13][d][h]
            total += momentum[d] * own
        hidden.append(total + gradient * slope)
    return hidden


class _Factors(NamedTuple):
    """What brings gradient and momentum to unit size, `(3,) + ` shapes that broadcast to S.

    Attributes:
      gradient: a factor of the gradient, constant along the largest axis.
      momentum: the same for the momentum.
      shared: a factor of both, constant along the second largest axis; 1 for vectors and scalars.
    """

    gradient: jax.Array
    momentum: jax.Array
    shared: jax.Array


def _factors(row, col, shape) -> _Factors:
    axes = factored_axes(shape)
    if not axes:
        return _Factors(_rsqrt(row + _FLOOR), jax.lax.rsqrt(row), jnp.ones((3, 1), jnp.float32))
    rows = _rsqrt(row / (row.mean(axes[1] + 1, keepdims=True) + _FLOOR))
    return _Factors(rows, rows, _rsqrt(col))


def _mean_squares(accumulators, gradient, param, factors, rms_floor, axes):
    """By group, of every channel that is no factored moment: `[n_k]`, over `axes`, which are kept."""
    momentum, rms, *_ = accumulators
    inverse = 1.0 / (rms + rms_floor)  # not of the second pass, so that no array is kept for it
    together = {
        1: [_small(gradient) ** 2],
        5: [m**2 * inverse for m in momentum],
        6: [inverse],
        8: [gradient**2 * inverse],
    }
    sizes = jax.tree.unflatten(
        jax.tree.structure(together), _means(jax.tree.leaves(together), axes)
    )
    apart = {0: gradient[None], 2: param[None], 3: momentum, 4: rms[None]}
    behind = tuple(axis + 1 for axis in axes)
    sizes |= {k: jnp.mean(x**2, behind, keepdims=True) for k, x in apart.items()}
    # each factor once, before or after the first sum: XLA:CPU forms an array of what it uses twice
    sizes[7] = _mean_product((gradient**2)[None] * factors.gradient**2, factors.shared, behind)
    sizes[13] = _mean_product((momentum * factors.shared) ** 2, factors.momentum, behind)
    return sizes


def _mean_product(square, factor, axes):
    """Mean of square factor^2 over axes; first over those that the factor does not have."""
    first = tuple(axis for axis in axes if factor.shape[axis] == 1)
    then = tuple(axis for axis in axes if axis not in first)
    return jnp.mean(jnp.mean(square, first, keepdims=True) * factor**2, then, keepdims=True)


def _side_sums(row, col, weights, axes, mean_floor, shape):
    """What the factored moments and their inverse roots add to the first layer, hidden axis first."""
    sides = [(row, 9), (col, 10)] if col.size else [(row, 9), (row, 10)]
    behind = tuple(axis + 1 for axis in axes)
    sums = []
    for side, k in sides:
        for x, group in ((side, k), (jax.lax.rsqrt(side + 1e-8), k + 2)):
            weight = weights[f"w0__{group}"]
            normal = x * jax.lax.rsqrt(mean_floor + jnp.mean(x**2, behind, keepdims=True))
            if x[0].shape == shape:
                sums.append(
                    [sum(n * w for n, w in zip(normal, row, strict=True)) for row in weight.T]
                )
            else:  # XLA keeps a product of matrices, where it would repeat a sum for every parameter
                sums.append(jnp.einsum("k...,kh->h...", normal, weight))
    return sums


def _scaled(weight, mean_squares, mean_floor):
    """Weights `[n, h]` of channels as they are before they are normalised."""
    scales = [jax.lax.rsqrt(mean_floor + x) for x in mean_squares]
    return [[w * scale for w in row] for row, scale in zip(weight, scales, strict=True)]


def _means(arrays: Sequence[jax.Array], axes: tuple[int, ...]) -> list[jax.Array]:
    """Means of arrays of one shape over `axes`, which are kept, in one loop over them all.

    XLA:CPU would form an array of everything that two reductions share. A loop adds up one by one,
    so that it must be short for float32 sums to keep their digits.
    """
    shape, inner = arrays[0].shape, axes
    while len(inner) > 1 and math.prod(shape[axis] for axis in inner) > _LONG_LOOP:
        inner = inner[1:]
    outer = axes[: len(axes) - len(inner)]
    if math.prod(shape[axis] for axis in inner) > _LONG_LOOP:
        arrays = [_fold(x) for x in arrays]
        inner, outer = (len(shape),), axes

    def add(x, y):
        return tuple(map(operator.add, x, y))

    zeros = (np.float32(0.0),) * len(arrays)
    sums = jax.lax.reduce(tuple(arrays), zeros, add, inner)
    count = math.prod(shape[axis] for axis in axes)
    return [jnp.expand_dims(jnp.sum(s, outer) / count, axes) for s in sums]


def _fold(array: jax.Array) -> jax.Array:
    """`[..., n]` -> `[..., m, n / m]` with the fewest m that are short enough, zeros at the end."""
    *lead, size = array.shape
    rows = -(-size // _LONG_LOOP)
    width = -(-size // rows)
    padded = jnp.pad(array, [(0, 0)] * len(lead) + [(0, rows * width - size)])
    return padded.reshape(*lead, rows, width)


def _small(gradient: jax.Array) -> jax.Array:
    return jnp.clip(gradient, -0.1, 0.1)


def _rsqrt(x: jax.Array) -> jax.Array:
    return jax.lax.rsqrt(jnp.maximum(x, _FLOOR))
