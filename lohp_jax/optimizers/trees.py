"""Pytrees of parameters as dicts by path, and whether `update` gets those that `init` saw."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lohp_jax.types import PyTree

Path = tuple[str, ...]
Tensors = dict[Path, jax.Array]


def by_path(tree: PyTree) -> Tensors:
    """Leaves by their keys as strings; None and masked leaves are none."""
    return {keys(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def keys(path: tuple) -> Path:
    """The keys of a path of `jax.tree_util` as strings."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def name_of(path: Path) -> str:
    """One string for a path, as states use it for keys; unique where `check_params` has passed."""
    return "/".join(path)


def wide(array: jax.Array) -> jax.Array:
    """At least float32."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def check_params(function: str, params: PyTree) -> None:
    """Raises: ValueError for what cannot be moved by a fraction, and for names that are not unique."""
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
        for last, part in enumerate((path[:-1], path)):  # module and tensor
            other = names.setdefault((last, name_of(part)), part)
            if other != part:
                raise ValueError(
                    f"{function}: expected unique names, got {name_of(part)!r} for the keys {other} "
                    f"and {part}; rename one."
                )


def check_same_params(
    function: str, init: Callable[[PyTree], PyTree], updates: PyTree, params: PyTree, state: PyTree
) -> None:
    """Gradients must fit the parameters (if any), and the state be of the shapes that `init` makes.

    Raises: ValueError with the first tensor, or the first array of the state, that does not fit.
    """
    shapes = _shapes(updates)
    if params is not None:
        for path, shape, expected in _differences(shapes, _shapes(params)):
            raise ValueError(
                f"{function}: the gradient at {path} has shape {shape}, its parameter {expected}; "
                "expected one gradient for every parameter, of the same shape."
            )
    needed = jax.eval_shape(init, updates if params is None else params)
    for path, shape, expected in _differences(_shapes(state), _shapes(needed)):
        raise ValueError(
            f"{function}: the parameters have changed since init saw them (the state at {path} has "
            f"shape {shape}, they need {expected}); call init again."
        )


def _shapes(tree: PyTree) -> dict[Path, tuple[int, ...]]:
    return {path: jnp.shape(leaf) for path, leaf in by_path(tree).items()}


def _differences(actual: dict, expected: dict) -> list[tuple]:
    """Name, and both shapes, where they differ; None for what is missing."""
    return [
        (name_of(path) or "the root", actual.get(path), expected.get(path))
        for path in sorted(expected.keys() | actual.keys())
        if expected.get(path) != actual.get(path)
    ]
