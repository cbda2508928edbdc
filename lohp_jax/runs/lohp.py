"""A run of Lo-Hp, stage by stage, over one directory. Nothing here prints.

config.json   metrics.jsonl   results.json   figures.json   report.html
trajectories/   checkpoints/METHOD/
"""

import os
import pathlib
from collections.abc import Callable
from typing import Any

from lohp_jax.evaluation.report import write_report
from lohp_jax.fitting import saving_of
from lohp_jax.methods.training import train_method
from lohp_jax.runs.clock import PREPARE, TRAIN, TRAJECTORIES, recording
from lohp_jax.runs.config import RunConfig, to_json
from lohp_jax.runs.evaluation import evaluate_run
from lohp_jax.runs.families import family_of
from lohp_jax.runs.stage import Stage, key_of, open_run, open_stage, start_of
from lohp_jax.training import engine
from lohp_jax.training.distributed import Strategy
from lohp_jax.trajectories.prepare import prepare
from lohp_jax.trajectories.store import Store


def run(
    config: RunConfig,
    directory: str | os.PathLike,
    *,
    resume: bool = False,
    strategy: Strategy = "jit",
    on_progress: engine.OnProgress = engine.silent,
) -> dict[str, Any]:
    """Prepares, trains, evaluates and reports, all in one; what `lohp run` does.

    Args:
      config: settings.
      directory: of the run; `report.html` is written there, too.
      resume: go on with the run that is in the directory, if there is one.
      strategy: of `compile_update`.
      on_progress: told of each chunk of updates.

    Returns: the results, as in `results.json`.

    Raises: ValueError for settings that make no sense, or a directory that holds another run, or one
      without `resume`; what training raises; OSError if the disk is full.
    """
    if not resume and (pathlib.Path(directory) / "config.json").exists():
        raise ValueError(
            f"run: {directory} holds a run; go on with resume=True, or choose another directory."
        )
    config = open_run(directory, config)
    stage = open_stage(directory, config, prepare_run(directory, config))
    for name in config.methods:
        train_run(stage, name, strategy=strategy, on_progress=on_progress)
    results = evaluate_run(stage)
    write_report(directory)
    return results


def prepare_run(
    directory: str | os.PathLike,
    config: RunConfig,
    on_progress: Callable[[int, int], None] = engine.silent,
) -> Store:
    """Stage 1: stores the trajectories of a resolved config; resumes."""
    family, settings = family_of(config), config.prepare
    described = {
        "family": config.family,
        "seed": config.seed,
        **{name: to_json(config)[name] for name in ("tasks", "prepare")},
    }
    with recording(directory, PREPARE, TRAJECTORIES) as record:

        def told(done, total):
            record(TRAJECTORIES, done)
            on_progress(done, total)

        return prepare(
            family,
            settings.optimizers,
            theta_0=start_of(config, family),
            num_tasks=settings.num_tasks,
            num_steps=settings.num_steps,
            record_every=settings.record_every,
            start=settings.start,
            start_noise=settings.start_noise,
            key=key_of(config, "prepare"),
            directory=pathlib.Path(directory) / "trajectories",
            config=described,
            on_progress=told,
        )


def train_run(
    stage: Stage,
    name: str,
    *,
    strategy: Strategy = "jit",
    on_progress: engine.OnProgress = engine.silent,
) -> None:
    """Stage 2: trains one method, and what it starts from; resumes from its newest checkpoint."""
    config, gathered = stage.config, stage.gathered
    saving = saving_of(
        stage.directory,
        gathered,
        stage.description._asdict(),
        stage.teachers,
        config.fitting(),
        run=to_json(config),
    )
    method = config.method(name)
    with recording(stage.directory, TRAIN, method.name) as record:

        def told(progress):
            record(progress.method, progress.step)
            on_progress(progress)

        train_method(
            method,
            gathered.space,
            gathered.dataset,
            config.fitting().updating(),
            key_of(config, "train"),
            strategy=strategy,
            saving=saving,
            on_progress=told,
        )
