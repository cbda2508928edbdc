"""A run, stage by stage, over one directory. Nothing here prints.

config.json   metrics.jsonl   results.json   figures.json   report.html
trajectories/   checkpoints/METHOD/
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.baselines import adaptation
from lohp_jax.baselines.retrieval import nearest_task
from lohp_jax.baselines.ridge import ridge
from lohp_jax.codec import Codec
from lohp_jax.evaluation import scores
from lohp_jax.evaluation.figures import figures
from lohp_jax.evaluation.honesty import honesty
from lohp_jax.evaluation.records import SCHEMA
from lohp_jax.files import write_atomically
from lohp_jax.generation import load
from lohp_jax.methods.setting import (
    Dataset,
    Frame,
    family_of,
    make_dataset,
    make_frame,
    make_policy,
)
from lohp_jax.runs.config import METHODS, RunConfig, from_json, resolve, to_json
from lohp_jax.training import checkpoint
from lohp_jax.training.distributed import Strategy
from lohp_jax.training.engine import num_updates, train
from lohp_jax.trajectories.prepare import prepare, template
from lohp_jax.trajectories.store import Store, open_store
from lohp_jax.trajectories.teachers import Teacher, make_teachers
from lohp_jax.types import Generator, Params, Progress, PyTree, TaskFamily, Trajectory

_TUNING_TASKS = 64
_SUPPORT_DRAWS = 4
_CLOSED_FORM = ("nearest_task", "ridge")
_VERSIONS = ("lohp_jax", "jax", "jaxlib", "dm-haiku", "optax", "numpy")


def open_run(directory: str | os.PathLike, config: RunConfig | None = None) -> RunConfig:
    """Makes a run directory for `config`, or reads the config of one that is there.

    Returns: the resolved config.

    Raises: FileNotFoundError if there is no run and no config; ValueError if the config makes no sense,
      then nothing is written, or if there is a run with another config (with the first field that
      differs) or one whose config does not read; OSError if the disk is full.
    """
    path = pathlib.Path(directory) / "config.json"
    if not path.exists():
        if config is None:
            raise FileNotFoundError(
                f"no run in {directory} ({path.name} is missing); make one with "
                f"`lohp prepare --out {directory}`."
            )
        config = resolve(config)
        family_of(config)  # raises for tasks that do not exist
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"schema": SCHEMA, **to_json(config)})
        return config
    stored = resolve(from_json(read_json(path), path=str(path)))
    if config is not None and (
        difference := first_difference(to_json(stored), to_json(resolve(config)))
    ):
        raise ValueError(
            f"{directory} holds a run with another config: {difference}; "
            "choose another --out, or give the same options."
        )
    return stored


def prepare_run(
    directory: str | os.PathLike,
    config: RunConfig,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Store:
    """Stage 1: stores the trajectories of a resolved config; resumes."""
    family = family_of(config)
    settings = config.prepare
    described = {
        "family": config.family,
        "seed": config.seed,
        **{name: to_json(config)[name] for name in ("tasks", "prepare")},
    }
    return prepare(
        family,
        settings.optimizers,
        theta_0=start_of(config, family),
        num_tasks=settings.num_tasks,
        num_steps=settings.num_steps,
        start=settings.start,
        start_noise=settings.start_noise,
        key=_key(config, "prepare"),
        directory=pathlib.Path(directory) / "trajectories",
        config=described,
        on_progress=on_progress,
    )


def train_run(
    directory: str | os.PathLike,
    config: RunConfig,
    method: str,
    *,
    strategy: Strategy = "jit",
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Stage 2: trains one method on the stored trajectories; resumes from its newest checkpoint."""
    directory = pathlib.Path(directory)
    family = family_of(config)
    frame, store = _frame_and_store(directory, config, family)
    policy = make_policy(config, family, frame, method)
    params = None
    if method == "lohp_consolidated":
        params = load(directory, "lohp").params[0]
    train(
        config,
        family,
        policy,
        frame,
        make_dataset(config, store, policy),
        directory,
        method,
        key=_key(config, "train"),
        params=params,
        strategy=strategy,
        on_progress=on_progress,
    )


def evaluate_run(
    directory: str | os.PathLike,
    config: RunConfig,
    on_progress: Callable[[str, int, int], None] = lambda method, done, total: None,
) -> dict[str, Any]:
    """Stage 3: scores every method on the same held-out tasks; writes results.json and figures.json.

    Args:
      directory: of a run whose methods are trained; others that were trained in it are scored too.
      config: resolved.
      on_progress: called before each method with its name, how many are done, and how many there are.

    Returns: the results.

    Raises: FileNotFoundError or ValueError if trajectories or a method are not complete, or damaged;
      OSError if the disk is full, with the results before it intact.
    """
    directory = pathlib.Path(directory)
    trained = _load_trained(directory, config)
    setting, about = _set_up(directory, config)
    stages = [*teacher_names(config), "same_support_adam", *_CLOSED_FORM, *trained]

    def announce(method):
        on_progress(method, stages.index(method), len(stages))

    teacher_rows, taught = _score_teachers(setting, announce)
    announce("same_support_adam")
    tuned = _tune(setting)
    producers = {"same_support_adam": scores.adapter(setting.family, setting.frame.theta_0, tuned)}
    for method, generator in (_closed_form(setting) | trained).items():
        producers[method] = scores.from_generator(generator)
    rows, honest = _score_producers(setting, producers, taught, announce, tuned.num_steps)
    drawn = figures(
        setting.family,
        trained["lohp"],
        setting.tasks,
        codec=setting.codec,
        teacher=about["imitated"],
        taught=taught,
        compression=config.training.compression,
    )
    results = {
        **about,
        "same_support_adam": tuned._asdict(),
        "rows": teacher_rows + rows,
        "honesty": honest,
    }
    write_json(directory / "figures.json", drawn)
    write_json(directory / "results.json", results)
    return results


