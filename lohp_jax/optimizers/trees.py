"""Pytrees of parameters as dicts by path, and whether `update` gets those that `init` saw."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from lohp_jax.checks import check_number_type
from lohp_jax.types import PyTree

Path = tuple[str, ...]
Tensors = dict[Path, jax.Array]
_BOX = jax.tree_util.GetAttrKey("value")


def by_path(tree: PyTree) -> Tensors:
    """Leaves by their keys as strings; None and masked leaves are none."""
    return {keys(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def keys(path: tuple) -> Path:
    """The keys of a path of `jax.tree_util` as strings, the box of a variable of NNX or Linen left out.

    NNX shows an optimizer boxed variables in `init` and their arrays in `update`.
    """
    if path and path[-1] == _BOX:
        path = path[:-1]
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def name_of(path: Path) -> str:
    """One string for a path, as states use it for keys; unique where `check_params` has passed."""
    return "/".join(path)


def wide(array: jax.Array) -> jax.Array:
    """At least float32."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def check_params(function: str, params: PyTree) -> None:
    """Raises: ValueError for what cannot be moved by a fraction, for types of numbers that JAX has not,
    and for names that are not unique."""
    names: dict[tuple[int, str], Path] = {}
    for path, leaf in by_path(params).items():
        where = name_of(path) or "the root"
        if not hasattr(leaf, "dtype"):
            raise ValueError(
                f"{function}: expected arrays as parameters, got {leaf!r} at {where}; use jnp.asarray."
            )
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ValueError(
                f"{function}: expected floating-point or complex parameters, got {leaf.dtype} at "
                f"{where}; leave it out with optax.masked."
            )
        check_number_type(function, where, leaf.dtype)
        for last, part in enumerate((path[:-1], path)):  # layer and tensor
            other = names.setdefault((last, name_of(part)), part)
            if other != part:
                raise ValueError(
                    f"{function}: expected unique names, got {name_of(part)!r} for the keys {other} "
                    f"and {part}; rename one."
                )


def check_whole(function: str, params: PyTree) -> None:
    """For optimizers that evaluate the loss, which is one of all parameters.

    Raises: ValueError for the parameters that an optimizer within a mask is shown.
    """
    nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    if any(isinstance(node, optax.MaskedNode) for node in nodes):
        raise ValueError(
            f"{function}: it evaluates the loss, which needs all parameters, and was given some of them "
            f"by optax.masked or optax.multi_transform; put these inside, e.g. {function}(optax.masked("
            "...)), or leave them out."
        )


def check_same_params(
    function: str, init: Callable[[PyTree], PyTree], updates: PyTree, params: PyTree, state: PyTree
) -> None:
    """Gradients must fit the parameters (if any), and the state be of the shapes that `init` makes.

    Arrays may have come where `init` left nothing, as in optimizers that measure or keep something from
    their first update on.

    Raises: ValueError with the first tensor, or the first array of the state, that does not fit.
    """
    shapes = _shapes(updates)
    if params is not None:
        for path, shape, expected in _differences(shapes, _shapes(params)):
            raise ValueError(
                f"{function}: the gradient at {_where(path)} has shape {shape}, its parameter "
                f"{expected}; expected one gradient for every parameter, of the same shape."
            )
        _check_gradients(function, by_path(updates), by_path(params))
    needed = jax.eval_shape(init, updates if params is None else params)
    for path, shape, expected in _differences(_shapes(state), _shapes(needed)):
        if expected is None and _has_come(path, needed, updates if params is None else params):
            continue
        raise ValueError(
            f"{function}: the parameters have changed since init saw them (the state at {_where(path)} "
            f"has shape {shape}, they need {expected}); call init again."
        )


def _check_gradients(function: str, updates: Tensors, params: Tensors) -> None:
    for path, gradient in updates.items():
        if not jnp.issubdtype(params[path].dtype, jnp.inexact):  # not held, as by a pull
            continue
        kind = jnp.complexfloating if jnp.iscomplexobj(params[path]) else jnp.floating
        if not jnp.issubdtype(gradient.dtype, kind):
            raise ValueError(
                f"{function}: the gradient at {_where(path)} is of type {gradient.dtype}, its parameter "
                f"of {params[path].dtype}; expected both real or both complex, as of jax.grad."
            )
        check_number_type(function, f"the gradient at {_where(path)}", gradient.dtype)


def fill(old: PyTree, like: PyTree) -> PyTree:
    """A state in the structure of one that may have grown since; what has come is zero."""
    there = dict(jax.tree.leaves_with_path(old))
    return jax.tree.map_with_path(
        lambda path, leaf: there[path] if path in there else jnp.zeros_like(leaf), like
    )


def _shapes(tree: PyTree) -> dict[Path, tuple[int, ...]]:
    return {path: jnp.shape(leaf) for path, leaf in by_path(tree).items()}


def _differences(actual: dict, expected: dict) -> list[tuple]:
    """Path, and both shapes, where they differ; None for what is missing."""
    return [
        (path, actual.get(path), expected.get(path))
        for path in sorted(expected.keys() | actual.keys())
        if expected.get(path) != actual.get(path)
    ]


def _where(path: Path) -> str:
    return name_of(path) or "the root"


def _has_come(path: Path, needed: PyTree, params: PyTree) -> bool:
    """Whether an array stands where `init` left nothing, other than one of a parameter that is gone."""
    lost = [place for place in _empty(params) if place]
    return any(
        path[: len(place)] == place and not any(path[-len(tail) :] == tail for tail in lost)
        for place in _empty(needed)
    )


def _empty(tree: PyTree) -> list[Path]:
    """Paths of the parts of a tree that have no leaves."""

    def is_empty(node):
        return not jax.tree.leaves(node)

    found = jax.tree.leaves_with_path(tree, is_leaf=is_empty)
    return [keys(path) for path, node in found if is_empty(node)]
