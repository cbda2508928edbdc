"""Running an optimizer on a task and keeping every state it visits."""

import contextlib
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import optax

from lohp_jax.checks import check_number_type
from lohp_jax.optimizers.extra_args import with_extra_args
from lohp_jax.types import Params, PyTree, TaskFamily, Trajectory


def rollout(
    family: TaskFamily,
    optimizer: optax.GradientTransformation,
    data: PyTree,
    params: Params,
    key: jax.Array,
    *,
    num_steps: int,
    record_every: int = 1,
) -> Trajectory:
    """Runs `optimizer` on one task (Lo-Hp, its weight preparation).

    Pure, one compiled loop: `jax.vmap` over `data`, `params` and `key` runs thousands of tasks at
    once, and over a learning rate, if the optimizer is built from it inside the vmapped function.

    Args:
      family: gives the inner loss.
      optimizer: any optax transformation; `update` is offered `value`, `grad`, `value_fn`, the same
        as `obj_fn`, and `grad_fn`, and gets those that it takes.
      data: the task.
      params: the start theta_0.
      key: randomness of the inner loss, a fresh part of it for each step.
      num_steps: T, >= 1.
      record_every: keep every n-th state; must divide `num_steps`.

    Returns: `Trajectory` of `num_steps / record_every + 1` states, start and end included, and the
      inner loss at each; `optimizer` is None.

    Raises: ValueError if `record_every` does not divide `num_steps`, for params that are no
      floating-point or complex arrays in a type of JAX's, or for a line search within a mask; TypeError
      for an optimizer within another that takes a part of what is offered.
    """
    if num_steps < 1 or record_every < 1 or num_steps % record_every:
        divisors = [n for n in range(1, num_steps + 1) if num_steps % n == 0]
        raise ValueError(
            f"rollout: expected num_steps >= 1 and a record_every that divides it, got "
            f"num_steps={num_steps} and record_every={record_every}; these do: {divisors}."
        )
    _check_start(params)
    optimizer = with_extra_args(optimizer)
    keys = jax.random.split(key, num_steps + 1)

    def step(carry, step_key):
        return _step(family, optimizer, data, carry, step_key)

    def segment(carry, segment_keys):
        end, values = jax.lax.scan(step, carry, segment_keys)
        return end, (carry[0], values[0])

    start = (params, optimizer.init(params))
    (last, _), (states, losses) = jax.lax.scan(segment, start, keys[:-1].reshape(-1, record_every))
    states = jax.tree.map(lambda s, end: jnp.concatenate([s, end[None]]), states, last)
    return Trajectory(states, jnp.append(losses, family.loss(last, data, keys[-1])), None)


def _check_start(params: Params) -> None:
    for path, leaf in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path) or "params"
        if hasattr(leaf, "dtype"):
            check_number_type("rollout", name, leaf.dtype)
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise ValueError(
                f"rollout: expected floating-point or complex params, got {jnp.result_type(leaf)} at "
                f"{name}; convert it, or keep it out of the params."
            )


def _step(family, optimizer, data, carry, key):
    """One step of an optimizer from `(params, opt_state)`, and the loss before it."""
    params, opt_state = carry

    def value_fn(params, grad_fn=None, obj_fn=None):  # line searches insist that it takes the rest
        del grad_fn, obj_fn
        return family.loss(_fill(params, carry[0]), data, key)

    def grad_fn(params, _):
        return _uphill(jax.grad(value_fn)(params))

    value, grads = jax.value_and_grad(value_fn)(params)
    grads = _uphill(grads)
    offered = {"value": value, "grad": grads}
    offered |= {"value_fn": value_fn, "obj_fn": value_fn, "grad_fn": grad_fn}
    with _refusals():
        updates, opt_state = optimizer.update(grads, opt_state, params, **offered)
    return (optax.apply_updates(params, updates), opt_state), value


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Names two reasons for which optimizers within others refuse what is offered."""
    try:
        yield
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise TypeError(
            f"rollout: an optimizer within another takes some of value, grad, value_fn, obj_fn and "
            f"grad_fn alone ({error}); wrap it in `lohp_jax.optimizers.with_extra_args`."
        ) from error
    except ValueError as error:
        if "MaskedNode" not in str(error):
            raise
        raise ValueError(
            "rollout: an optimizer that needs all parameters, as line searches do, was given some of "
            "them by optax.masked or optax.multi_transform; put in front of it "
            "optax.masked(optax.set_to_zero(), others) instead."
        ) from error


def _fill(params: PyTree, all_params: PyTree) -> PyTree:
    """Parameters with those that a mask hides: others are held fixed in the loss of a part."""

    def hidden(node):
        return isinstance(node, optax.MaskedNode)

    return jax.tree.map(
        lambda part, whole: whole if hidden(part) else part, params, all_params, is_leaf=hidden
    )


def _uphill(gradient: PyTree) -> PyTree:
    """What `jax.grad` returns as a direction: of complex numbers it is the conjugate."""
    return jax.tree.map(jnp.conj, gradient)


def over_tasks(fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """`jax.vmap(fn)` on an accelerator, `fn` for one task after another on a CPU; one compiled call.

    XLA multiplies batches of small matrices on a CPU two to three times slower than the same
    matrices one by one (`benchmarks/trajectories`), and keeps what every task holds in between.
    """

    together = jax.vmap(fn)

    def one_by_one(*tasks):
        return jax.lax.map(lambda task: fn(*task), tasks)

    @functools.wraps(together)
    def over_all(*tasks):
        return jax.lax.platform_dependent(*tasks, cpu=one_by_one, default=together)

    return over_all


def diverged(trajectory: Trajectory) -> jax.Array:
    """Whether a run is of no use: a state or loss that is not finite, or a loss that grew.

    Returns: bool scalar.
    """
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(trajectory.states)]
    bounded = jnp.all(jnp.isfinite(trajectory.losses))
    improved = trajectory.losses[-1] <= trajectory.losses[0]
    return ~(jnp.all(jnp.stack(finite)) & bounded & improved)
