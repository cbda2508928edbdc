"""Held-out score, cost and latency of every method, in one table."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from lohp_jax.generation import generate
from lohp_jax.tasks.door import describe_family
from lohp_jax.tasks.support import name_canonically
from lohp_jax.trajectories.rollout import over_tasks, rollout
from lohp_jax.types import Generator, Params, PyTree, Split, TaskFamily

Kind = Literal["teacher", "generator", "baseline"]

_CALLS_ALONE = (21, 101)
_CALLS_TOGETHER = (5, 21)
_TIMED_SECONDS = 2.0
"""Fewest and most calls that a latency is measured by; beyond the fewest they end after that time."""


class TaskBatch(NamedTuple):
    """Tasks with what a generator may see of each; leading axis R.

    Attributes:
      data: the tasks.
      contexts: one support of each.
      keys: one key each, for sampling.
    """

    data: PyTree
    contexts: PyTree
    keys: jax.Array


def evaluate(
    family: TaskFamily,
    generators: Mapping[str, Generator],
    key: jax.Array,
    *,
    num_tasks: int = 256,
    split: Split = "held_out",
) -> dict[str, Any]:
    """Scores generators on the same tasks of a family.

    Args:
      family: the tasks.
      generators: what makes weights, by the name of its row.
      key: picks the tasks and their contexts.
      num_tasks: R.
      split: of the tasks.

    Returns: `{"family", "measure", "rows"}`; a row has what `make_row` says. `measure` is "accuracy",
      of which more is better, or "objective", of which less is.

    Raises: ValueError for a family whose functions do not fit together, fewer than two tasks, or a
      generator that cannot read the family's contexts.
    """
    if num_tasks < 2:
        raise ValueError(f"evaluate: num_tasks must be at least 2, got {num_tasks}.")
    measure = describe_family(family).measure
    tasks = draw_tasks(family, key, num_tasks, split)
    rows = []
    for name, generator in generators.items():
        if generator.check is not None:
            generator.check(jax.tree.map(lambda leaf: leaf[0], tasks.contexts))
        producer = make_producer(from_generator(generator))
        weights = producer.many(tasks.contexts, tasks.keys)
        row = make_row(
            name,
            "generator",
            0,
            measure,
            scores(family, weights, tasks.data),
            gradients=generator.gradients,
            forward_passes=generator.forward_passes,
            latency=latency(producer, tasks.contexts, tasks.keys),
            split=split,
        )
        row |= met(appraise(generator, tasks))
        rows.append(row)
    return {"family": family.name, "measure": measure, "rows": rows}


def draw_tasks(family: TaskFamily, key: jax.Array, num_tasks: int, split: Split) -> TaskBatch:
    """Samples tasks of a split and one support of each, by which their labels are named."""

    def draw(key):
        task_key, context_key, key = jax.random.split(key, 3)
        data = name_canonically(family, family.sample(task_key, split), context_key)
        return TaskBatch(data, family.context(data, context_key), key)

    return jax.jit(jax.vmap(draw))(jax.random.split(key, num_tasks))


class Producer(NamedTuple):
    """What makes weights, compiled for one task and for many.

    Attributes:
      one: `(seen, key) -> weights`, from what it may see of the task.
      many: the same with leading axes R.
    """

    one: Callable[[PyTree, jax.Array], Params]
    many: Callable[[PyTree, jax.Array], Params]


def make_producer(
    produce: Callable[[PyTree, jax.Array], PyTree], batch: Callable = jax.vmap
) -> Producer:
    """Compiles `produce`, once for each shape of its arguments; `batch` makes one task many."""
    return Producer(jax.jit(produce), jax.jit(batch(produce)))


def from_generator(generator: Generator) -> Callable[[PyTree, jax.Array], Params]:
    """One network from one context, following the means."""

    def produce(context, key):
        return jax.tree.map(lambda leaf: leaf[0], generate(generator, context, key))

    return produce


def scores(family: TaskFamily, weights: Params, data: PyTree) -> np.ndarray:
    """`[R]` query accuracy or objective of one network per task."""
    return np.asarray(_evaluator(family)(weights, data))


@functools.lru_cache(maxsize=16)
def _evaluator(family: TaskFamily) -> Callable[[Params, PyTree], jax.Array]:
    measure = describe_family(family).measure
    return jax.jit(jax.vmap(lambda p, d: family.evaluate(p, d)[measure]))


def teacher(family: TaskFamily, optimizer: Any, theta_0: Params, num_steps: int) -> Producer:
    """An optimizer started at theta_0; sees the task itself and makes the whole trajectory."""

    def produce(data, key):
        return rollout(family, optimizer, data, theta_0, key, num_steps=num_steps)

    return make_producer(produce, over_tasks)


def appraise(generator: Generator, tasks: TaskBatch) -> dict[str, np.ndarray]:
    """What walks met, see `Method.appraise`: `[R]` numbers by name; empty where it tells nothing."""
    if generator.appraise is None:
        return {}
    one = functools.partial(generator.appraise, generator.params)
    return jax.device_get(jax.jit(jax.vmap(one))(tasks.contexts, tasks.keys))


def met(appraised: dict[str, np.ndarray]) -> dict[str, float]:
    """What a row tells of it: means over the tasks; of `fallbacks`, which are counted, the sum."""
    return {
        name: float(values.sum() if name == "fallbacks" else values.mean())
        for name, values in appraised.items()
    }


def make_row(
    method: str,
    kind: Kind,
    seed: int,
    measure: str,
    values: np.ndarray,
    *,
    gradients: int,
    forward_passes: int = 0,
    latency: dict[str, float],
    split: Split = "held_out",
) -> dict[str, Any]:
    """One line of the results: mean, spread and extremes of the scores over tasks.

    Args:
      method: its name.
      kind: what it is.
      seed: of the run.
      measure: "accuracy" or "objective", what the scores are.
      values: `[R]` scores.
      gradients: gradient evaluations spent on a new task.
      forward_passes: evaluations without a gradient spent on a new task.
      latency: of `latency`, or its entries as far as they are known.
      split: of the tasks.
    """
    return {
        "method": method,
        "kind": kind,
        "seed": seed,
        "split": split,
        measure: float(values.mean()),
        f"{measure}_std": float(values.std(ddof=1)),
        f"{measure}_min": float(values.min()),
        f"{measure}_max": float(values.max()),
        "num_tasks": len(values),
        **latency,
        "gradients": gradients,
        "forward_passes": forward_passes,
    }


def latency(producer: Producer, seen: PyTree, keys: jax.Array) -> dict[str, float]:
    """Milliseconds per network, alone and with all tasks in one call.

    Every call is waited for. With few calls the 99th percentile is the slowest of them.

    Args:
      producer: what is timed.
      seen: what it sees of each task, leading axis R.
      keys: `[R]`.

    Returns: `latency_ms_p50` and `latency_ms_p99` alone; the same with `_batch` in one call of
      `latency_batch_size` = R tasks, per network; and `latency_ms_first`, of the first call alone, which
      compiles.
    """
    one = jax.tree.map(lambda x: x[0], (seen, keys))
    first, alone = _seconds(producer.one, one, _CALLS_ALONE)
    _, together = _seconds(producer.many, (seen, keys), _CALLS_TOGETHER)
    each = np.array(together) / len(keys)
    return {
        "latency_ms_p50": 1e3 * float(np.median(alone)),
        "latency_ms_p99": 1e3 * float(np.quantile(alone, 0.99, method="higher")),
        "latency_ms_p50_batch": 1e3 * float(np.median(each)),
        "latency_ms_p99_batch": 1e3 * float(np.quantile(each, 0.99, method="higher")),
        "latency_batch_size": len(keys),
        "latency_ms_first": 1e3 * first,
    }


def _seconds(
    call: Callable, arguments: tuple, num_calls: tuple[int, int]
) -> tuple[float, list[float]]:
    """Seconds of the first call, and of those after it."""
    fewest, most = num_calls
    seconds: list[float] = []
    while len(seconds) <= most:
        start = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        seconds.append(time.perf_counter() - start)
        if len(seconds) > fewest and sum(seconds[1:]) > _TIMED_SECONDS:
            break
    return seconds[0], seconds[1:]
