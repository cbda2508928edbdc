"""Any solver from many starts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lohp_jax.solvers.trace import Trace, usable_values
from lohp_jax.types import ProblemFamily, PyTree

Solver = Callable[..., Trace]
"""`(family, problem, x0, num_steps, **options) -> Trace`."""


def multistart(
    family: ProblemFamily,
    problem: PyTree,
    starts: jax.Array,
    num_steps: int,
    *,
    solver: Solver,
    **options: Any,
) -> Trace:
    """Runs a solver from every start and keeps the run that ends lowest.

    Args:
      family: of the problem.
      problem: one.
      starts: `[K, n]`, e.g. of `gaussian_starts`.
      num_steps: of each run.
      solver: e.g. `damped_newton`.
      **options: of the solver.

    Returns: the best run, with the calls of all, and one objective for each end.

    Raises: ValueError for starts that are not `[K, n]`, K >= 1; what the solver raises.
    """
    if starts.ndim != 2 or not len(starts):
        raise ValueError(
            f"multistart: expected starts of shape [K, n] with K >= 1, got {list(starts.shape)}."
        )
    traces = jax.vmap(lambda x0: solver(family, problem, x0, num_steps, **options))(starts)
    best = jnp.argmin(usable_values(traces.x, traces.values[:, -1]))
    return jax.tree.map(lambda leaf: leaf[best], traces)._replace(
        objective_calls=jnp.sum(traces.objective_calls) + len(starts),
        gradient_calls=jnp.sum(traces.gradient_calls),
    )


def gaussian_starts(
    family: ProblemFamily, problem: PyTree, key: jax.Array, num_starts: int
) -> jax.Array:
    """`[num_starts, n]` points drawn from a normal distribution of the centre and scale of `frame`."""
    centre, scale = family.frame(problem)
    noise = jax.random.normal(key, (num_starts, *centre.shape), centre.dtype)
    return centre[None, :] + scale[None, :] * noise
