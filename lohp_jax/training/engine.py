"""The host loop around the compiled update: batches, metrics, checkpoints, and when to stop."""

import functools
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lohp_jax.methods.setting import Dataset, Frame, make_objective
from lohp_jax.methods.step import (
    TrainState,
    draw_batches,
    make_optimizer,
    make_update,
    scan_updates,
)
from lohp_jax.policy.hybrid import Policy
from lohp_jax.runs.config import RunConfig, to_json
from lohp_jax.training import checkpoint, metrics
from lohp_jax.training.distributed import Strategy, compile_update
from lohp_jax.types import Progress, TaskFamily


class DivergedError(RuntimeError):
    """Training met a number that is not finite; the last good state is in the checkpoints."""


def train(
    config: RunConfig,
    family: TaskFamily,
    policy: Policy,
    frame: Frame,
    dataset: Dataset,
    directory: pathlib.Path,
    method: str,
    *,
    key: jax.Array,
    params: dict | None = None,
    strategy: Strategy = "jit",
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> TrainState:
    """Trains one method, from its newest checkpoint if there is one.

    Checkpoints go to `directory/checkpoints/METHOD`, metrics to `directory/metrics.jsonl`. A run that
    was interrupted and resumed gives the same bits as one that was not: every batch depends on the
    number of its update alone.

    Args:
      config: resolved.
      family: the tasks.
      policy: of `make_policy`.
      frame: saved beside the state.
      dataset: of `make_dataset`.
      directory: of the run.
      method: one of `METHODS`.
      key: randomness of initialisation and training.
      params: where to start; None initialises the network.
      strategy: of `compile_update`; the result is the same up to rounding.
      on_progress: called after each chunk.

    Returns: the final state, which is also the newest checkpoint.

    Raises: DivergedError for a loss or gradient that is not finite; KeyboardInterrupt after saving, if
      interrupted; OSError if the disk is full, with the checkpoints before it intact.
    """
    lines, folder = directory / "metrics.jsonl", directory / "checkpoints" / method
    save = functools.partial(_save, folder, frame=frame, config=to_json(config))
    init_key, batch_key = jax.random.split(key)
    fresh = functools.partial(initial_state, config, family, policy, method)
    state = _newest_or_fresh(folder, frame, fresh, init_key, params)
    metrics.drop_lines_after(lines, method, int(state.step))
    history = metrics.read_lines(lines, method)
    run_chunk = _make_run_chunk(config, family, policy, dataset, method, batch_key, strategy)
    updates, saved = num_updates(config, method), int(state.step)
    try:
        while (step := int(state.step)) < updates:
            begun = time.perf_counter()
            reached, values = run_chunk(state, min(config.training.log_every, updates - step))
            _check_finite(values, method, state, save)
            done = int(reached.step)
            rate = (done - step) / (time.perf_counter() - begun)
            means = {name: value.mean(axis=0) for name, value in values.items()}
            means |= metrics.freeze_alarm(means, history)
            line = {"method": method, "step": done, "updates_per_second": rate, **means}
            history.append(metrics.append_line(lines, line))
            state = reached
            on_progress(Progress(method, done, updates, means, rate))
            if done % config.training.checkpoint_every == 0 or done == updates:
                save(state)
                saved = done
    except KeyboardInterrupt:
        if int(state.step) > saved:
            save(state)
        raise
    return state


def num_updates(config: RunConfig, method: str) -> int:
    """Updates of a method: those of the config; consolidation takes half as many, after `lohp`."""
    updates = config.training.updates
    return max(1, updates // 2) if method == "lohp_consolidated" else updates


def optimizer_of(config: RunConfig, method: str) -> optax.GradientTransformation:
    """The optimizer that trains `method`."""
    return make_optimizer(
        learning_rate=config.training.learning_rate,
        clip_norm=config.training.clip_norm,
        updates=num_updates(config, method),
    )


def initial_state(
    config: RunConfig, family: TaskFamily, policy: Policy, method: str, key: jax.Array
) -> TrainState:
    """The state before the first update."""
    data = family.sample(key, "train")
    params = policy.network.init(key, family.context(data, key))
    return TrainState(params, optimizer_of(config, method).init(params), jnp.zeros((), jnp.int32))


def _newest_or_fresh(
    folder: pathlib.Path,
    frame: Frame,
    fresh: Callable[[jax.Array], TrainState],
    key: jax.Array,
    params: dict | None,
) -> TrainState:
    if checkpoint.latest_step(folder) is None:
        quickly = {"xla_backend_optimization_level": 0}  # runs once: halves its compilation
        state = jax.jit(fresh, compiler_options=quickly)(key)
        return state if params is None else state._replace(params=params)
    template = {"state": jax.eval_shape(fresh, key), "frame": frame}
    return checkpoint.restore(folder, template)[1]["state"]


def _make_run_chunk(
    config: RunConfig,
    family: TaskFamily,
    policy: Policy,
    dataset: Dataset,
    method: str,
    key: jax.Array,
    strategy: Strategy,
) -> Callable[[TrainState, int], tuple[TrainState, dict[str, np.ndarray]]]:
    """Compiles `(state, count) -> (state, metrics)`; metrics have a leading axis of `count` updates."""
    objective = make_objective(config, family, policy, method)
    update = make_update(family, objective, optimizer_of(config, method))
    run = compile_update(scan_updates(update), strategy, batch_axis=1)
    batch_size = config.training.batch_size
    draw = jax.jit(
        functools.partial(draw_batches, batch_size=batch_size), static_argnames="num_steps"
    )

    def run_chunk(state, count):
        batches = draw(key, dataset, int(state.step), num_steps=count)
        reached, values = jax.block_until_ready(run(state, batches, dataset))
        return reached, jax.device_get(values)

    return run_chunk


def _save(folder, state, *, frame, config):
    checkpoint.save(folder, int(state.step), {"state": state, "frame": frame}, config)


def _check_finite(values, method, state, save) -> None:
    """Stops before a gradient that is not finite reaches a checkpoint."""
    bad = ~(np.isfinite(values["loss"]) & np.isfinite(values["gradient_norm"]))
    if bad.any():
        save(state)
        step = int(state.step)
        raise DivergedError(
            f"{method}: loss or gradient were not finite at update {step + bad.argmax() + 1}; the state "
            f"of update {step} is saved. Start in another run directory with a lower "
            "training.learning_rate or training.clip_norm, or a larger balance.end_std."
        )
