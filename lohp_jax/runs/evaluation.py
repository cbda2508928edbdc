"""The last stage of a run of Lo-Hp: every method on the same held-out tasks, beside its baselines."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from lohp_jax.baselines.retrieval import task_distance
from lohp_jax.evaluation import scores
from lohp_jax.evaluation.break_even import Spent, break_even
from lohp_jax.evaluation.figures import figures
from lohp_jax.evaluation.honesty import honesty
from lohp_jax.files import SCHEMA, write_json
from lohp_jax.methods import METHODS
from lohp_jax.methods.training import num_updates
from lohp_jax.runs.baselines import (
    ADAM,
    Announce,
    baseline_names,
    equal_gradients,
    make_baselines,
    stored_contexts,
    training_ends,
)
from lohp_jax.runs.clock import PREPARE, TRAIN, TRAJECTORIES, Seconds, read_seconds
from lohp_jax.runs.config import to_json
from lohp_jax.runs.directory import environment
from lohp_jax.runs.loading import load
from lohp_jax.runs.stage import Stage, key_of, trained_steps
from lohp_jax.training import engine
from lohp_jax.types import Generator, Method, Params, Trajectory


class _Held(NamedTuple):
    """A stage, its held-out tasks, what the imitated teacher did on them, and `training_ends`."""

    stage: Stage
    tasks: scores.TaskBatch
    taught: Trajectory
    ends: jax.Array | None


def evaluate_run(
    stage: Stage, on_progress: Callable[[str, int, int], None] = engine.silent
) -> dict[str, Any]:
    """Stage 3: scores every method on the same held-out tasks; writes results.json and figures.json.

    Args:
      stage: of a run whose methods are trained; others of the table that were trained in its directory
        are scored, too.
      on_progress: called before each method with its name, how many are done, and how many there are.

    Returns: the results.

    Raises: FileNotFoundError or ValueError if a method is not complete, or damaged; OSError if the disk
      is full, with the results before it intact.
    """
    config, family = stage.config, stage.family
    methods = _trained_methods(stage)
    trained = {name: _load(stage, method) for name, method in methods.items()}
    equal = equal_gradients(stage, trained)
    names = [*equal, *baseline_names(stage)]
    stages = [*map(_row_name, stage.teachers), *names, *trained]

    def announce(method):
        on_progress(method, stages.index(method), len(stages))

    key = key_of(config, "evaluate")
    tasks = scores.draw_tasks(family, key, config.evaluation.num_tasks, "held_out")
    teacher_rows, taught = _score_teachers(stage, tasks, announce)
    held = _Held(stage, tasks, taught, training_ends(stage))
    baselines, tuned = make_baselines(stage, held.ends, equal, announce)
    rows, honest, rivals = [], {}, config.evaluation.rivals
    for kind, generators in (("baseline", baselines), ("generator", trained)):
        for name, generator in generators.items():
            announce(name)
            row, honest[name] = _score(held, name, kind, generator)
            if name in rivals:
                row["train_seconds"] = tuned[name]["train_seconds"]
            rows.append(row)
    results = _about(stage) | tuned | {"rows": teacher_rows + rows, "honesty": honest}
    familiar, drawn = _appraise(held, trained)
    results["break_even"] = _break_even(stage, results["rows"], methods)
    results["rows"] += familiar
    drawn |= figures(
        family,
        trained,
        tasks,
        main=results["main"],
        codec=stage.gathered.space.codec,
        teacher=results["imitated"],
        taught=taught,
        compression=config.training.compression,
    )
    write_json(stage.directory / "figures.json", drawn)
    write_json(stage.directory / "results.json", results)
    return {"schema": SCHEMA, **results}


def _break_even(
    stage: Stage, rows: list[dict[str, Any]], methods: dict[str, Method]
) -> dict[str, dict[str, Any]]:
    """What each trained method took, and when it pays."""
    prepared = read_seconds(stage.directory, PREPARE).get(TRAJECTORIES)
    seconds, found = read_seconds(stage.directory, TRAIN), {}
    for name, method in methods.items():
        chain = []
        while method is not None:
            chain.append(method.name)
            method = method.starts_from
        spent = None
        if prepared is not None and all(part in seconds for part in chain):
            training = functools.reduce(Seconds.plus, (seconds[part] for part in chain))
            compilation = prepared.compilation + training.compilation
            spent = Spent(prepared.total, training.total, compilation)
        found[name] = break_even(rows, stage.description.measure, name, spent, ADAM)
    return found


def _about(stage: Stage) -> dict[str, Any]:
    """What results.json says of the run."""
    config, gathered = stage.config, stage.gathered
    return {
        "family": config.family,
        "measure": stage.description.measure,
        "main": config.method(config.methods[0]).name,
        "config": to_json(config),
        "environment": environment(),
        "imitated": _row_name(stage.teachers[gathered.space.teacher]),
        "num_trajectories": len(gathered.store),
        "num_dropped": gathered.store.num_dropped,
        "num_weights": int(gathered.space.codec.mask.sum()),
    }


def _row_name(teacher: Any) -> str:
    return f"teacher_{teacher.name}"


def _trained_methods(stage: Stage) -> dict[str, Method]:
    """The learned methods of a config, and any other of the table that was trained there."""
    config = stage.config
    methods = {m.name: m for m in map(config.method, config.methods)}
    there = [name for name in METHODS if trained_steps(stage.directory, name)]
    return methods | {name: config.method(name) for name in there if name not in methods}


def _load(stage: Stage, method: Method) -> Generator:
    name, done = method.name, trained_steps(stage.directory, method.name)
    wanted = num_updates(method, stage.config.training.updates)
    if done < wanted:
        raise ValueError(
            f"{stage.directory} has {done} of {wanted} updates of {name}; make the others with "
            f"`lohp train --out {stage.directory} --method {name} --resume`."
        )
    return load(stage.directory, method, stage.family)


def _score_teachers(
    stage: Stage, tasks: scores.TaskBatch, announce: Announce
) -> tuple[list[dict[str, Any]], Trajectory]:
    """Rows of all teachers, and the trajectories of the one that is imitated."""
    rows, num_steps = [], stage.config.prepare.num_steps
    space = stage.gathered.space
    for index, teacher in enumerate(stage.teachers):
        announce(_row_name(teacher))
        producer = scores.teacher(stage.family, teacher.optimizer, space.theta_0, num_steps)
        trajectories = producer.many(tasks.data, tasks.keys)
        row = scores.make_row(
            _row_name(teacher),
            "teacher",
            stage.config.seed,
            stage.description.measure,
            scores.scores(stage.family, _ends(trajectories), tasks.data),
            gradients=teacher.gradients * num_steps,
            latency=scores.latency(producer, tasks.data, tasks.keys),
        )
        rows.append(row)
        if index == space.teacher:
            imitated = trajectories
    return rows, imitated


def _score(
    held: _Held, name: str, kind: scores.Kind, generator: Generator
) -> tuple[dict[str, Any], dict[str, float]]:
    """Row and honesty report of what makes weights from contexts."""
    stage, tasks, taught, ends = held
    producer = scores.make_producer(scores.from_generator(generator))
    weights = producer.many(tasks.contexts, tasks.keys)
    row = scores.make_row(
        name,
        kind,
        stage.config.seed,
        stage.description.measure,
        scores.scores(stage.family, weights, tasks.data),
        gradients=generator.gradients,
        forward_passes=generator.forward_passes,
        latency=scores.latency(producer, tasks.contexts, tasks.keys),
    )
    row |= scores.met(scores.appraise(generator, tasks))
    report = honesty(
        stage.family,
        producer,
        tasks,
        codec=stage.gathered.space.codec,
        weights=weights,
        teacher_weights=_ends(taught),
        training_tokens=ends,
    )
    return row, report


def _appraise(
    held: _Held, generators: dict[str, Generator]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """How generators that tell familiar tasks from others do on both kinds.

    Returns: rows on tasks of the training split with contexts drawn anew, and the numbers behind the
      plot of trust against the distance to the nearest training task.
    """
    generators = {n: g for n, g in generators.items() if g.appraise is not None}
    if not generators:
        return [], {}
    stage, held_out, *_ = held
    key = jax.random.fold_in(key_of(stage.config, "evaluate"), 3)
    familiar = scores.draw_tasks(stage.family, key, len(held_out.keys), "train")
    measured = scores.evaluate(
        stage.family, generators, key, num_tasks=len(held_out.keys), split="train"
    )
    rows = [row | {"seed": stage.config.seed} for row in measured["rows"]]
    stored = stored_contexts(stage)
    points = {name: {} for name in generators}
    for split, tasks in (("train", familiar), ("held_out", held_out)):
        distance = task_distance(stage.family, stored, tasks.contexts).tolist()
        for name, generator in generators.items():
            told = {n: v.tolist() for n, v in scores.appraise(generator, tasks).items()}
            points[name][split] = {"distance": distance, **told}
    return rows, {"familiarity": points}


def _ends(trajectory: Trajectory) -> Params:
    """End weights of a batch of trajectories, leading axis R."""
    return jax.tree.map(lambda leaf: leaf[:, -1], trajectory.states)
