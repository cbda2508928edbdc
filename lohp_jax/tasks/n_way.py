"""Tasks of `way` classes out of many, in a random order of labels."""

import itertools
import math

import numpy as np

from lohp_jax.tasks.image_tasks import TaskTable
from lohp_jax.tasks.splits import HELD_OUT_FRACTION, Holdout, split_classes

_MOST_COMBINATIONS = 100_000


def n_way_tables(
    num_classes: int, *, way: int = 5, holdout: Holdout = "tasks", seed: int = 0
) -> dict[str, TaskTable]:
    """Splits the `way`-class tasks over `num_classes` classes.

    Args:
      num_classes: classes of the image set.
      way: classes of a task.
      holdout: "tasks": a quarter of all class combinations is held out, every class is seen in
        training in other combinations; "classes": three in ten classes never occur in training, and
        every held-out task uses as many of them as it can.
      seed: picks what is held out.

    Raises: ValueError, if there are too few classes, or too many combinations to list.
    """
    if holdout == "classes":
        seen, unseen = split_classes(num_classes, seed)
        new = min(way, len(unseen))
        if len(seen) < way:
            raise ValueError(f"n_way: {len(seen)} training classes are fewer than way={way}.")
        combinations = {
            "train": _combinations(seen, way),
            "held_out": [
                (*u, *s)
                for u in itertools.combinations(unseen, new)
                for s in itertools.combinations(seen, way - new)
            ],
        }
    else:
        every = np.array(_combinations(range(num_classes), way))
        every = every[np.random.default_rng(seed).permutation(len(every))]
        held_out = max(1, int(len(every) * HELD_OUT_FRACTION))
        combinations = {"train": every[held_out:], "held_out": every[:held_out]}
    return {split: _table(classes) for split, classes in combinations.items()}


def _combinations(classes, way: int) -> list[tuple[int, ...]]:
    count = math.comb(len(classes), way)
    if not 1 < count <= _MOST_COMBINATIONS:
        raise ValueError(
            f"n_way: {way} of {len(classes)} classes give {count} tasks; expected 2 to "
            f"{_MOST_COMBINATIONS}."
        )
    return list(itertools.combinations(classes, way))


def _table(classes) -> TaskTable:
    classes = np.asarray(classes, np.int32)
    return TaskTable(classes, np.broadcast_to(np.arange(classes.shape[1], dtype=np.int32), classes.shape))
