"""What families that only compare optimizers share: one task, and nothing for a generator to see."""

from collections.abc import Callable

import jax

from lohp_jax.tasks.splits import check_split
from lohp_jax.types import Params, PyTree, TaskFamily


def single_task(
    name: str,
    data: PyTree,
    *,
    init: Callable[[jax.Array], Params],
    objective: Callable[[Params, PyTree], jax.Array],
) -> TaskFamily:
    """A family of one task, in both splits, whose inner loss is also its measure of quality.

    Args:
      name: stored as `TaskFamily.name`.
      data: what `sample` returns, whatever its key.
      init: `(key) -> params`.
      objective: `(params, data) -> scalar`.

    Raises: ValueError, from `sample`, for an unknown split.
    """

    def sample(key, split="train"):
        check_split(split)
        return data

    def evaluate(params, data):
        value = objective(params, data)
        return {"objective": value, "loss": value}

    return TaskFamily(
        sample,
        init,
        lambda params, data, key: objective(params, data),
        evaluate,
        no_context,
        name=name,
    )


def no_context(data: PyTree, key: jax.Array) -> tuple[()]:
    """The context of a task of which a generator may see nothing."""
    return ()
