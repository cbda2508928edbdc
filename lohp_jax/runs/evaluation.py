"""The last stage of a run of Lo-Hp: every method on the same held-out tasks, beside its baselines."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.baselines import adaptation
from lohp_jax.baselines.retrieval import nearest_task
from lohp_jax.baselines.ridge import ridge
from lohp_jax.evaluation import scores
from lohp_jax.evaluation.figures import figures
from lohp_jax.evaluation.honesty import honesty
from lohp_jax.files import SCHEMA, write_json
from lohp_jax.methods import METHODS
from lohp_jax.methods.training import num_updates
from lohp_jax.runs.config import to_json
from lohp_jax.runs.directory import environment
from lohp_jax.runs.loading import load
from lohp_jax.runs.stage import Stage, key_of, trained_steps
from lohp_jax.training import engine
from lohp_jax.trajectories.dataset import WindowDataset
from lohp_jax.types import Generator, Method, Params, PyTree, Trajectory

_TUNING_TASKS = 64
_SUPPORT_DRAWS = 4
_MOST_NUMBERS = 2**26
"""End weights of all runs together, beyond which those of windows stay in their store."""
_ADAM, _NEAREST, _RIDGE = "same_support_adam", "nearest_task", "ridge"

Announce = Callable[[str], None]


class _Held(NamedTuple):
    """A stage, its held-out tasks, what the imitated teacher did on them, and `_training_ends`."""

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
    trained = _load_trained(stage)
    names = _baseline_names(stage)
    stages = [*map(_row_name, stage.teachers), *names, *trained]

    def announce(method):
        on_progress(method, stages.index(method), len(stages))

    key = key_of(config, "evaluate")
    tasks = scores.draw_tasks(family, key, config.evaluation.num_tasks, "held_out")
    teacher_rows, taught = _score_teachers(stage, tasks, announce)
    held = _Held(stage, tasks, taught, _training_ends(stage))
    baselines, tuned = _baselines(stage, held.ends, announce)
    rows, honest = [], {}
    for kind, generators in (("baseline", baselines), ("generator", trained)):
        for name, generator in generators.items():
            announce(name)
            row, honest[name] = _score(held, name, kind, generator)
            rows.append(row)
    results = _about(stage) | tuned | {"rows": teacher_rows + rows, "honesty": honest}
    main = config.method(config.methods[0]).name
    drawn = figures(
        family,
        {main: trained[main]},
        tasks,
        codec=stage.gathered.space.codec,
        teacher=results["imitated"],
        taught=taught,
        compression=config.training.compression,
    )
    write_json(stage.directory / "figures.json", drawn)
    write_json(stage.directory / "results.json", results)
    return {"schema": SCHEMA, **results}


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


def _load_trained(stage: Stage) -> dict[str, Generator]:
    """The learned methods of a config, and any other of the table that was trained there."""
    config, generators = stage.config, {}
    methods: dict[str, Method] = {m.name: m for m in map(config.method, config.methods)}
    there = [name for name in METHODS if trained_steps(stage.directory, name)]
    methods |= {name: config.method(name) for name in there if name not in methods}
    for name, method in methods.items():
        done = trained_steps(stage.directory, name)
        wanted = num_updates(method, config.training.updates)
        if done < wanted:
            raise ValueError(
                f"{stage.directory} has {done} of {wanted} updates of {name}; make the others with "
                f"`lohp train --out {stage.directory} --method {name} --resume`."
            )
        generators[name] = load(stage.directory, method, stage.family)
    return generators


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
        latency=scores.latency(producer, tasks.contexts, tasks.keys),
    )
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


def _baseline_names(stage: Stage) -> list[str]:
    adam = [] if stage.family.context_loss is None else [_ADAM]
    return adam if _too_large(stage) else [*adam, _NEAREST, _RIDGE]


def _baselines(
    stage: Stage, ends: jax.Array | None, announce: Announce
) -> tuple[dict[str, Generator], dict[str, Any]]:
    """Generators that need no training over tasks, and what results.json says of them.

    That is the setting that was tuned for Adam, and why some were left out.
    """
    generators, tuned = {}, {}
    space = stage.gathered.space
    if stage.family.context_loss is not None:
        announce(_ADAM)
        key = jax.random.fold_in(key_of(stage.config, "evaluate"), 1)
        tuning = scores.draw_tasks(stage.family, key, _TUNING_TASKS, "train")
        best = adaptation.tune(stage.family, space.theta_0, tuning.data, tuning.contexts)
        tuned = {_ADAM: best._asdict()}
        generators[_ADAM] = adaptation.adam_on_support(stage.family, space.theta_0, best)
    if ends is None:
        reason = f"their end weights are more than {_MOST_NUMBERS} numbers"
        return generators, tuned | {"left_out": dict.fromkeys((_NEAREST, _RIDGE), reason)}
    contexts, ends = _supports(stage, ends)
    weights = jax.jit(jax.vmap(space.codec.decode))(ends)
    generators[_NEAREST] = nearest_task(stage.family, contexts, weights)
    generators[_RIDGE] = ridge(stage.family, space.codec, contexts, ends)
    return generators, tuned


def _supports(stage: Stage, ends: jax.Array) -> tuple[PyTree, jax.Array]:
    """Several supports of every task of the imitated teacher, and the ends of its runs."""
    dataset = stage.gathered.dataset
    rows = jnp.asarray(np.tile(_imitated(stage), _SUPPORT_DRAWS))
    data = jax.tree.map(lambda leaf: leaf[rows], dataset.data)
    key = jax.random.fold_in(key_of(stage.config, "evaluate"), 2)
    contexts = jax.jit(jax.vmap(stage.family.context))(data, jax.random.split(key, len(rows)))
    return contexts, jnp.tile(ends, (_SUPPORT_DRAWS, 1, 1))


def _too_large(stage: Stage) -> bool:
    """Whether the end weights of the imitated teacher's runs are too many to hold for baselines."""
    gathered = stage.gathered
    in_store = isinstance(gathered.dataset, WindowDataset)
    return in_store and len(_imitated(stage)) * gathered.space.codec.mask.size > _MOST_NUMBERS


def _training_ends(stage: Stage) -> jax.Array | None:
    """`[S, length, channels]` end weights of the imitated teacher's runs; None if they are too many."""
    dataset, rows = stage.gathered.dataset, _imitated(stage)
    if _too_large(stage):
        return None
    if isinstance(dataset, WindowDataset):
        return jnp.asarray(dataset.read_ends(rows))
    return dataset.tokens[rows, -1]


def _imitated(stage: Stage) -> np.ndarray:
    """Rows of the trajectories of the imitated teacher."""
    return np.flatnonzero(
        np.asarray(stage.gathered.dataset.teacher) == stage.gathered.space.teacher
    )


def _ends(trajectory: Trajectory) -> Params:
    """End weights of a batch of trajectories, leading axis R."""
    return jax.tree.map(lambda leaf: leaf[:, -1], trajectory.states)
