"""Tasks that split the classes of an image set in two."""

import itertools
from collections.abc import Sequence

import numpy as np

from lohp_jax.tasks.images import TaskTable
from lohp_jax.tasks.splits import HELD_OUT_FRACTION, Holdout, split_classes

_MOST_CLASSES = 16


def partition_tables(
    num_classes: int, *, holdout: Holdout = "tasks", seed: int = 0
) -> dict[str, TaskTable]:
    """Splits the two-class partitions of all classes, 1,022 for ten.

    A partition and its complement have the same solution up to the names of the labels, so they are
    one row here and always fall on the same side.

    Args:
      num_classes: classes of the image set, 3 to 16.
      holdout: "tasks": a fifth of the complement pairs is held out; "classes": three in ten
        classes never occur in training; a held-out task partitions them together with as many seen
        ones as make up the number of classes of a training task.
      seed: picks what is held out.

    Raises: ValueError for a number of classes outside 3 to 16.
    """
    if not 3 <= num_classes <= _MOST_CLASSES:
        raise ValueError(
            f"partition_tables: expected 3 to {_MOST_CLASSES} classes, got {num_classes}; there "
            "are 2^classes - 2 partitions."
        )
    if holdout == "classes":
        seen, unseen = split_classes(num_classes, seed)
        others = itertools.combinations(seen, len(seen) - len(unseen))
        mixed = [(*unseen, *rest) for rest in others]
        return {"train": _cross([seen]), "held_out": _cross(mixed)}
    table = _cross([tuple(range(num_classes))])
    order = np.random.default_rng(seed).permutation(len(table.labels))
    held_out = max(1, int(len(order) * HELD_OUT_FRACTION))
    rows = {"train": order[held_out:], "held_out": order[:held_out]}
    return {split: TaskTable(table.classes[r], table.labels[r]) for split, r in rows.items()}


def _cross(class_sets: Sequence[Sequence[int]]) -> TaskTable:
    """Every set of classes with every partition of it, the first class always labelled 0."""
    size = len(class_sets[0])
    labels = [(0, *rest) for rest in itertools.product((0, 1), repeat=size - 1) if any(rest)]
    rows = [(classes, partition) for classes in class_sets for partition in labels]
    return TaskTable(*(np.array(column, np.int32) for column in zip(*rows, strict=True)))
