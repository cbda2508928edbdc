"""Training by Adam on the mean loss of a batch, as a `Training` of the engine."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lohp_jax.training.distributed import all_rows, own_rows
from lohp_jax.types import PyTree

LossFn = Callable[..., tuple[jax.Array, tuple[PyTree, dict[str, jax.Array]]]]


class FitState(NamedTuple):
    """Everything that an update changes.

    Attributes:
      params: what is trained.
      ema: its running mean.
      carry: what the loss hands to itself, leaves `[B, ...]`; () for nothing.
      opt_state: of the optimizer.
      step: int32 scalar, updates so far.
    """

    params: PyTree
    ema: PyTree
    carry: PyTree
    opt_state: optax.OptState
    step: jax.Array


def scheduled_adam(
    updates: int, learning_rate: float, *, warmup: int = 0, clip_norm: float = 1.0
) -> optax.GradientTransformation:
    """Adam behind a global clip; after a linear warm-up its rate falls along a cosine to a hundredth.

    Raises: ValueError for `updates` < 1 or a learning rate that is not finite and positive.
    """
    if updates < 1:
        raise ValueError(f"updates must be at least 1, got {updates}.")
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate must be finite and positive, got {learning_rate}.")
    first = 0.0 if warmup else learning_rate
    schedule = optax.warmup_cosine_decay_schedule(
        first, learning_rate, warmup, updates, learning_rate / 100
    )
    return optax.chain(optax.clip_by_global_norm(clip_norm), optax.adam(schedule))


def first_state(
    params: PyTree, optimizer: optax.GradientTransformation, carry: PyTree = ()
) -> FitState:
    """The state before the first update."""
    return FitState(params, params, carry, optimizer.init(params), jnp.zeros((), jnp.int32))


def make_update(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, ema: float = 0.0
) -> Callable[..., tuple[FitState, dict[str, jax.Array]]]:
    """Builds `update(state, batch, *replicated, axis_name=None) -> (state, metrics)`, pure.

    Args:
      loss_fn: `(params, carry, batch, step, *replicated) -> (loss, (carry, metrics))`; loss and metrics
        are means over the batch, leaves of batch and carry are `[B, ...]`.
      optimizer: of `scheduled_adam`.
      ema: largest decay of the running mean of the params; 0 keeps the last ones.
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def update(state, batch, *replicated, axis_name=None):
        own = own_rows(state.carry, len(jax.tree.leaves(batch)[0]), axis_name)
        (loss, (carry, info)), grads = grad_fn(state.params, own, batch, state.step, *replicated)
        if axis_name is not None:
            loss, info, grads = jax.lax.pmean((loss, info, grads), axis_name)
        changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, changes)
        decay = jnp.minimum(ema, (1.0 + state.step) / (10.0 + state.step))
        mean = optax.incremental_update(params, state.ema, 1.0 - decay)
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(grads), **info}
        carry = all_rows(carry, axis_name)
        return FitState(params, mean, carry, opt_state, state.step + 1), metrics

    return update
