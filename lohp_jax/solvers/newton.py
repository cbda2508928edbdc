"""Newton's method, made safe far from a minimum."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lohp_jax.solvers.trace import Trace, iterate, make_trace, objective_of, usable_values
from lohp_jax.types import ProblemFamily, PyTree

_DAMPINGS = (0.0, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


def damped_newton(
    family: ProblemFamily,
    problem: PyTree,
    x0: jax.Array,
    num_steps: int,
    *,
    dampings: Sequence[float] = _DAMPINGS,
) -> Trace:
    """Newton's method with Levenberg damping, chosen by trial; the objective never rises.

    With the Hessian V diag(λ) V^T, the trials are x - V (V^T grad f / (|λ| + μ max|λ|)), one for each
    damping μ; the best of them and of x itself is next. |λ| leads away from saddles and maxima.

    Args:
      family: gives the objective.
      problem: one.
      x0: `[n]` start.
      num_steps: iterations; each counts as n + 1 gradients, n of them for the Hessian, and one
        objective for every damping. Time grows as n³.
      dampings: μ >= 0, tried at every step.

    Raises: ValueError for no or negative dampings, or a negative `num_steps`.
    """
    if not dampings or min(dampings) < 0:
        raise ValueError(f"damped_newton: expected dampings of 0 or more, got {dampings}.")
    objective = objective_of(family, problem)
    factors = jnp.asarray(dampings, x0.dtype)

    def step(state):
        x, value = state
        curvature, axes = jnp.linalg.eigh(jax.hessian(objective)(x))
        curvature = jnp.abs(curvature)
        slope = axes.T @ jax.grad(objective)(x)
        size = jnp.maximum(jnp.max(curvature), jnp.finfo(x.dtype).tiny)
        floor = jnp.finfo(x.dtype).eps * size  # for directions without any curvature
        damped = jnp.maximum(curvature, floor)[None, :] + size * factors[:, None]
        trials = x[None, :] - (slope[None, :] / damped) @ axes.T
        trials = jnp.concatenate([x[None, :], trials])
        values = jnp.append(value, jax.vmap(objective)(trials[1:]))
        values = usable_values(trials, values)
        best = jnp.argmin(values)
        return trials[best], values[best]

    (x, _), path = iterate(step, (x0, objective(x0)), num_steps, lambda state: state[0])
    return make_trace(
        objective,
        x,
        path,
        objective_calls=1 + num_steps * len(dampings),
        gradient_calls=num_steps * (1 + len(x0)),
    )
