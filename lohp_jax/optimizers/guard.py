"""The guard of what mixes two optimizers: nothing that is not finite reaches parameters or lasts."""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lohp_jax.optimizers.trees import fill
from lohp_jax.types import PyTree

Tensors = dict[Hashable, jax.Array]


def not_finite(tensors: Tensors, guarded: list[Hashable]) -> Tensors:
    """By path, whether any entry is not finite."""
    if not guarded:
        return {}
    tensors = {path: tensors[path] for path in guarded}
    wide = {path: jnp.promote_types(x.dtype, jnp.float32) for path, x in tensors.items()}
    finite = {path: jnp.isfinite(jnp.sum(x, dtype=wide[path])) for path, x in tensors.items()}

    def none(tensors):
        return jax.tree.map(lambda x: jnp.zeros((), bool), tensors)

    def look(tensors):
        return jax.tree.map(lambda x: ~jnp.all(jnp.isfinite(x)), tensors)

    # a finite sum has finite terms only; one that is not may have overflowed
    return branch(functools.reduce(jnp.logical_and, finite.values()), none, look, tensors)


def branch(flag: jax.Array, if_true: Callable, if_false: Callable, *operands: PyTree) -> PyTree:
    """`jax.lax.cond`; of a known flag the branch alone, as each new closure would be compiled."""
    if isinstance(flag, jax.core.Tracer):
        return jax.lax.cond(flag, if_true, if_false, *operands)
    return (if_true if flag else if_false)(*operands)


def replace(tensors: Tensors, where: Tensors, others: Tensors | None = None) -> Tensors:
    """`others`, or zeros, instead of the tensors where so flagged."""
    out = dict(tensors)
    for path, flag in where.items():
        out[path] = _where(flag, others[path] if others else 0, tensors[path])
    return out


def repair(
    params: PyTree,
    structure: Any,
    optimizer: optax.GradientTransformation,
    updates: Tensors,
    state: optax.OptState,
    bad: Tensors,
    others: Tensors | None,
) -> tuple[Tensors, optax.OptState]:
    """Other updates for bad tensors, and a fresh state; also for what all share if not finite.

    What belongs to a tensor is known by the structure of the parameters. In the states of `optax.masked`
    and `optax.partition`, which have another one, an array starts anew if it is not finite itself. One
    that has come since the start begins at zero.

    In a branch of its own: a select over every state would cost as much as an optimizer step, and what
    enters a branch is computed once, where XLA would compute a fused update again for each of its uses.
    """
    if not bad:
        return updates, state
    flags = structure.unflatten([bad.get(path, jnp.zeros((), bool)) for path in updates])

    def mirrors_params(node):
        return jax.tree.structure(node) == structure

    def fresh(node, new):
        if hasattr(node, "dtype") and not jnp.issubdtype(node.dtype, jnp.inexact):
            return node  # a count or a key, also where the parameters are one array
        if mirrors_params(node):
            return jax.tree.map(_where, flags, new, node)
        return _where(~jnp.all(jnp.isfinite(node)), new, node)

    def repaired(updates, state):
        start = fill(optimizer.init(params), state)
        state = jax.tree.map(fresh, state, start, is_leaf=mirrors_params)
        return replace(updates, bad, others), state

    any_bad = functools.reduce(jnp.logical_or, bad.values())
    return branch(any_bad, repaired, lambda *same: same, updates, state)


def _where(flag: jax.Array, other: jax.Array | int, leaf: jax.Array) -> jax.Array:
    return jnp.where(flag, other, leaf).astype(leaf.dtype)
