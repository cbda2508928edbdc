"""Solvers for f = g + h with g smooth and h simple: proximal gradient and coordinate descent."""

import jax
import jax.numpy as jnp

from lohp_jax.solvers.trace import Trace, iterate, make_trace, objective_of
from lohp_jax.types import Composite, ProblemFamily, PyTree


def soft_threshold(x: jax.Array, threshold: jax.Array) -> jax.Array:
    """The proximal map of `threshold` |x|_1: sign(x) max(|x| - threshold, 0), entry by entry."""
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - threshold, 0.0)


def ista(
    family: ProblemFamily,
    problem: PyTree,
    x0: jax.Array,
    num_steps: int,
    *,
    lipschitz: jax.Array | None = None,
) -> Trace:
    """Proximal gradient: x <- prox(x - grad g(x) / L).

    Args:
      family: with `composite`.
      problem: one.
      x0: `[n]` start.
      num_steps: iterations, one gradient each.
      lipschitz: L; None for the family's own bound.

    Raises: ValueError for a family without `composite`, or a negative `num_steps`.
    """
    composite = _composite_of("ista", family)
    lipschitz = composite.lipschitz(problem) if lipschitz is None else lipschitz

    def step(x):
        return _proximal_step(composite, problem, x, lipschitz)

    x, path = iterate(step, x0, num_steps, lambda x: x)
    objective = objective_of(family, problem)
    return make_trace(objective, x, path, objective_calls=0, gradient_calls=num_steps)


def fista(
    family: ProblemFamily,
    problem: PyTree,
    x0: jax.Array,
    num_steps: int,
    *,
    restart: bool = False,
    lipschitz: jax.Array | None = None,
) -> Trace:
    """Accelerated proximal gradient (Beck and Teboulle, 2009).

    x_k = prox(y_k - grad g(y_k) / L), t_{k+1} = (1 + √(1 + 4 t_k²)) / 2 and
    y_{k+1} = x_k + (t_k - 1) / t_{k+1} (x_k - x_{k-1}).

    Args:
      family: with `composite`.
      problem: one.
      x0: `[n]` start.
      num_steps: iterations, one gradient each.
      restart: drop the momentum where it points uphill, (y_k - x_k)·(x_k - x_{k-1}) > 0 (O'Donoghue
        and Candès, 2015); far faster close to the solution.
      lipschitz: L; None for the family's own bound.

    Raises: ValueError for a family without `composite`, or a negative `num_steps`.
    """
    composite = _composite_of("fista", family)
    lipschitz = composite.lipschitz(problem) if lipschitz is None else lipschitz

    def step(state):
        x, y, t = state
        new = _proximal_step(composite, problem, y, lipschitz)
        uphill = jnp.vdot(y - new, new - x) > 0.0
        t = jnp.where(uphill, 1.0, t) if restart else t
        next_t = (1.0 + jnp.sqrt(1.0 + 4.0 * t**2)) / 2.0
        return new, new + (t - 1.0) / next_t * (new - x), next_t

    state = (x0, x0, jnp.ones((), x0.dtype))
    (x, *_), path = iterate(step, state, num_steps, lambda state: state[0])
    objective = objective_of(family, problem)
    return make_trace(objective, x, path, objective_calls=0, gradient_calls=num_steps)


def coordinate_descent(
    family: ProblemFamily, problem: PyTree, x0: jax.Array, num_steps: int
) -> Trace:
    """Minimises a LASSO over one coordinate after another, in their order.

    A sweep over all coordinates costs about one product with A and one with A^T, and counts as one
    gradient.

    Args:
      family: gives the objective.
      problem: of a LASSO: `A` `[m, n]`, `b` `[m]` and `penalty`.
      x0: `[n]` start.
      num_steps: sweeps.

    Raises: ValueError for a problem of another family, or a negative `num_steps`.
    """
    if not {"A", "b", "penalty"} <= problem.keys():
        raise ValueError(
            "coordinate_descent: expected a LASSO with 'A', 'b' and 'penalty', got "
            f"{sorted(problem)}; use `lbfgs` or `run_optax`."
        )
    # of y = unit * x, whose columns have entries of about one: squares of small ones are no numbers
    largest = jnp.max(jnp.abs(problem["A"]), axis=0, initial=0.0)
    unit = jnp.where(largest > 0, largest, 1.0)
    columns, penalty = problem["A"].T / unit[:, None], problem["penalty"] / unit
    squares = jnp.sum(columns**2, axis=1)

    def update(i, state):
        y, residual = state  # residual = b - A x
        towards = soft_threshold(jnp.vdot(columns[i], residual) + squares[i] * y[i], penalty[i])
        new = jnp.where(largest[i] > 0, towards / jnp.maximum(squares[i], 1.0), 0.0)
        return y.at[i].set(new), residual - (new - y[i]) * columns[i]

    def sweep(state):
        return jax.lax.fori_loop(0, len(columns), update, state)

    state = (unit * x0, problem["b"] - problem["A"] @ x0)
    (y, _), path = iterate(sweep, state, num_steps, lambda state: state[0] / unit)
    x = y / unit
    objective = objective_of(family, problem)
    return make_trace(objective, x, path, objective_calls=0, gradient_calls=num_steps)


def _proximal_step(
    composite: Composite, problem: PyTree, x: jax.Array, lipschitz: jax.Array
) -> jax.Array:
    gradient = jax.grad(composite.smooth)(x, problem)
    return composite.prox(x - gradient / lipschitz, 1.0 / lipschitz, problem)


def _composite_of(solver: str, family: ProblemFamily) -> Composite:
    if family.composite is None:
        raise ValueError(
            f"{solver}: expected a family with a proximal map (`composite`), got {family.name!r}; "
            "use `damped_newton`, `lbfgs` or `run_optax`."
        )
    return family.composite
