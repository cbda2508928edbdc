"""The directory of a run of Lo-Hp: its config, and what was prepared in it, read once."""

import os
import pathlib
from typing import NamedTuple

import jax

from lohp_jax.files import read_json, write_json
from lohp_jax.fitting import Gathered, check_method, gather
from lohp_jax.runs.config import RunConfig, from_json, resolve, to_json
from lohp_jax.runs.directory import check_same_config
from lohp_jax.runs.families import family_of
from lohp_jax.runs.rivals import check_rivals
from lohp_jax.tasks.door import FamilyDescription, check_same_family, describe_family
from lohp_jax.training import checkpoint
from lohp_jax.trajectories.prepare import template
from lohp_jax.trajectories.store import Store, open_store
from lohp_jax.trajectories.teachers import Teacher, make_teachers
from lohp_jax.types import Params, TaskFamily


class Stage(NamedTuple):
    """A prepared run: everything that training and evaluation read, read once.

    Attributes:
      directory: of the run.
      config: resolved.
      family: the tasks.
      description: of the family.
      teachers: in the order of the config.
      gathered: the stored trajectories.
    """

    directory: pathlib.Path
    config: RunConfig
    family: TaskFamily
    description: FamilyDescription
    teachers: tuple[Teacher, ...]
    gathered: Gathered


def open_run(directory: str | os.PathLike, config: RunConfig | None = None) -> RunConfig:
    """Makes a run directory for `config`, or reads the config of one that is there.

    Returns: the resolved config.

    Raises: FileNotFoundError if there is no run and no config; ValueError if the config makes no sense,
      then nothing is written, or if there is a run with another config (with the first field that
      differs), of another family, or one whose config does not read; OSError if the disk is full.
    """
    path = pathlib.Path(directory) / "config.json"
    if not path.exists():
        if config is None:
            raise FileNotFoundError(
                f"no run in {directory} ({path.name} is missing); make one with "
                f"`lohp prepare --out {directory}`."
            )
        config = resolve(config)
        family = family_of(config)
        described = describe_family(family)
        make_teachers(config.prepare.optimizers, config.prepare.num_steps)
        check_rivals(family, config.evaluation.rivals)
        for name in config.methods:
            check_method(config.method(name), family, config.training.channels)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = to_json(config) | {"description": described._asdict()}
        write_json(path, content)
        return config
    values = read_json(path)
    description = values.pop("description", None)
    stored = resolve(from_json(values, path=str(path)))
    if config is not None:
        check_same_config(directory, to_json(stored), to_json(resolve(config)))
    check_same_family(describe_family(family_of(stored)), description or {}, str(directory))
    return stored


def open_stage(
    directory: str | os.PathLike, config: RunConfig, store: Store | None = None
) -> Stage:
    """Reads what `prepare_run` stored.

    Args:
      directory: of the run.
      config: resolved.
      store: of `prepare_run`; None opens it, and reads every file for its checksum.

    Raises: FileNotFoundError or ValueError if trajectories are missing or damaged.
    """
    directory, family = pathlib.Path(directory), family_of(config)
    theta_0, num_steps = start_of(config, family), config.prepare.num_steps
    teachers = make_teachers(config.prepare.optimizers, num_steps, theta_0)
    if store is None:
        like = template(family, theta_0, num_steps, config.prepare.record_every)
        store = open_store(directory / "trajectories", like)
    wanted = config.prepare.num_tasks * len(teachers)
    if (there := len(store) + store.num_dropped) < wanted:
        raise ValueError(
            f"{directory} has {there} of {wanted} trajectories; make the others with "
            f"`lohp prepare --out {directory} --resume`."
        )
    window = config.network.window
    gathered = gather(family, store, theta_0, teachers, config.fitting(), window)
    return Stage(directory, config, family, describe_family(family), teachers, gathered)


def trained_steps(directory: str | os.PathLike, method: str) -> int:
    """Updates in the newest checkpoint of a method, 0 if there is none."""
    return checkpoint.latest_step(pathlib.Path(directory) / "checkpoints" / method) or 0


def start_of(config: RunConfig, family: TaskFamily) -> Params:
    """theta_0 of a run."""
    return family.init(key_of(config, "theta_0"))


def key_of(config: RunConfig, purpose: str) -> jax.Array:
    """The key of one purpose: "theta_0", "prepare", "train" or "evaluate"."""
    purposes = ("theta_0", "prepare", "train", "evaluate")
    return jax.random.fold_in(jax.random.key(config.seed), purposes.index(purpose))
