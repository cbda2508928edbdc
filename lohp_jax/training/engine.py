"""The host loop of every training: compiled chunks of updates, metrics, checkpoints, and when to stop.

It knows no method: what is trained is a pure update of a state, on batches that depend on the number
of the step alone.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.training import checkpoint, metrics
from lohp_jax.training.distributed import Strategy, compile_update
from lohp_jax.types import Progress, PyTree

OnProgress = Callable[[Progress], None]


class DivergedError(RuntimeError):
    """Training met a number that is not finite; what was saved before it is whole."""


@dataclasses.dataclass(frozen=True, eq=False)
class Training:
    """What is trained, as pure functions.

    Attributes:
      name: for checkpoints, metrics and messages.
      start: `(*start_from) -> state` before the first update; compiled without optimization. The state
        has `step`, an int32 scalar that counts updates.
      update: `(state, batch, *replicated, axis_name=None) -> (state, metrics)`, see `compile_update`;
        the metrics hold at least "loss" and "gradient_norm".
      draw: `(first_step, count) -> batches` with leading axes `[count, B]`, those of a step the same
        however they are asked for; not compiled. See `each_step`.
      updates: in all, at least 1.
      finish: `(state, *replicated) -> state`, what is left to do after the last update; None for
        nothing.
      start_from: pytrees of arrays.
      replicated: pytrees that every update sees, such as a data set.
      log_every: updates per compiled chunk, per line of metrics and per report of progress.
      advice: what the error of a divergence tells a user to do.
    """

    name: str
    start: Callable[..., PyTree]
    update: Callable[..., tuple[PyTree, dict[str, jax.Array]]]
    draw: Callable[[int, int], PyTree]
    updates: int
    finish: Callable[..., PyTree] | None = None
    start_from: tuple[PyTree, ...] = ()
    replicated: tuple[PyTree, ...] = ()
    log_every: int = 50
    advice: str = "Lower the learning rate."

    def __post_init__(self):
        for name in ("updates", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{self.name}: {name} must be at least 1, got {getattr(self, name)}."
                )


@dataclasses.dataclass(frozen=True)
class Saving:
    """Where a training keeps what it needs to go on after an interruption.

    Attributes:
      directory: of the run; checkpoints go to `checkpoints/NAME` in it, metrics to `metrics.jsonl`.
      checkpoint_every: updates between checkpoints, at least 1; they fall on the ends of chunks.
      config: JSON values, saved in every checkpoint.
      beside: pytrees of arrays by name, saved beside the "state".
    """

    directory: pathlib.Path
    checkpoint_every: int
    config: dict[str, Any]
    beside: dict[str, PyTree] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be at least 1, got {self.checkpoint_every}.")


def silent(*told: Any) -> None:
    """Does nothing with what it is told."""


def train(
    training: Training,
    *,
    strategy: Strategy = "jit",
    saving: Saving | None = None,
    on_state: Callable[[PyTree], None] = silent,
    on_progress: OnProgress = silent,
) -> PyTree:
    """Trains, from the newest checkpoint if there is one.

    A training that was interrupted and goes on gives the same bits as one that was not.

    Args:
      training: what is trained.
      strategy: of `compile_update`; the result is the same up to rounding.
      saving: where to; None trains in memory only.
      on_state: told the state after each chunk, before `on_progress`.
      on_progress: told of each chunk.

    Returns: the final state, which is also the newest checkpoint.

    Raises: DivergedError for a loss or gradient that is not finite; KeyboardInterrupt after saving, if
      interrupted; OSError if the disk is full, with the checkpoints before it intact; ValueError for a
      checkpoint that does not fit, and what `compile_update` raises.
    """
    run = compile_update(scan_updates(training.update), strategy, batch_axis=1)
    name, updates, book = training.name, training.updates, _Book(training.name, saving)
    state = book.newest_or_start(training)
    try:
        while (step := int(state.step)) < updates:
            begun = time.perf_counter()
            batches = training.draw(step, min(training.log_every, updates - step))
            reached, values = jax.block_until_ready(run(state, batches, *training.replicated))
            values, done = jax.device_get(values), int(reached.step)
            rate = (done - step) / (time.perf_counter() - begun)
            _check_finite(training, values, state, book)
            means = book.write(done, rate, {n: value.mean(axis=0) for n, value in values.items()})
            if done == updates and training.finish is not None:
                reached = jax.jit(training.finish)(reached, *training.replicated)
            state = reached  # the last one is not to be saved before it is finished
            on_state(state)
            on_progress(Progress(name, done, updates, means, rate))
            if done == updates or book.is_due(step, done):
                book.save(state)
    except KeyboardInterrupt:
        if int(state.step):
            book.save(state)
        book.drop_lines_after(int(state.step))
        raise
    return state


def scan_updates(update: Callable) -> Callable:
    """Runs `update` over batches with a leading axis of steps; metrics keep that axis."""

    def run(state, batches, *replicated, axis_name=None):
        def body(state, batch):
            return update(state, batch, *replicated, axis_name=axis_name)

        return jax.lax.scan(body, state, batches)

    return run


def each_step(draw_one: Callable[[jax.Array], PyTree]) -> Callable[[int, int], PyTree]:
    """The `draw` of a `Training` from a pure `(step) -> batch` of arrays `[B, ...]`."""

    @functools.partial(jax.jit, static_argnames="count")
    def draw(first_step, count):
        return jax.vmap(draw_one)(first_step + jnp.arange(count))

    return draw


def step_keys(key: jax.Array, step: jax.Array, batch_size: int) -> jax.Array:
    """`[batch_size]` keys of a step, one for each example, wherever it is computed."""
    return jax.random.split(jax.random.fold_in(key, step), batch_size)


class _Book:
    """What a training leaves on disk; without `saving`, nothing."""

    def __init__(self, name: str, saving: Saving | None):
        self._name, self._saving = name, saving
        self._history: list[dict[str, Any]] = []
        self._saved: int | None = None
        if saving is not None:
            self._lines = pathlib.Path(saving.directory) / "metrics.jsonl"
            self._folder = pathlib.Path(saving.directory) / "checkpoints" / name

    def newest_or_start(self, training: Training) -> PyTree:
        """The state to go on from; lines of metrics beyond it are dropped."""
        quickly = {"xla_backend_optimization_level": 0}  # runs once: halves its compilation
        start = jax.jit(training.start, compiler_options=quickly)
        saving = self._saving
        if saving is None:
            return start(*training.start_from)
        if checkpoint.latest_step(self._folder) is None:
            state = start(*training.start_from)
        else:
            fresh = jax.eval_shape(training.start, *training.start_from)
            self._saved, stored = checkpoint.restore(
                self._folder, {"state": fresh, **saving.beside}
            )
            state = stored["state"]
        self.drop_lines_after(int(state.step))
        self._history = metrics.read_lines(self._lines, self._name)
        return state

    def drop_lines_after(self, step: int) -> None:
        """Removes lines of metrics beyond `step`, where nothing was saved."""
        if self._saving is not None:
            metrics.drop_lines_after(self._lines, self._name, step)

    def write(self, step: int, rate: float, means: dict[str, Any]) -> dict[str, Any]:
        """Appends a line of metrics; returns the means with the alarm of a frozen policy."""
        means |= metrics.freeze_alarm(means, self._history)
        line = {"method": self._name, "step": step, "updates_per_second": rate, **means}
        if self._saving is not None:
            line = metrics.append_line(self._lines, line)
        self._history.append(line)
        return means

    def is_due(self, before: int, step: int) -> bool:
        """Whether the updates from `before` to `step` reached a multiple of `checkpoint_every`."""
        every = self._saving and self._saving.checkpoint_every
        return bool(every) and step // every > before // every

    def save(self, state: PyTree) -> bool:
        """Writes a checkpoint unless the state is on disk; returns whether it then is."""
        if self._saving is None:
            return False
        step = int(state.step)
        if step != self._saved:
            content = {"state": state, **self._saving.beside}
            checkpoint.save(self._folder, step, content, self._saving.config)
            self._saved = step
        return True


def _check_finite(
    training: Training, values: dict[str, np.ndarray], state: PyTree, book: _Book
) -> None:
    """Stops before a gradient that is not finite reaches a checkpoint; the state before is saved."""
    bad = ~(np.isfinite(values["loss"]) & np.isfinite(values["gradient_norm"]))
    if bad.any():
        step = int(state.step)
        kept = f"; the state of update {step} is saved" if book.save(state) else ""
        raise DivergedError(
            f"{training.name}: loss or gradient were not finite at update {step + bad.argmax() + 1}"
            f"{kept}. {training.advice}"
        )
