"""Adam in compiled chunks, for denoisers and their learned rivals."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lohp_jax.types import Progress, PyTree

_RUNS_ONCE = {"xla_backend_optimization_level": 0}  # halves the compilation


class FitState(NamedTuple):
    """Everything that an update changes.

    Attributes:
      params: what is trained.
      ema: its running mean.
      carry: what the loss hands to itself.
      opt_state: of the optimizer.
      step: int32 scalar, updates so far.
    """

    params: PyTree
    ema: PyTree
    carry: PyTree
    opt_state: optax.OptState
    step: jax.Array


OnProgress = Callable[[Progress], None]
OnState = Callable[[str, FitState], None]
LossFn = Callable[..., tuple[jax.Array, tuple[PyTree, dict[str, jax.Array]]]]
Start = Callable[[jax.Array], tuple[PyTree, PyTree]]


def silent(*told: Any) -> None:
    """Does nothing with what it is told."""


def make_optimizer(
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
    start: Start, optimizer: optax.GradientTransformation, key: jax.Array
) -> tuple[FitState, jax.Array]:
    """The state before the first update, and the key of all updates."""
    start_key, key = jax.random.split(key)
    params, carry = start(start_key)
    return FitState(params, params, carry, optimizer.init(params), jnp.zeros((), jnp.int32)), key


def make_update(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, ema: float = 0.0
) -> Callable[..., tuple[FitState, dict[str, jax.Array]]]:
    """Builds `(state, key, data) -> (state, metrics)`, pure; `key` is the same in all updates."""

    def update(state, key, data):
        step_key = jax.random.fold_in(key, state.step)
        (loss, (carry, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, state.carry, data, state.step, step_key
        )
        changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, changes)
        decay = jnp.minimum(ema, (1.0 + state.step) / (10.0 + state.step))
        mean = optax.incremental_update(params, state.ema, 1.0 - decay)
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(grads), **metrics}
        return FitState(params, mean, carry, opt_state, state.step + 1), metrics

    return update


def fit(
    method: str,
    loss_fn: LossFn,
    start: Start,
    key: jax.Array,
    *,
    updates: int,
    optimizer: optax.GradientTransformation,
    ema: float = 0.0,
    data: PyTree = (),
    log_every: int = 100,
    on_progress: OnProgress = silent,
    state: FitState | None = None,
    on_state: OnState = silent,
) -> PyTree:
    """Minimises a loss. A state from which one goes on gives the same bits as no interruption.

    Args:
      method: name, for progress and messages.
      loss_fn: `(params, carry, data, step, key) -> (loss, (carry, metrics))`.
      start: `(key) -> (params, carry)`; the carry is () for none.
      key: randomness of start and loss.
      updates: at least 1.
      optimizer: of `make_optimizer`.
      ema: largest decay of the running mean of the params; 0 keeps the last ones.
      data: of the loss, the same in all updates.
      log_every: updates per compiled chunk, and per call of `on_progress`.
      on_progress: told of each chunk.
      state: where to go on; None for the start.
      on_state: told the method and its state after each chunk.

    Returns: the running mean of the params.

    Raises: ValueError for `log_every` < 1; FloatingPointError for a loss or gradient that is not finite.
    """
    if log_every < 1:
        raise ValueError(f"{method}: log_every must be at least 1, got {log_every}.")

    update = make_update(loss_fn, optimizer, ema)

    @functools.partial(jax.jit, static_argnames="count")
    def run_chunk(state, key, data, count):
        return jax.lax.scan(lambda state, _: update(state, key, data), state, length=count)

    begin = jax.jit(functools.partial(first_state, start, optimizer), compiler_options=_RUNS_ONCE)
    fresh, key = begin(key)
    state = fresh if state is None else state
    while (step := int(state.step)) < updates:
        begun, count = time.perf_counter(), min(log_every, updates - step)
        state, values = jax.block_until_ready(run_chunk(state, key, data, count))
        rate = count / (time.perf_counter() - begun)
        values = jax.device_get(values)
        _check_finite(method, values, step)
        means = {name: float(value.mean()) for name, value in values.items()}
        on_state(method, state)
        on_progress(Progress(method, step + count, updates, means, rate))
    return state.ema


def _check_finite(method: str, values: dict[str, np.ndarray], step: int) -> None:
    bad = ~(np.isfinite(values["loss"]) & np.isfinite(values["gradient_norm"]))
    if bad.any():
        raise FloatingPointError(
            f"{method}: loss or gradient were not finite at update {step + bad.argmax() + 1}; lower "
            "the learning rate, and see that the family's objective, its label solver and its frame "
            "are finite on its own problems."
        )
