"""Improving proposed solutions with a classic optimizer, never to end below its own result."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lohp_jax.solvers.descent import descend
from lohp_jax.solvers.trace import Objective, Trace, best_iterate, usable_values

Runner = Callable[[jax.Array, int], Trace]
"""`(x0, num_steps) -> Trace`, e.g. `functools.partial(fista, family, problem)`."""


class Refined(NamedTuple):
    """What `refine` returns.

    Attributes:
      x: `[n]` the result.
      value: the objective there, or `inf` if it is not finite.
      values: `[K]` the same for each proposal alone.
      baseline: the same for the baseline alone; `inf` without one.
      objective_calls: int32, evaluations of the objective, those of the safeguard included.
      gradient_calls: int32, likewise of the gradient.
      curve: `[num_steps + 1]`, best value of all proposals so far.
    """

    x: jax.Array
    value: jax.Array
    values: jax.Array
    baseline: jax.Array
    objective_calls: jax.Array
    gradient_calls: jax.Array
    curve: jax.Array


def refine(
    objective: Objective,
    x0: jax.Array,
    optimizer: optax.GradientTransformation | Runner,
    num_steps: int,
    *,
    safeguard: bool = True,
    baseline: jax.Array | None = None,
) -> Refined:
    """Improves one or several proposals and keeps the best result (Diff-L2O, its last stage).

    Proposals that are not finite, or whose value is not, never win over one that is. With the
    safeguard a run counts with the best of its iterates, its start included; so the result is never
    worse than any proposal, nor, with `baseline`, than what the same optimizer finds from there in as
    many steps.

    Args:
      objective: `(x) -> scalar`.
      x0: `[n]` a proposal, or `[K, n]` of them.
      optimizer: of optax, or a solver with everything but the start and `num_steps` filled in, e.g.
        `functools.partial(fista, family, problem)`.
      num_steps: of every run; 0 only picks the best.
      safeguard: keep the best iterate; otherwise the last, as the optimizer alone would.
      baseline: `[n]` another start, e.g. `family.start(problem)`, whose run costs as much as that of a
        proposal; only with the safeguard.

    Raises: ValueError for proposals of another shape, none of them, or a baseline of another shape or
      without the safeguard; what the optimizer raises.
    """
    starts = jnp.atleast_2d(x0)
    _check_starts(starts, baseline, safeguard)
    if baseline is not None:
        starts = jnp.concatenate([starts, baseline[None].astype(starts.dtype)])
    if isinstance(optimizer, optax.GradientTransformation):
        transformation = optimizer

        def optimizer(start, num_steps):
            return descend(objective, start, num_steps, transformation)

    def run(start):
        trace = optimizer(start, num_steps)
        if safeguard:
            return trace, *best_iterate(trace)
        return trace, trace.x, usable_values(trace.x, trace.values[-1])

    traces, points, values = jax.vmap(run)(starts)
    best = jnp.argmin(values)
    looks = len(starts) * (num_steps + 1 if safeguard else 1)
    count = len(starts) - (baseline is not None)
    passed = usable_values(traces.path, traces.values)[:count]
    return Refined(
        points[best],
        values[best],
        values[:count],
        jnp.full_like(values[0], jnp.inf) if baseline is None else values[-1],
        jnp.sum(traces.objective_calls) + looks,
        jnp.sum(traces.gradient_calls),
        jax.lax.cummin(jnp.min(passed, axis=0)),
    )


def _check_starts(starts: jax.Array, baseline: jax.Array | None, safeguard: bool) -> None:
    if starts.ndim != 2 or not len(starts):
        raise ValueError(
            f"refine: expected x0 of shape [n] or [K, n], K >= 1, got {list(starts.shape)}; "
            "flatten weights first."
        )
    if baseline is None:
        return
    if baseline.shape != starts.shape[1:]:
        raise ValueError(
            f"refine: expected a baseline of shape {list(starts.shape[1:])}, as the proposals, "
            f"got {list(baseline.shape)}."
        )
    if not safeguard:
        raise ValueError(
            "refine: expected safeguard=True with a baseline, got False; leave the baseline out."
        )
