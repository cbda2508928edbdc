"""Families of tasks and of optimization problems by name."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

from lohp_jax.checks import check_option
from lohp_jax.data import image_set
from lohp_jax.tasks.ackley import ackley
from lohp_jax.tasks.fit_mlp import fit_mlp
from lohp_jax.tasks.image_tasks import TaskTable, TeacherData, image_family
from lohp_jax.tasks.lasso import lasso, lasso_patches
from lohp_jax.tasks.n_way import n_way_tables
from lohp_jax.tasks.partitions import partition_tables
from lohp_jax.tasks.rastrigin import rastrigin
from lohp_jax.tasks.splits import Holdout
from lohp_jax.types import ProblemFamily, TaskFamily


class Preset(NamedTuple):
    """A family before its data are known.

    Attributes:
      summary: of its tasks, in one line.
      tables: makes the tables of tasks from the number of classes of an image set.
      network: default classifier.
      shots: default support images per label.
    """

    summary: str
    tables: Callable[..., dict[str, TaskTable]]
    network: str
    shots: int


FAMILIES = {
    "digits_5way": Preset(
        "Five classes out of all, in a random order of labels.", n_way_tables, "linear", 10
    ),
    "digits_partitions": Preset("All classes, split in two.", partition_tables, "mlp", 50),
}

PROBLEMS = {
    "lasso": lasso,
    "lasso_5x10": functools.partial(lasso, 5, 10),
    "lasso_250x500": functools.partial(lasso, 250, 500, nonzeros=50),
    "lasso_fixed": functools.partial(lasso, dictionary="fixed"),
    "lasso_fixed_5x10": functools.partial(lasso, 5, 10, dictionary="fixed"),
    "lasso_fixed_250x500": functools.partial(lasso, 250, 500, dictionary="fixed", nonzeros=50),
    "lasso_patches": lasso_patches,
    **{f"rastrigin_{n}": functools.partial(rastrigin, n=n) for n in (2, 10, 30)},
    **{
        f"rastrigin_shifted_{n}": functools.partial(rastrigin, n=n, form="shifted")
        for n in (2, 10, 30, 50)
    },
    **{f"ackley_{n}": functools.partial(ackley, n=n) for n in (2, 10, 30, 50)},
    **{
        f"ackley_rotated_{n}": functools.partial(ackley, n=n, rotated=True) for n in (2, 10, 30, 50)
    },
    "digits_mlp": fit_mlp,
}
"""Factory of each family of optimization problems."""


def make_problem(name: str, **options: Any) -> ProblemFamily:
    """Builds a family of optimization problems by name; the family is called `name`.

    Args:
      name: a key of `PROBLEMS`.
      **options: of its factory, e.g. `penalty=0.005`, in place of what the name stands for.

    Raises: ValueError for an unknown name, with the nearest one, and what the factory raises.
    """
    check_option("make_problem", "name", name, PROBLEMS)
    return dataclasses.replace(PROBLEMS[name](**options), name=name)


def make_family(
    name: str,
    *,
    data: str = "digits",
    data_dir: str | None = None,
    network: str | None = None,
    shots: int | None = None,
    teacher_data: TeacherData = "full",
    holdout: Holdout = "tasks",
    batch_size: int | None = None,
    seed: int = 0,
) -> TaskFamily:
    """Builds a task family by name.

    Args:
      name: a key of `FAMILIES`.
      data: "digits", or "tfds:NAME" for an image set of TensorFlow Datasets on this machine.
      data_dir: where TensorFlow Datasets are; None for its default.
      network: "linear", "mlp" or "conv"; None for the family's default.
      shots: support images per label; None for the family's default.
      teacher_data: what teachers see, "full" or "support"; see `image_family`.
      holdout: what is held out, "tasks" or "classes".
      batch_size: images per step of a teacher; None for all.
      seed: picks what is held out.

    Raises: ValueError for an unknown name, with the nearest one, and for bad options; also what
      `image_set` raises.
    """
    check_option("make_family", "name", name, FAMILIES)
    check_option("make_family", "holdout", holdout, get_args(Holdout))
    preset, images = FAMILIES[name], image_set(data, data_dir=data_dir)
    return image_family(
        name,
        images,
        preset.tables(len(images.train), holdout=holdout, seed=seed),
        network=preset.network if network is None else network,
        shots=preset.shots if shots is None else shots,
        teacher_data=teacher_data,
        batch_size=batch_size,
    )
