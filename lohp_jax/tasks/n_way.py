"""Tasks of `way` classes out of many, in a random order of labels."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from lohp_jax.tasks.images import TaskTable
from lohp_jax.tasks.splits import HELD_OUT_FRACTION, Holdout, split_classes

_MOST_COMBINATIONS = 100_000


def n_way_tables(
    num_classes: int, *, way: int = 5, holdout: Holdout = "tasks", seed: int = 0
) -> dict[str, TaskTable]:
    """Splits the `way`-class tasks over `num_classes` classes.

    Args:
      num_classes: classes of the image set.
      way: classes of a task.
      holdout: "tasks": a fifth of all class combinations is held out, every class is seen in
        training in other combinations; "classes": three in ten classes never occur in training, and
        every held-out task uses as many of them as it can.
      seed: picks what is held out.

    Raises: ValueError, if there are too few classes, or too many combinations to list.
    """
    if holdout == "classes":
        seen, unseen = split_classes(num_classes, seed)
        new = min(way, len(unseen))
        if len(seen) < way:
            raise ValueError(
                f"n_way_tables: expected at least way={way} training classes, got {len(seen)} of "
                f"{num_classes}; hold out tasks, or use an image set with more classes."
            )
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


def _combinations(classes: Sequence[int], way: int) -> list[tuple[int, ...]]:
    count = math.comb(len(classes), way)
    if not 1 < count <= _MOST_COMBINATIONS:
        raise ValueError(
            f"n_way_tables: expected 2 to {_MOST_COMBINATIONS} tasks, got {count}, the ways to "
            f"choose {way} of {len(classes)} classes."
        )
    return list(itertools.combinations(classes, way))


def _table(combinations: Sequence[Sequence[int]]) -> TaskTable:
    classes = np.asarray(combinations, np.int32)
    labels = np.arange(classes.shape[1], dtype=np.int32)
    return TaskTable(classes, np.broadcast_to(labels, classes.shape))
