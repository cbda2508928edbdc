"""What is held out, of classes and of tasks, and which examples make a support."""

from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.checks import check_option
from lohp_jax.types import Split

Holdout = Literal["tasks", "classes"]
HELD_OUT_FRACTION = 0.2
_UNSEEN_CLASSES = 0.3


def split_classes(num_classes: int, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Classes seen in training, and the three in ten that are not, picked by `seed`."""
    order = np.random.default_rng(seed).permutation(num_classes)
    cut = max(1, int(num_classes * _UNSEEN_CLASSES))
    return tuple(sorted(order[cut:].tolist())), tuple(sorted(order[:cut].tolist()))


def split_rows(
    function: str, num_tasks: int, held_out: float | Sequence[int] | np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """Numbers of the tasks for training, and of those held out.

    Args:
      function: named in errors.
      num_tasks: R.
      held_out: a share of the tasks, above 0 and below 1, which `seed` picks; or their numbers.
      seed: picks them.

    Returns: "train" and "held_out", disjoint and neither empty, int32 and in order.

    Raises: ValueError for fewer than two tasks, a share outside (0, 1), numbers that are none of
      tasks, or that leave no task on one side.
    """
    if num_tasks < 2:
        raise ValueError(
            f"{function}: expected 2 or more tasks, one to train on and one to hold out, got "
            f"{num_tasks}; the first axis of x and y counts the tasks."
        )
    if isinstance(held_out, float):
        if not 0 < held_out < 1:
            raise ValueError(
                f"{function}: held_out must be a share of the tasks in (0, 1), or the numbers of those "
                f"to hold out; got {held_out}."
            )
        count = min(max(1, round(num_tasks * held_out)), num_tasks - 1)
        held = np.random.default_rng(seed).permutation(num_tasks)[:count]
    else:
        held = np.unique(np.asarray(held_out))
        whole = held.dtype.kind in "iu" and np.ndim(held_out) == 1
        if not whole or held.min() < 0 or held.max() >= num_tasks:
            raise ValueError(
                f"{function}: held_out must be a share of the tasks in (0, 1), or a list of their "
                f"numbers from 0 to {num_tasks - 1}; got {held_out!r}."
            )
    train = np.setdiff1d(np.arange(num_tasks), held)
    if not len(train):
        raise ValueError(
            f"{function}: held_out names all {num_tasks} tasks; leave some to train on."
        )
    return {"train": train.astype(np.int32), "held_out": np.sort(held).astype(np.int32)}


def draw_support(key: jax.Array, labels: jax.Array, wanted: jax.Array, shots: int) -> jax.Array:
    """Draws `shots` examples of each label without replacement.

    Args:
      key: randomness of the draw.
      labels: `[n]` labels of a task's examples, in any order; each wanted one `shots` times or more.
      wanted: `[M]` labels to draw.
      shots: examples per label.

    Returns: `[M * shots]` int32, the numbers of the examples drawn, label by label.
    """
    score = jax.random.uniform(key, labels.shape)
    member = labels[None] == wanted[:, None]
    return jax.lax.top_k(jnp.where(member, score[None], -1.0), shots)[1].reshape(-1)


def check_split(split: str) -> None:
    """Raises: ValueError for an unknown split."""
    check_option("sample", "split", split, get_args(Split))
