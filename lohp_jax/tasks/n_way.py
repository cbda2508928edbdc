"""Tasks of `way` classes out of many, in a random order of labels.

Where there are few combinations of classes they are listed, where there are many they are drawn: one
draw takes time and memory of order `way`^2, however many classes there are.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.tasks.images import TaskTable
from lohp_jax.tasks.splits import HELD_OUT_FRACTION, Holdout, split_classes

_MOST_LISTED = 100_000


class Part(NamedTuple):
    """How many classes of a task come from which ones.

    Attributes:
      classes: the ones to choose from.
      count: how many.
    """

    classes: tuple[int, ...]
    count: int


class Episodes(NamedTuple):
    """All tasks that take so many classes of each part, drawn and never listed.

    Attributes:
      parts: with no class in common.
      held_out: True for the fifth of the sets of classes that is held out, False for the others, None
        for all.
      seed: picks that fifth.
    """

    parts: tuple[Part, ...]
    held_out: bool | None = None
    seed: int = 0

    @property
    def num_labels(self) -> int:
        """Labels of a task."""
        return sum(part.count for part in self.parts)

    def draw(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The classes `[M]` of a task, part by part in order, and their labels `[M]`.

        All tasks are equally likely: a set of classes of the other side is drawn again.
        """

        def draw(key):
            keys = jax.random.split(key, len(self.parts))
            drawn = [_draw_part(k, part) for k, part in zip(keys, self.parts, strict=True)]
            return jnp.concatenate(drawn)

        def again(state):
            key, _ = state
            key, draw_key = jax.random.split(key)
            return key, draw(draw_key)

        labels = jnp.arange(self.num_labels, dtype=jnp.int32)
        if self.held_out is None:
            return draw(key), labels
        _, classes = jax.lax.while_loop(
            lambda state: is_held_out(state[1], self.seed) != self.held_out,
            again,
            again((key, None)),
        )
        return classes, labels


def is_held_out(classes: jax.Array, seed: int) -> jax.Array:
    """Whether a set of classes belongs to the fifth that `seed` holds out.

    That is a hash of the set: the classes in order, folded one after another into a Threefry key. So
    every set falls on one side, by itself alone, with the chance of a fifth.

    Args:
      classes: `[M]` distinct integers, in any order.
      seed: of the hash.

    Returns: bool scalar.
    """
    key = jax.random.key(seed, impl="threefry2x32")
    key, _ = jax.lax.scan(lambda k, c: (jax.random.fold_in(k, c), None), key, jnp.sort(classes))
    return jax.random.key_data(key)[0] < np.uint32(2**32 * HELD_OUT_FRACTION)


def n_way_tables(
    num_classes: int, *, way: int = 5, holdout: Holdout = "tasks", seed: int = 0
) -> dict[str, TaskTable | Episodes]:
    """Splits the `way`-class tasks over `num_classes` classes.

    Args:
      num_classes: classes of the image set.
      way: classes of a task.
      holdout: "tasks": a fifth of all class combinations is held out, every class is seen in
        training in other combinations; "classes": three in ten classes never occur in training, and
        every held-out task uses as many of them as it can.
      seed: picks what is held out.

    Returns: for each split a table of at most 100,000 combinations, or else `Episodes`, in which the
      fifth is one in expectation.

    Raises: ValueError, if there are too few classes.
    """
    if holdout == "classes":
        return new_class_tables(*split_classes(num_classes, seed), way=way)
    table = all_tasks(range(num_classes), way=way)
    if isinstance(table, Episodes):
        return {
            s: table._replace(held_out=s == "held_out", seed=seed) for s in ("train", "held_out")
        }
    order = np.random.default_rng(seed).permutation(len(table.classes))
    held_out = max(1, int(len(order) * HELD_OUT_FRACTION))
    rows = {"train": order[held_out:], "held_out": order[:held_out]}
    return {split: TaskTable(table.classes[r], table.labels[r]) for split, r in rows.items()}


def new_class_tables(
    seen: Sequence[int], unseen: Sequence[int], *, way: int
) -> dict[str, TaskTable | Episodes]:
    """The `way`-class tasks of some classes for training, and tasks of others to hold out.

    Args:
      seen: classes of the training tasks.
      unseen: classes that no training task has; a held-out task uses as many of them as it can, and
        fills up with seen ones.
      way: classes of a task.

    Returns: as of `n_way_tables`.

    Raises: ValueError, if there are too few classes.
    """
    if len(seen) < way:
        raise ValueError(
            f"n_way_tables: expected at least way={way} training classes, got {len(seen)} of "
            f"{len(seen) + len(unseen)}; hold out tasks, or use an image set with more classes."
        )
    new = min(way, len(unseen))
    mixed = (Part(tuple(unseen), new), Part(tuple(seen), way - new))
    return {"train": all_tasks(seen, way=way), "held_out": _list_or_draw(mixed)}


def all_tasks(classes: Sequence[int], *, way: int) -> TaskTable | Episodes:
    """All tasks of `way` of some classes, listed or drawn as of `n_way_tables`.

    Raises: ValueError, if there are fewer than two.
    """
    if way < 2:
        raise ValueError(f"n_way_tables: way must be at least 2, got {way}.")
    if (count := math.comb(len(classes), way)) < 2:
        raise ValueError(
            f"n_way_tables: expected two tasks or more, got {count}, the ways to choose {way} of "
            f"{len(classes)} classes; ask for a smaller way, or use more classes."
        )
    return _list_or_draw((Part(tuple(classes), way),))


def _list_or_draw(parts: tuple[Part, ...]) -> TaskTable | Episodes:
    if _count(parts) > _MOST_LISTED:
        return Episodes(tuple(part for part in parts if part.count))
    chosen = itertools.product(*(itertools.combinations(*part) for part in parts))
    classes = np.array([sum(sets, ()) for sets in chosen], np.int32)
    labels = np.arange(classes.shape[1], dtype=np.int32)
    return TaskTable(classes, np.broadcast_to(labels, classes.shape))


def _count(parts: Sequence[Part]) -> int:
    return math.prod(math.comb(len(part.classes), part.count) for part in parts)


def _draw_part(key: jax.Array, part: Part) -> jax.Array:
    """`[count]` distinct classes of a part in order, all sets of them equally likely.

    By Floyd's algorithm (Bentley and Floyd, 1987): `jax.random.choice` without replacement sorts all
    classes, thousands of them, for each draw.
    """
    first = len(part.classes) - part.count
    tops = first + jnp.arange(part.count)
    tries = jax.random.randint(key, (part.count,), 0, tops + 1)

    def add(places, step):
        i, top, place = step
        taken = jnp.any(places == place)
        return places.at[i].set(jnp.where(taken, top, place)), None

    empty = jnp.full(part.count, -1)
    places, _ = jax.lax.scan(add, empty, (jnp.arange(part.count), tops, tries))
    return jnp.sort(jnp.asarray(part.classes, jnp.int32)[places])