def trained_steps(directory: str | os.PathLike, method: str) -> int:
    """Updates in the newest checkpoint of a method, 0 if there is none."""
    return checkpoint.latest_step(pathlib.Path(directory) / "checkpoints" / method) or 0


def write_weights(path: str | os.PathLike, weights: Params) -> None:
    """Writes weights as safetensors, one tensor per leaf, named by its path joined with dots."""
    import safetensors.numpy  # here, for a light `import lohp_jax`

    named = jax.tree.flatten_with_path(weights)[0]
    tensors = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.ascontiguousarray(leaf)
        for path, leaf in named
    }
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, safetensors.numpy.save(tensors))


def teachers_of(config: RunConfig, theta_0: Params | None = None) -> tuple[Teacher, ...]:
    """The teachers of a run."""
    return make_teachers(config.prepare.optimizers, config.prepare.num_steps, theta_0)


def teacher_names(config: RunConfig) -> list[str]:
    """Row of each teacher."""
    return [f"teacher_{teacher.name}" for teacher in teachers_of(config)]


def start_of(config: RunConfig, family: TaskFamily) -> Params:
    """theta_0 of a run."""
    return family.init(_key(config, "theta_0"))


def environment() -> dict[str, Any]:
    """Versions, platform and device."""
    return {
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "cpu_cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
    }


def open_directory(directory: str | os.PathLike, config: Any) -> None:
    """Makes a directory for a config, a dataclass, or checks that the one that is there has the same.

    Raises: ValueError for another config (with the first field that differs) or one that does not read.
    """
    path, values = pathlib.Path(directory) / "config.json", dataclasses.asdict(config)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"schema": SCHEMA, **values})
        return
    stored = dataclasses.asdict(read_config(directory, type(config)))
    if difference := first_difference(stored, values):
        raise ValueError(
            f"{directory} holds a run with another config: {difference}; "
            "choose another --out, or give the same options."
        )


def read_config(directory: str | os.PathLike, kind: type) -> Any:
    """The config of a run that is there, of the dataclass `kind`.

    Raises: ValueError if it does not read.
    """
    path = pathlib.Path(directory) / "config.json"
    return from_json(read_json(path), kind, str(path))


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads one of our JSON files and takes its schema off.

    Raises: ValueError if it does not parse or is of another version; nothing is deleted.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        schema = values.pop("schema")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}); put a copy back, or start in another directory. "
            "Nothing was deleted."
        ) from error
    if schema != SCHEMA:
        raise ValueError(
            f"{path} has schema {schema!r}, this version of lohp_jax reads schema {SCHEMA} only; use "
            "the version that wrote it, or start in another directory. Nothing was deleted."
        )
    return values


def write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
    """Writes a file in one step: a reader sees the old one or the new one, whole.

    Raises: OSError if the disk is full; the old file is then intact.
    """
    write_atomically(path, (json.dumps(values, indent=1) + "\n").encode())


def _key(config: RunConfig, purpose: str) -> jax.Array:
    purposes = ("theta_0", "prepare", "train", "evaluate")
    return jax.random.fold_in(jax.random.key(config.seed), purposes.index(purpose))


def _frame_and_store(directory, config, family) -> tuple[Frame, Store]:
    theta_0 = start_of(config, family)
    like = template(family, theta_0, config.prepare.num_steps)
    store = open_store(directory / "trajectories", like)
    wanted = config.prepare.num_tasks * len(config.prepare.optimizers)
    if (there := len(store) + store.num_dropped) < wanted:
        raise ValueError(
            f"{directory} has {there} of {wanted} trajectories; make the others with "
            f"`lohp prepare --out {directory} --resume`."
        )
    return make_frame(store, theta_0), store


def _load_trained(directory: pathlib.Path, config: RunConfig) -> dict[str, Generator]:
    """The learned methods of a config, and any other that was trained in the directory."""
    generators = {}
    for method in METHODS:
        done, wanted = trained_steps(directory, method), num_updates(config, method)
        if not done and method not in config.methods:
            continue
        if done < wanted:
            raise ValueError(
                f"{directory} has {done} of {wanted} updates of {method}; make the others with "
                f"`lohp train --out {directory} --method {method} --resume`."
            )
        generators[method] = load(directory, method)
    return generators


