"""Families of tasks by name."""

from collections.abc import Callable
from typing import NamedTuple, get_args

from lohp_jax.checks import check_option
from lohp_jax.data import image_set
from lohp_jax.tasks.images import TaskTable, TeacherData, image_family
from lohp_jax.tasks.n_way import n_way_tables
from lohp_jax.tasks.partitions import partition_tables
from lohp_jax.tasks.splits import Holdout
from lohp_jax.types import TaskFamily


class Entry(NamedTuple):
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
    "digits_5way": Entry(
        "Five classes out of all, in a random order of labels.", n_way_tables, "linear", 10
    ),
    "digits_partitions": Entry("All classes, split in two.", partition_tables, "mlp", 50),
}


def make_family(
    name: str,
    *,
    data: str = "digits",
    data_dir: str | None = None,
    image_size: int | None = None,
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
      image_size: the side in pixels to which images of TensorFlow Datasets are cut and resized; None
        leaves them as they are.
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
    sized = {} if image_size is None else {"image_size": image_size}
    entry, images = FAMILIES[name], image_set(data, data_dir=data_dir, **sized)
    return image_family(
        name,
        images,
        entry.tables(len(images.train), holdout=holdout, seed=seed),
        network=entry.network if network is None else network,
        shots=entry.shots if shots is None else shots,
        teacher_data=teacher_data,
        batch_size=batch_size,
    )
