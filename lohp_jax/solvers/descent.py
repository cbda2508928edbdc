"""Optimizers of optax as solvers."""

import jax
import jax.numpy as jnp
import optax

from lohp_jax.solvers.trace import Objective, Trace, iterate, make_trace, objective_of
from lohp_jax.types import ProblemFamily, PyTree


def descend(
    objective: Objective, x0: jax.Array, num_steps: int, optimizer: optax.GradientTransformation
) -> Trace:
    """Runs an optax transformation on any function, one gradient a step.

    Args:
      objective: `(x) -> scalar`.
      x0: `[n]` start.
      num_steps: updates.
      optimizer: without a line search, whose evaluations would not be counted; those: `lbfgs`.

    Raises: ValueError for a negative `num_steps`.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def step(state):
        x, opt_state = state
        value, gradient = jax.value_and_grad(objective)(x)
        updates, opt_state = optimizer.update(
            gradient, opt_state, x, value=value, grad=gradient, value_fn=objective
        )
        return optax.apply_updates(x, updates), opt_state

    (x, _), path = iterate(step, (x0, optimizer.init(x0)), num_steps, lambda state: state[0])
    return make_trace(objective, x, path, objective_calls=0, gradient_calls=num_steps)


def run_optax(
    family: ProblemFamily,
    problem: PyTree,
    x0: jax.Array,
    num_steps: int,
    *,
    optimizer: optax.GradientTransformation,
) -> Trace:
    """`descend` on a problem of a family, in the common form of the solvers."""
    return descend(objective_of(family, problem), x0, num_steps, optimizer)


def lbfgs(
    family: ProblemFamily, problem: PyTree, x0: jax.Array, num_steps: int, *, memory_size: int = 10
) -> Trace:
    """L-BFGS with a zoom line search (`optax.lbfgs`), whose evaluations are all counted.

    Args:
      family: gives the objective.
      problem: one.
      x0: `[n]` start.
      num_steps: updates; each takes one value and one gradient for every step of its line search.
      memory_size: past updates that make up the approximate Hessian.

    Raises: ValueError for a negative `num_steps`.
    """
    objective = objective_of(family, problem)
    optimizer = optax.lbfgs(memory_size=memory_size)

    def step(state):
        x, value, gradient, opt_state, calls = state
        updates, opt_state = optimizer.update(
            gradient, opt_state, x, value=value, grad=gradient, value_fn=objective
        )
        search = opt_state[-1]  # the line search has evaluated the new point
        calls += jnp.asarray(search.info.num_linesearch_steps, jnp.int32)
        return optax.apply_updates(x, updates), search.value, search.grad, opt_state, calls

    value, gradient = jax.value_and_grad(objective)(x0)
    state = (x0, value, gradient, optimizer.init(x0), jnp.ones((), jnp.int32))
    (x, *_, calls), path = iterate(step, state, num_steps, lambda state: state[0])
    return make_trace(objective, x, path, objective_calls=calls, gradient_calls=calls)
