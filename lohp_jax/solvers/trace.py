"""What every solver returns."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from lohp_jax.types import ProblemFamily, PyTree

Objective = Callable[[jax.Array], jax.Array]
"""`(x [n]) -> scalar`."""
State = TypeVar("State")


class Trace(NamedTuple):
    """The way of a solver on one problem. Under `jit`, what is not used of it is not computed.

    Attributes:
      x: `[n]` the last iterate.
      path: `[num_steps + 1, n]` every iterate; entry 0 is the start.
      values: `[num_steps + 1]` the objective at each.
      objective_calls: int32, evaluations of the objective that the method needs; those that only fill
        `values` do not count.
      gradient_calls: int32, likewise of its gradient, or of a pair of products with A and A^T.
    """

    x: jax.Array
    path: jax.Array
    values: jax.Array
    objective_calls: jax.Array
    gradient_calls: jax.Array


def objective_of(family: ProblemFamily, problem: PyTree) -> Objective:
    """The objective of one problem, as a function of x alone."""
    return lambda x: family.objective(x, problem)


def iterate(
    step: Callable[[State], State],
    state: State,
    num_steps: int,
    position: Callable[[State], jax.Array],
) -> tuple[State, jax.Array]:
    """Applies `step` `num_steps` times.

    Args:
      step: `(state) -> state`.
      state: where it starts.
      num_steps: 0 or more.
      position: `(state) -> x`.

    Returns: the last state, and `[num_steps + 1, n]` the position of every one.

    Raises: ValueError for a negative `num_steps`.
    """
    if num_steps < 0:
        raise ValueError(f"solver: num_steps must be 0 or more, got {num_steps}.")

    def body(state, _):
        state = step(state)
        return state, position(state)

    last, path = jax.lax.scan(body, state, None, length=num_steps)
    return last, jnp.concatenate([position(state)[None], path])


def make_trace(
    objective: Objective,
    x: jax.Array,
    path: jax.Array,
    *,
    objective_calls: int | jax.Array,
    gradient_calls: int | jax.Array,
) -> Trace:
    """A `Trace` with the values along its path."""
    calls = (jnp.asarray(count, jnp.int32) for count in (objective_calls, gradient_calls))
    return Trace(x, path, jax.vmap(objective)(path), *calls)


def usable_values(path: jax.Array, values: jax.Array) -> jax.Array:
    """Values along a path, infinite where the value or the point is not finite.

    Args:
      path: `[..., n]` points.
      values: `[...]` of the objective.
    """
    usable = jnp.isfinite(values) & jnp.all(jnp.isfinite(path), axis=-1)
    return jnp.where(usable, values, jnp.inf)


def best_iterate(trace: Trace) -> tuple[jax.Array, jax.Array]:
    """The best of all iterates and its value; `inf` where none is finite."""
    values = usable_values(trace.path, trace.values)
    best = jnp.argmin(values)
    return trace.path[best], values[best]
