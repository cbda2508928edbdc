"""Adam in compiled chunks, for the learned rivals of Diff-L2O."""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lohp_jax.diffusion.training import Progress
from lohp_jax.types import PyTree

CLIP_NORM = 1.0
RUNS_ONCE = {"xla_backend_optimization_level": 0}
"""Options for `jax.jit` that halve the compilation."""
OnProgress = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Says nothing of the progress."""


class _State(NamedTuple):
    """Everything that an update changes; `carry` is what the loss hands to itself."""

    params: PyTree
    carry: PyTree
    opt_state: optax.OptState
    step: jax.Array


def fit(
    method: str,
    loss_fn: Callable[[PyTree, PyTree, jax.Array, jax.Array], tuple[jax.Array, PyTree]],
    params: PyTree,
    carry: PyTree,
    key: jax.Array,
    *,
    updates: int,
    learning_rate: float,
    log_every: int = 100,
    on_progress: OnProgress = silent,
) -> PyTree:
    """Minimises a loss by Adam behind a global clip, its rate falling to a hundredth along a cosine.

    Args:
      method: name, for progress and messages.
      loss_fn: `(params, carry, step, key) -> (loss, carry)`.
      params: at the start.
      carry: of the loss, at the start; () for none.
      key: randomness of the loss.
      updates: at least 1.
      learning_rate: at the start.
      log_every: updates per compiled chunk, and per call of `on_progress`.
      on_progress: told of each chunk.

    Returns: the trained params.

    Raises: ValueError for counts under 1 or a learning rate that is not positive; FloatingPointError
      for a loss or gradient that is not finite.
    """
    for name, count in (("updates", updates), ("log_every", log_every)):
        if count < 1:
            raise ValueError(f"{method}: {name} must be at least 1, got {count}.")
    if not 0 < learning_rate < float("inf"):
        raise ValueError(
            f"{method}: learning_rate must be finite and positive, got {learning_rate}."
        )
    schedule = optax.cosine_decay_schedule(learning_rate, updates, 0.01)
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP_NORM), optax.adam(schedule))

    def update(state, _):
        step_key = jax.random.fold_in(key, state.step)
        (loss, carry), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, state.carry, state.step, step_key
        )
        changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = _State(optax.apply_updates(state.params, changes), carry, opt_state, state.step + 1)
        return new, {"loss": loss, "gradient_norm": optax.tree.norm(grads)}

    @functools.partial(jax.jit, static_argnames="count")
    def run_chunk(state, count):
        return jax.lax.scan(update, state, length=count)

    def init(params, carry):
        return _State(params, carry, optimizer.init(params), jnp.zeros((), jnp.int32))

    state = jax.jit(init, compiler_options=RUNS_ONCE)(params, carry)
    for done in range(0, updates, log_every):
        begun, count = time.perf_counter(), min(log_every, updates - done)
        state, values = jax.block_until_ready(run_chunk(state, count))
        rate = count / (time.perf_counter() - begun)
        values = jax.device_get(values)
        bad = ~(np.isfinite(values["loss"]) & np.isfinite(values["gradient_norm"]))
        if bad.any():
            raise FloatingPointError(
                f"{method}: loss or gradient were not finite at update {done + bad.argmax() + 1}; "
                "lower learning_rate."
            )
        means = {name: float(value.mean()) for name, value in values.items()}
        on_progress(Progress(method, done + count, updates, means, rate))
    return state.params
