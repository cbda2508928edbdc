"""A meta-training run over one directory. Nothing here prints.

config.json   metrics.jsonl   adam.json   checkpoints/meta/   theta.msgpack   results.json
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from lohp_jax.evaluation.learning import adam, adam_settings, best_of, make_trainer
from lohp_jax.files import SCHEMA, read_json, write_json
from lohp_jax.optimizers.small import small_optimizer, unpack_rate
from lohp_jax.optimizers.theta import save_theta
from lohp_jax.runs.directory import environment, open_directory, read_config
from lohp_jax.runs.meta_training import METHOD, SEGMENT, MetaConfig, meta_training
from lohp_jax.training import checkpoint, metrics
from lohp_jax.training.distributed import Strategy
from lohp_jax.training.engine import OnProgress, Saving, silent, train
from lohp_jax.training.pes import MetaState
from lohp_jax.types import Progress
from lohp_jax.workloads.meta_tasks import meta_family

PROBE = "probe"
"""What lines of metrics of a comparison are called by."""


class Standing(NamedTuple):
    """Where meta-training stands.

    Attributes:
      progress: of the newest chunk.
      learned: family -> score -> mean over the probe's tasks, of the newest probe; empty before it.
      adam: the same of Adam, each score at its own best learning rate.
    """

    progress: Progress
    learned: dict[str, dict[str, float]]
    adam: dict[str, dict[str, float]]


def open_meta_run(directory: str | os.PathLike, config: MetaConfig) -> None:
    """Makes a run directory for `config`, or checks that the one that is there has the same.

    Raises: ValueError for another config (with the first field that differs) or one that does not read.
    """
    open_directory(directory, config)


def read_meta_config(directory: str | os.PathLike) -> MetaConfig:
    """The config of a run that is there.

    Raises: ValueError if it does not read.
    """
    return read_config(directory, MetaConfig)


def meta_train(
    config: MetaConfig,
    directory: pathlib.Path,
    *,
    strategy: Strategy = "jit",
    on_state: Callable[[MetaState], None] = silent,
    on_progress: OnProgress = silent,
) -> MetaState:
    """Meta-trains, from the newest checkpoint if there is one; see `engine.train`."""
    saving = Saving(directory, config.checkpoint_every, dataclasses.asdict(config))
    told = {"on_state": on_state, "on_progress": on_progress}
    return train(meta_training(config), strategy=strategy, saving=saving, **told)


def meta_train_run(
    directory: str | os.PathLike,
    config: MetaConfig,
    *,
    strategy: Strategy = "jit",
    on_progress: Callable[[Standing], None] = silent,
    on_stage: Callable[[str], None] = silent,
) -> dict[str, Any]:
    """Meta-trains, resuming; compares with Adam on the way; writes theta.msgpack and results.json.

    Args:
      directory: that `open_meta_run` made.
      config: the same.
      strategy: of `compile_update`; the result is the same up to rounding.
      on_progress: called after each chunk.
      on_stage: called with what is being done before the first.

    Returns: the results.

    Raises: what `engine.train` raises.
    """
    directory = pathlib.Path(directory)
    on_stage("tuning Adam")
    baseline = _adam_scores(directory, config)
    lines = directory / "metrics.jsonl"
    metrics.drop_lines_after(lines, PROBE, trained_meta_updates(directory))
    probe, learned = make_probe(config), _newest_probe(lines)

    def probe_now(state: MetaState) -> None:
        nonlocal learned
        step = int(state.step)
        learned = step, probe(state.meta)
        metrics.append_line(lines, {"method": PROBE, "step": step} | _flat(learned[1]))

    def after_chunk(state: MetaState) -> None:
        if int(state.step) % config.probe_every == 0:
            probe_now(state)

    def report(progress: Progress) -> None:
        on_progress(Standing(progress, learned[1], baseline))

    on_stage("compiling")
    told = {"on_state": after_chunk, "on_progress": report}
    state = meta_train(config, directory, strategy=strategy, **told)
    if learned[0] < config.updates:
        on_stage("comparing")
        probe_now(state)
    save_theta(directory / "theta.msgpack", state.meta["theta"])
    results = _results_of(config, state, lines, {"small": learned[1], "adam_best": baseline})
    write_json(directory / "results.json", results)
    return results


def _results_of(
    config: MetaConfig,
    state: MetaState,
    lines: pathlib.Path,
    scores: dict[str, dict[str, dict[str, float]]],
) -> dict[str, Any]:
    """What results.json holds; `scores` by method and family."""
    rate = unpack_rate(state.meta)._asdict()
    return {
        "schema": SCHEMA,
        "config": dataclasses.asdict(config),
        "environment": environment(),
        "rate": {name: float(value) for name, value in rate.items()},
        "rows": [
            {"method": method, "family": family, "split": "train", **values}
            for method, by_family in scores.items()
            for family, values in by_family.items()
        ],
        "curve": _thinned(metrics.read_lines(lines, METHOD)),
        "probes": metrics.read_lines(lines, PROBE),
    }


def _thinned(lines: list[dict]) -> list[dict]:
    """About a hundred lines, the last one among them."""
    return lines[:: -max(1, len(lines) // 100)][::-1]


def trained_meta_updates(directory: str | os.PathLike) -> int:
    """Meta-updates in the newest checkpoint, 0 if there is none."""
    return checkpoint.latest_step(pathlib.Path(directory) / "checkpoints" / METHOD) or 0


def make_probe(config: MetaConfig) -> Callable[[Any], dict[str, dict[str, float]]]:
    """Compiles `meta -> {family: {score: mean over the probe's tasks}}`."""
    trainers = {
        name: make_trainer(meta_family(name), small_optimizer, segment=SEGMENT)
        for name in config.families
    }

    def probe(meta):
        settings, keys = jax.tree.map(lambda leaf: leaf[None], meta), _probe_keys(config)
        return {
            name: best_of(trainer(settings, keys, config.probe_steps))
            for name, trainer in trainers.items()
        }

    return probe


def _adam_scores(directory: pathlib.Path, config: MetaConfig) -> dict[str, dict[str, float]]:
    """Adam's best scores on the tasks of the probe, from disk if they are there."""
    path = directory / "adam.json"
    if not path.exists():
        settings, keys = adam_settings(cosine=False), _probe_keys(config)
        scores = {}
        for name in config.families:
            trainer = make_trainer(meta_family(name), adam, segment=SEGMENT)
            scores[name] = best_of(trainer(settings, keys, config.probe_steps))
        write_json(path, {"scores": scores})
    return read_json(path)["scores"]


def _probe_keys(config: MetaConfig) -> jax.Array:
    return jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1), config.probe_tasks)


def _flat(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    return {
        f"{family}/{score}": value
        for family, values in scores.items()
        for score, value in values.items()
    }


def _newest_probe(lines: pathlib.Path) -> tuple[int, dict[str, dict[str, float]]]:
    """Its step and scores; 0 and none before the first."""
    found = metrics.read_lines(lines, PROBE)
    scores: dict[str, dict[str, float]] = {}
    for name, value in (found[-1] if found else {}).items():
        family, slash, score = name.partition("/")
        if slash:
            scores.setdefault(family, {})[score] = value
    return (found[-1]["step"] if found else 0), scores
