"""What a solution is known to be worth: labels, references of gaps, and what certifies them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.types import ProblemFamily, PyTree

TOLERANCE = 1e-4
"""A label whose value is proven to be within this share of f*, or this far where f* may be 0, is f*."""
_BATCH = 256


class Reference(NamedTuple):
    """Solutions of `[M]` problems and what is proven of them.

    Attributes:
      x: `[M, n]`.
      value: `[M]` float64, the objective there.
      excess: `[M]` float64, how far the value is above f* at most; `inf` where nothing is proven.
      certified: `[M]` bool, whether the value is f* by `TOLERANCE`.
    """

    x: np.ndarray
    value: np.ndarray
    excess: np.ndarray
    certified: np.ndarray

    @property
    def floor(self) -> np.ndarray:
        """`[M]` what gaps count from: f* where it is certified; else a bound below f*, so that gaps are
        bounds from above; else, where nothing is proven, the value itself."""
        below = np.where(np.isfinite(self.excess), self.value - self.excess, self.value)
        return np.where(self.certified, self.value, below)


def certified(family: ProblemFamily, value: jax.Array, excess: jax.Array) -> jax.Array:
    """Whether a value is f*, by a bound on how far it is above; elementwise."""
    unit = abs(value) if family.composite else 1.0
    return excess <= TOLERANCE * unit


def solve_certified(family: ProblemFamily, problems: PyTree, keys: jax.Array) -> Reference:
    """Solves problems in their own precision, and again in float64 on the host what is not certified.

    Args:
      family: with `solve`; without `certificate` nothing is certified.
      problems: with a leading axis `[M]`.
      keys: `[M]`, of `family.solve`.

    Returns: the better of both solutions of each problem.
    """
    found = _solve(family, problems, keys)
    again = np.flatnonzero(~found.certified)
    if family.certificate is None or not again.size:
        return found
    some = jax.tree.map(lambda leaf: np.asarray(leaf)[again], problems)
    exact = solve_exactly(family, some, keys[again])
    better = exact.excess < found.excess[again]
    for old, new in zip(found, exact, strict=True):
        old[again[better]] = new[better]
    return found


def solve_exactly(family: ProblemFamily, problems: PyTree, keys: jax.Array) -> Reference:
    """Solves problems, arrays with a leading axis `[M]`, in float64 on the host."""
    host = jax.local_devices(backend="cpu")[0]
    wide = jax.tree.map(
        lambda leaf: np.float64(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
        jax.device_get(problems),
    )
    with jax.enable_x64(True), jax.default_device(host):
        return _solve(family, wide, jax.device_put(keys, host))


def _solve(family: ProblemFamily, problems: PyTree, keys: jax.Array) -> Reference:
    def one(item):
        problem, key = item
        x = family.solve(problem, key)
        value, excess = family.objective(x, problem), jnp.inf
        if family.certificate is not None:
            excess = family.certificate(x, problem)
        return x, value, excess

    solve = jax.jit(functools.partial(jax.lax.map, one, batch_size=_BATCH))
    x, value, excess = (np.array(a, np.float64) for a in solve((problems, keys)))
    return Reference(x, value, excess, np.array(certified(family, value, excess)))
