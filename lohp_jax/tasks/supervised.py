"""A family from a model and data of the user's own: arrays of many small supervised tasks.

>>> x = np.random.default_rng(0).uniform(-1, 1, (200, 20, 1))  # 200 tasks of 20 examples
>>> y = x * np.arange(200)[:, None, None] / 100
>>> init = lambda key: {"slope": jnp.zeros(1)}
>>> family = supervised_family(init, lambda params, x: params["slope"][None] * x, x, y, shots=5)
>>> family.context(family.sample(jax.random.key(0)), jax.random.key(1))["x"].shape
(5, 1)
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.checks import as_held, check_option
from lohp_jax.tasks.door import check_class_axes
from lohp_jax.tasks.examples import TaskArrays, deal
from lohp_jax.tasks.model import (
    Kind,
    Loss,
    LossName,
    Model,
    mean_squared_error,
    read_loss,
    read_model,
)
from lohp_jax.tasks.splits import split_rows
from lohp_jax.types import Params, PyTree, Support, TaskFamily

TeacherData = Literal["full", "support"]
_NAME = "supervised_family"


def supervised_family(
    init: Callable[..., Params],
    apply: Callable[[Params, jax.Array], jax.Array],
    x: np.ndarray,
    y: np.ndarray,
    *,
    shots: int,
    loss: LossName | Loss | None = None,
    held_out: float | Sequence[int] = 0.2,
    num_query: int | None = None,
    teacher_data: TeacherData = "full",
    batch_size: int | None = None,
    num_classes: int | None = None,
    class_axes: PyTree | None = None,
    support: Support | None = None,
    name: str = "supervised",
    seed: int = 0,
) -> TaskFamily:
    """Turns a model, and the examples of many small tasks, into a `TaskFamily`.

    Args:
      init: `(key) -> params` or, as of Haiku and flax, `(key, x) -> params`; any pytree of floats.
      apply: `(params, x [b, ...]) -> predictions [b, ...]`.
      x: `[R, n, ...]` inputs of R tasks with n examples each.
      y: `[R, n, ...]` targets; for the cross-entropy `[R, n]` integers, in any order and unbalanced,
        but of as many different labels in every task.
      shots: examples in a context, drawn from the training ones; with the cross-entropy, of each label.
      loss: one of the names, or `(predictions, y) -> scalar`, a mean over examples; None for the
        cross-entropy of integers and the mean squared error of other y.
      held_out: share of the tasks, or their numbers, that no training sees.
      num_query: examples of each task that only `evaluate` sees, of all labels; None for half.
      teacher_data: "full": the loss is over all training examples; "support": over the context, which
        `sample` deals.
      batch_size: examples per evaluation of the loss, drawn with replacement; None for all.
      num_classes: of the cross-entropy; None for the largest label plus one.
      class_axes: see `TaskFamily`; give it where the names of the labels mean nothing.
      support: see `TaskFamily`.
      name: of the family.
      seed: picks tasks and examples to hold out.

    Raises: ValueError for arrays, functions or numbers that do not fit, before anything is compiled.
    """
    kind = read_loss(_NAME, loss, y)
    x, y, num_classes = _read_arrays(x, y, kind, num_classes)
    rows = split_rows(_NAME, len(x), held_out, seed)
    _check_options(teacher_data, batch_size, class_axes, kind)
    dealt, named = teacher_data == "support", class_axes is not None
    tasks = deal(_NAME, x, y, num_classes, shots, num_query, seed)
    tasks = dataclasses.replace(tasks, rows=rows, dealt=dealt, named=named)
    first = rows["train"][0]
    model = read_model(_NAME, init, apply, kind, x[first], y[first], num_classes)
    if named:
        params = jax.eval_shape(model.init, jax.random.key(0))
        check_class_axes(_NAME, class_axes, params, num_classes)
    family = _make_family(model, tasks, batch_size)
    return dataclasses.replace(family, name=name, class_axes=class_axes, support=support)


def _make_family(model: Model, tasks: TaskArrays, batch_size: int | None) -> TaskFamily:
    init, apply, (kind, mean_loss) = model

    def loss(params, data, key):
        index = tasks.seen(data)
        if batch_size is not None and batch_size < index.shape[0]:
            index = jax.random.choice(key, index, (batch_size,))
        x, y = tasks.training(data, index)
        return mean_loss(apply(params, x), y)

    def context(data, key):
        x, y = tasks.training(data, data["support"] if tasks.dealt else tasks.draw(data, key))
        return {"x": x, "y": y}

    def evaluate(params, data):
        x, y = tasks.look_up(data, jnp.asarray(tasks.query)[data["task"]])
        predictions = apply(params, x)
        value = mean_loss(predictions, y)
        if kind == "cross_entropy":
            hits = jnp.argmax(predictions, axis=-1) == y
            share = jnp.mean(jax.nn.one_hot(y, tasks.num_classes), axis=0)
            return {"accuracy": jnp.mean(hits), "loss": value, "chance": jnp.max(share)}
        if kind == "mse":
            _, seen = tasks.training(data, jnp.arange(tasks.train.shape[1]))
            constant = jnp.broadcast_to(jnp.mean(seen, axis=0, keepdims=True), y.shape)
            return {"objective": value, "loss": value, "chance": mean_squared_error(constant, y)}
        return {"objective": value, "loss": value}

    def context_loss(params, context):
        return mean_loss(apply(params, context["x"]), context["y"])

    def rename(data, order):
        return {**data, "names": order[data["names"]]}

    return TaskFamily(
        tasks.sample,
        init,
        loss,
        evaluate,
        context,
        num_classes=tasks.num_classes,
        context_loss=context_loss,
        rename=rename if tasks.named else None,
    )


def _read_arrays(
    x: np.ndarray, y: np.ndarray, kind: Kind, num_classes: int | None
) -> tuple[np.ndarray, np.ndarray, int]:
    """The arrays in the types that JAX computes with, and the number of classes."""
    x, y = _read_array("x", x), _read_array("y", y)
    if x.shape[:2] != y.shape[:2]:
        raise ValueError(
            f"{_NAME}: expected x [R, n, ...] and y [R, n, ...] of the same R tasks and n examples, got "
            f"x {list(x.shape)} and y {list(y.shape)}."
        )
    if kind.name == "mse" and not jnp.issubdtype(y.dtype, jnp.floating):
        raise ValueError(
            f"{_NAME}: expected floating-point y for the loss 'mse', got {y.dtype}; convert it with "
            "y.astype(np.float32), or give loss='cross_entropy' for labels."
        )
    if kind.name == "cross_entropy":
        return x, y.astype(np.int32), _count_classes(y, num_classes)
    if num_classes is not None:
        raise ValueError(
            f"{_NAME}: num_classes is for loss='cross_entropy', got {num_classes} with another; leave "
            "it out, or give that loss."
        )
    return x, y, 0


def _read_array(name: str, array: np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.number) and array.dtype != bool:
        raise ValueError(
            f"{_NAME}: expected {name} of numbers, got {array.dtype}; encode it first, and pad tasks to "
            "the same number of examples."
        )
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise ValueError(f"{_NAME}: expected real {name}, got {array.dtype}; stack its two parts.")
    if array.ndim < 2 or not array.size:
        raise ValueError(
            f"{_NAME}: expected {name} of shape [R, n, ...], R tasks of n examples, got "
            f"{list(array.shape)}."
        )
    if jnp.issubdtype(array.dtype, jnp.floating) and not np.isfinite(array).all():
        task, example = np.argwhere(~np.isfinite(array))[0][:2]
        raise ValueError(
            f"{_NAME}: expected finite {name}, got NaN or infinity, first in task {task}, example "
            f"{example}; take such examples out."
        )
    return as_held(_NAME, name, array)


def _count_classes(y: np.ndarray, num_classes: int | None) -> int:
    if y.ndim != 2 or y.dtype.kind not in "iu":
        raise ValueError(
            f"{_NAME}: expected integer y of shape [R, n] for the loss 'cross_entropy', got "
            f"{y.dtype}{list(y.shape)}; number the labels from 0, or give a loss of your own."
        )
    low, high = int(y.min()), int(y.max())
    count = max(2, high + 1) if num_classes is None else num_classes
    if low < 0 or high >= count:
        raise ValueError(
            f"{_NAME}: expected labels y from 0 to num_classes - 1 = {count - 1}, got {low} to {high}; "
            "number the labels from 0."
        )
    return count


def _check_options(
    teacher_data: str, batch_size: int | None, class_axes: PyTree | None, kind: Kind
) -> None:
    check_option(_NAME, "teacher_data", teacher_data, get_args(TeacherData))
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"{_NAME}: batch_size must be at least 1, got {batch_size}.")
    if class_axes is not None and kind.name != "cross_entropy":
        raise ValueError(
            f"{_NAME}: class_axes is for loss='cross_entropy', got another; leave it out."
        )
