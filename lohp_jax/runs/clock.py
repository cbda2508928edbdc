"""What the stages of a run take, kept across interruptions.

Every piece of work leaves a line in `metrics.jsonl` as soon as it is done; what was done twice, because
it was lost in between, counts twice, as it was paid twice.
"""

import contextlib
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax.monitoring

from lohp_jax.files import read_json_lines
from lohp_jax.training import metrics

_COMPILING = (
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


PREPARE, TRAIN = "prepare", "train"
"""Stages of a run; the names within them are `TRAJECTORIES`, and those of methods."""
TRAJECTORIES = "trajectories"


class Seconds(NamedTuple):
    """Seconds of wall clock: in all, and of these in compilation."""

    total: float = 0.0
    compilation: float = 0.0

    def plus(self, other: "Seconds") -> "Seconds":
        """The sum of both."""
        return Seconds(self.total + other.total, self.compilation + other.compilation)


@contextlib.contextmanager
def stopwatch() -> Iterator[Callable[[], Seconds]]:
    """Gives a function that tells the seconds since it was last asked, compilation included."""
    compiled = []

    def listen(event, seconds, **_):
        if event in _COMPILING:
            compiled.append(seconds)

    begun = time.perf_counter()

    def lap():
        nonlocal begun
        now = time.perf_counter()
        seconds, begun = Seconds(now - begun, sum(compiled)), now
        compiled.clear()
        return seconds

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield lap
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@contextlib.contextmanager
def recording(
    directory: str | os.PathLike, stage: str, name: str
) -> Iterator[Callable[[str, int], None]]:
    """Gives `(name, step) -> None`, which records what was done since it was last called.

    What was done after the last call is recorded when the block ends, also by an interruption.

    Args:
      directory: of the run.
      stage: `PREPARE` or `TRAIN`.
      name: of what is done until the first call.
    """
    path, at = pathlib.Path(directory) / "metrics.jsonl", (name, 0)

    def record(name, step):
        nonlocal at
        at, seconds = (name, step), lap()
        line = {"stage": stage, "name": name, "step": step}
        line |= {"seconds": seconds.total, "compile_seconds": seconds.compilation}
        metrics.append_line(path, line)

    with stopwatch() as lap:
        try:
            yield record
        except KeyboardInterrupt:
            record(*at)
            raise
        record(*at)


def read_seconds(directory: pathlib.Path, stage: str) -> dict[str, Seconds]:
    """Seconds of a stage by the names that were recorded; empty for a run without such lines."""
    found: dict[str, Seconds] = {}
    for _, line in read_json_lines(directory / "metrics.jsonl"):
        if line.get("stage") == stage:
            piece = Seconds(line["seconds"], line["compile_seconds"])
            found[line["name"]] = found.get(line["name"], Seconds()).plus(piece)
    return found
