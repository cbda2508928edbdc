"""Held-out accuracy, cost and latency of every method, in one table."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from lohp_jax.baselines import adaptation
from lohp_jax.generation import generate
from lohp_jax.optimizers import make_optimizer
from lohp_jax.trajectories.rollout import rollout
from lohp_jax.types import Generator, Params, PyTree, TaskFamily, Trajectory

_LATENCY_CALLS = 20


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
    """Samples tasks of a split and one support of each."""

    def draw(key):
        task_key, context_key, key = jax.random.split(key, 3)
        data = family.sample(task_key, split)
        return TaskBatch(data, family.context(data, context_key), key)

    return jax.jit(jax.vmap(draw))(jax.random.split(key, num_tasks))


class Producer(NamedTuple):
    """A generator compiled for one task and for many.

    Attributes:
      one: `(context, key) -> weights`.
      many: the same with leading axes R.
    """

    one: Callable[[PyTree, jax.Array], Params]
    many: Callable[[PyTree, jax.Array], Params]


def make_producer(produce: Callable[[PyTree, jax.Array], Params]) -> Producer:
    """Compiles `(context, key) -> weights`, once for each shape of its arguments."""
    return Producer(jax.jit(produce), jax.jit(jax.vmap(produce)))


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


def teach(
    family: TaskFamily, optimizer: str, theta_0: Params, tasks: TaskBatch, num_steps: int
) -> Trajectory:
    """Runs a teacher on every task from theta_0; leading axis R."""
    run = functools.partial(rollout, family, make_optimizer(optimizer), num_steps=num_steps)
    return jax.jit(jax.vmap(run, (0, None, 0)))(tasks.data, theta_0, tasks.keys)


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
    latency: tuple[float | None, float | None],
) -> dict[str, Any]:
    """One line of the results: mean, spread and worst of the accuracies over held-out tasks.

    Args:
      method: its name.
      seed: of the run.
      scores: `[R]` accuracies.
      gradients: gradient evaluations spent on a new task.
      latency: median milliseconds per network, alone and in a batch; None where not measured.
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


def latency(producer: Producer, tasks: TaskBatch) -> tuple[float, float]:
    """Median milliseconds per network, alone and with all `tasks` in one call.

    Compilation is left out; every call is waited for.
    """
    first = jax.tree.map(lambda leaf: leaf[0], tasks)
    alone = _median_seconds(producer.one, (first.contexts, first.keys))
    together = _median_seconds(producer.many, (tasks.contexts, tasks.keys))
    return 1e3 * alone, 1e3 * together / len(tasks.keys)


def _median_seconds(call: Callable, arguments: tuple) -> float:
    jax.block_until_ready(call(*arguments))
    seconds = []
    for _ in range(_LATENCY_CALLS):
        start = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))