class _Setting(NamedTuple):
    """What every method is evaluated on."""

    config: RunConfig
    family: TaskFamily
    frame: Frame
    codec: Codec
    dataset: Dataset
    tasks: scores.TaskBatch


def _set_up(directory: pathlib.Path, config: RunConfig) -> tuple[_Setting, dict[str, Any]]:
    """The setting of a run, and what results.json says of it."""
    family = family_of(config)
    frame, store = _frame_and_store(directory, config, family)
    policy = make_policy(config, family, frame, "lohp")
    dataset = make_dataset(config, store, policy)
    key = _key(config, "evaluate")
    tasks = scores.draw_tasks(family, key, config.evaluation.num_tasks, "held_out")
    about = {
        "schema": SCHEMA,
        "family": config.family,
        "config": to_json(config),
        "environment": environment(),
        "imitated": teacher_names(config)[int(frame.optimizer)],
        "num_trajectories": len(store),
        "num_dropped": store.num_dropped,
        "num_weights": int(policy.codec.mask.sum()),
    }
    return _Setting(config, family, frame, policy.codec, dataset, tasks), about


def _score_teachers(
    setting: _Setting, announce: Callable[[str], None]
) -> tuple[list[dict[str, Any]], Trajectory]:
    """Rows of all teachers, and the trajectories of the one that is imitated."""
    config, family, frame, _, _, tasks = setting
    rows, num_steps = [], config.prepare.num_steps
    for index, teacher in enumerate(teachers_of(config, frame.theta_0)):
        method = f"teacher_{teacher.name}"
        announce(method)
        producer = scores.teacher(family, teacher.optimizer, frame.theta_0, num_steps)
        trajectories = producer.many(tasks.data, tasks.keys)
        row = scores.make_row(
            method,
            config.seed,
            scores.accuracies(family, _ends(trajectories), tasks.data),
            gradients=teacher.gradients * num_steps,
            latency=scores.latency(producer, tasks.data, tasks.keys),
        )
        rows.append(row)
        if index == int(frame.optimizer):
            imitated = trajectories
    return rows, imitated


def _score_producers(
    setting: _Setting,
    producers: dict[str, Callable[[PyTree, jax.Array], Params]],
    taught: Trajectory,
    announce: Callable[[str], None],
    adam_steps: int,
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """Rows and honesty reports of all that makes weights from contexts."""
    config, family, _, codec, dataset, tasks = setting
    rows, honest = [], {}
    for method, produce in producers.items():
        announce(method)
        producer = scores.make_producer(produce)
        weights = producer.many(tasks.contexts, tasks.keys)
        row = scores.make_row(
            method,
            config.seed,
            scores.accuracies(family, weights, tasks.data),
            gradients=adam_steps if method == "same_support_adam" else 0,
            latency=scores.latency(producer, tasks.contexts, tasks.keys),
        )
        rows.append(row)
        honest[method] = honesty(
            family,
            producer,
            tasks,
            codec=codec,
            weights=weights,
            teacher_weights=_ends(taught),
            training_tokens=dataset.tokens[_imitated(setting), -1],
        )
    return rows, honest


def _imitated(setting: _Setting) -> np.ndarray:
    """Rows of the trajectories of the imitated teacher."""
    return np.flatnonzero(np.asarray(setting.dataset.optimizer) == int(setting.frame.optimizer))


def _tune(setting: _Setting) -> adaptation.Tuned:
    """Learning rate and length of Adam on a support, tuned on training tasks."""
    key = jax.random.fold_in(_key(setting.config, "evaluate"), 1)
    tuning = scores.draw_tasks(setting.family, key, _TUNING_TASKS, "train")
    return adaptation.tune(setting.family, setting.frame.theta_0, tuning.data, tuning.contexts)


def _ends(trajectory: Trajectory) -> Params:
    """End weights of a batch of trajectories, leading axis R."""
    return jax.tree.map(lambda leaf: leaf[:, -1], trajectory.states)


def _closed_form(setting: _Setting) -> dict[str, Generator]:
    """The baselines that need no training, on several supports of every stored task."""
    config, family, _, codec, dataset, _ = setting
    rows = jnp.asarray(np.tile(_imitated(setting), _SUPPORT_DRAWS))
    data = jax.tree.map(lambda leaf: leaf[rows], dataset.data)
    keys = jax.random.split(jax.random.fold_in(_key(config, "evaluate"), 2), len(rows))
    contexts = jax.jit(jax.vmap(family.context))(data, keys)
    ends = dataset.tokens[rows, -1]
    weights = jax.jit(jax.vmap(codec.decode))(ends)
    return {
        "nearest_task": nearest_task(family, contexts, weights),
        "ridge": ridge(family, codec, contexts, ends),
    }


def first_difference(old: Any, new: Any, path: str = "") -> str | None:
    """The first field in which two nested configs differ, with both values; None if they agree."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old:
            if found := first_difference(old[name], new[name], f"{path}.{name}" if path else name):
                return found
        return None
    return None if old == new else f"{path} is {old!r} there and {new!r} here"
