"""Held-out accuracy, cost and latency of every method, in one table."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from lohp_jax.baselines import adaptation
from lohp_jax.generation import generate
from lohp_jax.tasks.support import name_canonically
from lohp_jax.trajectories.rollout import over_tasks, rollout
from lohp_jax.types import Generator, Params, PyTree, TaskFamily

_CALLS_ALONE = 21
_CALLS_TOGETHER = 5


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


def draw_tasks(family: TaskFamily, key: jax.Array, num_tasks: int, split: str) -> TaskBatch:
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


def accuracies(family: TaskFamily, weights: Params, data: PyTree) -> np.ndarray:
    """`[R]` query accuracy of one network per task."""
    return np.asarray(_evaluator(family)(weights, data))


@functools.cache
def _evaluator(family: TaskFamily) -> Callable[[Params, PyTree], jax.Array]:
    return jax.jit(jax.vmap(lambda p, d: family.evaluate(p, d)["accuracy"]))


def teacher(
    family: TaskFamily, optimizer: optax.GradientTransformation, theta_0: Params, num_steps: int
) -> Producer:
    """An optimizer started at theta_0; sees the task itself and makes the whole trajectory."""

    def produce(data, key):
        return rollout(family, optimizer, data, theta_0, key, num_steps=num_steps)

    return make_producer(produce, over_tasks)


def adapter(
    family: TaskFamily, theta_0: Params, tuned: adaptation.Tuned
) -> Callable[[PyTree, jax.Array], Params]:
    """Tuned Adam on a support, as one network from one context."""

    def produce(context, key):
        del key
        rate, num_steps = tuned
        states = adaptation.adapt(
            family, theta_0, context, rate, num_steps=num_steps, record_every=num_steps
        )
        return jax.tree.map(lambda leaf: leaf[-1], states)

    return produce


def make_row(
    method: str,
    seed: int,
    scores: np.ndarray,
    *,
    gradients: int,
    latency: tuple[float, float],
) -> dict[str, Any]:
    """One line of the results: mean, spread and worst of the accuracies over held-out tasks.

    Args:
      method: its name.
      seed: of the run.
      scores: `[R]` accuracies.
      gradients: gradient evaluations spent on a new task.
      latency: median milliseconds per network, alone and in a batch.
    """
    return {
        "method": method,
        "seed": seed,
        "split": "held_out",
        "accuracy": float(scores.mean()),
        "accuracy_std": float(scores.std(ddof=1)),
        "accuracy_min": float(scores.min()),
        "num_tasks": len(scores),
        "latency_ms_p50": latency[0],
        "latency_ms_p50_batch": latency[1],
        "gradients": gradients,
    }


def latency(producer: Producer, seen: PyTree, keys: jax.Array) -> tuple[float, float]:
    """Median milliseconds per network, alone and with all tasks in one call.

    Compilation is left out; every call is waited for.

    Args:
      producer: what is timed.
      seen: what it sees of each task, leading axis R.
      keys: `[R]`.
    """
    alone = _median_seconds(producer.one, jax.tree.map(lambda x: x[0], (seen, keys)), _CALLS_ALONE)
    together = _median_seconds(producer.many, (seen, keys), _CALLS_TOGETHER)
    return 1e3 * alone, 1e3 * together / len(keys)


def _median_seconds(call: Callable, arguments: tuple, num_calls: int) -> float:
    jax.block_until_ready(call(*arguments))
    seconds = []
    for _ in range(num_calls):
        start = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))
