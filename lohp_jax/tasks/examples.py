"""Arrays of many small tasks: which examples teach, make a support, or are for evaluation alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.tasks.splits import check_split, draw_support


@dataclasses.dataclass(frozen=True, eq=False)
class TaskArrays:
    """All tasks, and which examples are for what.

    Attributes:
      x: `[R, n, ...]`.
      y: `[R, n, ...]`.
      train: `[R, n - num_query]` numbers of the training examples.
      query: `[R, num_query]` numbers of the others.
      groups: `[R, n]` labels, or zeros where there are none.
      present: `[R, M]` labels of each task in order, or one zero.
      shots: examples per label in a context.
      num_classes: 0 where there are no labels.
      rows: numbers of the tasks of each split.
      dealt: whether `sample` deals the support.
      named: whether labels have names that `rename` changes.
    """

    x: np.ndarray
    y: np.ndarray
    train: np.ndarray
    query: np.ndarray
    groups: np.ndarray
    present: np.ndarray
    shots: int
    num_classes: int
    rows: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    dealt: bool = False
    named: bool = False

    def sample(self, key: jax.Array, split: str = "train") -> dict[str, jax.Array]:
        """The number of a task, the names of its labels and its support, where it has them."""
        check_split(split)
        row_key, support_key = jax.random.split(key)
        data = {"task": jax.random.choice(row_key, jnp.asarray(self.rows[split]))}
        if self.named:
            data["names"] = jnp.arange(self.num_classes, dtype=jnp.int32)
        if self.dealt:
            data["support"] = self.draw(data, support_key)
        return data

    def draw(self, data: dict, key: jax.Array) -> jax.Array:
        """Numbers of the examples of a support, among the training ones, label by label."""
        task = data["task"]
        groups = jnp.asarray(self.groups)[task, jnp.asarray(self.train)[task]]
        present = jnp.asarray(self.present)[task]
        if self.named:
            groups, present = data["names"][groups], jnp.sort(data["names"][present])
        return draw_support(key, groups, present, self.shots)

    def look_up(self, data: dict, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Examples of a task by their numbers among all of its own."""
        x, y = (jnp.asarray(pool)[data["task"], index] for pool in (self.x, self.y))
        return x, data["names"][y] if self.named else y

    def training(self, data: dict, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Examples of a task by their numbers among its training examples."""
        return self.look_up(data, jnp.asarray(self.train)[data["task"], index])

    def seen(self, data: dict) -> jax.Array:
        """Numbers of the training examples that a teacher sees."""
        return data["support"] if self.dealt else jnp.arange(self.train.shape[1])


def deal(
    function: str,
    x: np.ndarray,
    y: np.ndarray,
    num_classes: int,
    shots: int,
    num_query: int | None,
    seed: int,
) -> TaskArrays:
    """Splits the examples of each task in training and query, each label in the same shares."""
    num_tasks, count = x.shape[:2]
    num_query = count // 2 if num_query is None else num_query
    if not 1 <= num_query < count:
        raise ValueError(
            f"{function}: num_query must be between 1 and {count - 1}, to leave some of the n = {count} "
            f"examples of a task to train on, got {num_query}."
        )
    groups = y if num_classes else np.zeros((num_tasks, count), np.int32)
    order = _spread(groups, seed)
    train, query = (
        np.sort(part, axis=1).astype(np.int32)
        for part in np.split(order, [count - num_query], axis=1)
    )
    numbers = _count_labels(groups, max(num_classes, 1))
    kinds = (numbers > 0).sum(axis=1)
    if (kinds != kinds[0]).any():
        other = int(np.argmax(kinds != kinds[0]))
        raise ValueError(
            f"{function}: expected the same number of different labels in every task, got {kinds[0]} in "
            f"task 0 and {kinds[other]} in task {other}; leave out the tasks that lack labels."
        )
    present = np.nonzero(numbers)[1].reshape(num_tasks, -1).astype(np.int32)
    tasks = TaskArrays(x, y, train, query, groups, present, shots, num_classes)
    _check_shots(function, tasks)
    return tasks


def _spread(groups: np.ndarray, seed: int) -> np.ndarray:
    """An order of the examples of each task in which every stretch has the labels in equal shares.

    Args:
      groups: `[R, n]` labels.
      seed: of the order of examples with the same label, and of ties.

    Returns: `[R, n]` numbers of examples.
    """
    num_tasks, count = groups.shape
    rng = np.random.default_rng([seed, 1])
    order = rng.permuted(np.tile(np.arange(count), (num_tasks, 1)), axis=1)
    by_label = np.argsort(np.take_along_axis(groups, order, 1), axis=1, kind="stable")
    order = np.take_along_axis(order, by_label, 1)
    labels = np.take_along_axis(groups, order, 1)
    place = np.arange(count)[None]
    starts = np.diff(labels, axis=1, prepend=-1) != 0
    ends = np.diff(labels, axis=1, append=-1) != 0
    first = np.maximum.accumulate(np.where(starts, place, 0), axis=1)
    last = np.minimum.accumulate(np.where(ends, place, count)[:, ::-1], axis=1)[:, ::-1]
    share = (place - first + rng.uniform(0.25, 0.75, order.shape)) / (last - first + 1)
    return np.take_along_axis(order, np.argsort(share, axis=1), 1)


def _count_labels(groups: np.ndarray, num_classes: int) -> np.ndarray:
    """`[R, num_classes]` examples of each label in each task."""
    counts = np.zeros((len(groups), num_classes), np.int32)
    np.add.at(counts, (np.arange(len(groups))[:, None], groups), 1)
    return counts


def _check_shots(function: str, tasks: TaskArrays) -> None:
    """Raises: ValueError unless every task has `shots` training examples of each of its labels."""
    seen = np.take_along_axis(tasks.groups, tasks.train, 1)
    left = _count_labels(seen, max(tasks.num_classes, 1))
    left = np.take_along_axis(left, tasks.present, 1)
    if 1 <= tasks.shots <= left.min():
        return
    task, which = np.unravel_index(left.argmin(), left.shape)
    of_label = f" of label {tasks.present[task, which]}" if tasks.num_classes else ""
    raise ValueError(
        f"{function}: shots must be between 1 and {left.min()}, the training examples{of_label} that "
        f"task {task} has beside its {tasks.query.shape[1]} query examples, got {tasks.shots}; ask for "
        "fewer shots or a smaller num_query, or leave out tasks with few examples."
    )
