"""The types that the stages of the package hand to each other.

A `TaskFamily` makes tasks, an optimizer turns a task into a `Trajectory`, a `Generator` turns what
may be seen of a task (its context) into weights. Every array lacks a batch axis; `jax.vmap` adds it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

PyTree = Any
Params = PyTree
"""Weights of a network: a pytree of arrays."""
Split = Literal["train", "held_out"]


@dataclasses.dataclass(frozen=True, eq=False)
class TaskFamily:
    """A distribution over tasks that share one network, as pure functions.

    Attributes:
      sample: `(key, split="train") -> data`; splits are disjoint by task, not only by example.
      init: `(key) -> params`, the random start of an optimizer.
      loss: `(params, data, key) -> scalar`, what a teacher minimises (the inner loss).
      evaluate: `(params, data) -> {"accuracy" or "objective": scalar, "loss": scalar}` on the task's
        own query examples, which no training ever sees.
      context: `(data, key) -> pytree`, everything that a generator may see of the task.
      name: the name in the registry.
      num_classes: number of labels of one task; 0 where a task has no labels.
      class_axes: pytree like the params: the axis of a leaf that counts the labels, -1 for none;
        None where no leaf has such an axis. Permuting the labels of a task permutes these axes.
      context_loss: `(params, context) -> scalar`, the inner loss on the context alone.
      rename: `(data, order) -> data`, the same task with label c called `order[c]`; None where a task
        has no labels.
    """

    sample: Callable[..., PyTree]
    init: Callable[[jax.Array], Params]
    loss: Callable[[Params, PyTree, jax.Array], jax.Array]
    evaluate: Callable[[Params, PyTree], dict[str, jax.Array]]
    context: Callable[[PyTree, jax.Array], PyTree]
    name: str = ""
    num_classes: int = 0
    class_axes: PyTree | None = None
    context_loss: Callable[[Params, PyTree], jax.Array] | None = None
    rename: Callable[[PyTree, jax.Array], PyTree] | None = None


class Composite(NamedTuple):
    """An objective as f = g + h, g smooth and h with a proximal map, for proximal solvers.

    Attributes:
      smooth: `(x, problem) -> scalar`, g.
      prox: `(x, step, problem) -> x`, argmin_u h(u) + |u - x|^2 / (2 step).
      lipschitz: `(problem) -> scalar`, a bound on the Lipschitz constant of the gradient of g.
    """

    smooth: Callable[[jax.Array, PyTree], jax.Array]
    prox: Callable[[jax.Array, jax.Array, PyTree], jax.Array]
    lipschitz: Callable[[PyTree], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class ProblemFamily(TaskFamily):
    """A distribution over optimization problems: tasks whose params are one point `x [n]`.

    Of the fields it inherits: `sample` returns a problem, a dict of arrays; `loss(x, problem, key)` and
    "objective" and "loss" of `evaluate` are the objective; `context` is the problem itself.

    Attributes:
      objective: `(x, problem) -> scalar`, exact and differentiable almost everywhere.
      start: `(problem) -> x`, where the baselines start, e.g. at 0.
      solve: `(problem, key) -> x`, the label solver: as good a solution as is affordable by the
        thousand; jit- and vmap-able.
      frame: `(problem) -> (centre [n], scale [n])`: where solutions are, and how far from it, as far
        as the problem shows cheaply; solutions in these coordinates, (x - centre) / scale, are of
        about unit size.
      features: `(problem) -> [F]`, the parameters of the problem as one vector of about unit entries,
        without what hands over the optimum.
      check: `(problem) -> None`, raises ValueError for a problem that no solver can use; not pure.
      composite: for proximal solvers; None for a smooth objective.
    """

    objective: Callable[[jax.Array, PyTree], jax.Array] | None = None
    start: Callable[[PyTree], jax.Array] | None = None
    solve: Callable[[PyTree, jax.Array], jax.Array] | None = None
    frame: Callable[[PyTree], tuple[jax.Array, jax.Array]] | None = None
    features: Callable[[PyTree], jax.Array] | None = None
    check: Callable[[PyTree], None] | None = None
    composite: Composite | None = None


class Progress(NamedTuple):
    """What a caller of a training may show after each chunk.

    Attributes:
      method: what is trained.
      step: updates so far.
      updates: updates in all.
      metrics: means over the chunk, as plain numbers and arrays.
      updates_per_second: of the chunk, with the compilation that the first one waits for.
    """

    method: str
    step: int
    updates: int
    metrics: dict[str, Any]
    updates_per_second: float


class Trajectory(NamedTuple):
    """What one optimizer run leaves behind.

    Attributes:
      states: pytree of weights with leading axis `T + 1`; entry 0 is the start.
      losses: `[T + 1]` inner loss at each state.
      optimizer: name of the optimizer, or its index where runs of several are stacked.
    """

    states: Params
    losses: jax.Array
    optimizer: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generator:
    """Maps what may be seen of a task to weights; a pytree whose leaves are those of `params`.

    Attributes:
      apply: `(params, context, key, *, temperature, num_steps, guidance) -> weights`, one pure
        function for one task and one sample. `temperature` may be traced; `num_steps` (None: all)
        and `guidance` are static.
      params: what `apply` was trained to; a pytree.
      family: name of the task family.
      config: the settings that made it, if any.
      check: `(context) -> None`, raises ValueError for a context that `apply` cannot use.
      path: like `apply`, but returns the weights at every step with a leading axis; None for
        generators that take none.
    """

    apply: Callable[..., Params] = dataclasses.field(metadata={"static": True})
    params: PyTree
    family: str = dataclasses.field(default="", metadata={"static": True})
    config: Any = dataclasses.field(default=None, metadata={"static": True})
    check: Callable[[PyTree], None] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    path: Callable[..., Params] | None = dataclasses.field(default=None, metadata={"static": True})
