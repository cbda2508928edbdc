"""Held-out accuracy, cost and latency of every method, in one table."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.baselines import adaptation
from lohp_jax.generation import generate
from lohp_jax.optimizers import make_optimizer
from lohp_jax.trajectories.rollout import rollout
from lohp_jax.types import Generator, Params, PyTree, TaskFamily, Trajectory

_LATENCY_CALLS = 50


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


def generate_all(generator: Generator, contexts: PyTree, keys: jax.Array, **options) -> Params:
    """One network per task, leading axis R; `options` go to `generate`."""

    def one(context, key):
        return jax.tree.map(lambda leaf: leaf[0], generate(generator, context, key, **options))

    return jax.jit(jax.vmap(one))(contexts, keys)


def accuracies(family: TaskFamily, weights: Params, data: PyTree) -> np.ndarray:
    """`[R]` query accuracy of one network per task."""
    return np.asarray(jax.jit(jax.vmap(family.evaluate))(weights, data)["accuracy"])


def teach(
    family: TaskFamily, optimizer: str, theta_0: Params, tasks: TaskBatch, num_steps: int
) -> Trajectory:
    """Runs a teacher on every task from theta_0; leading axis R."""
    run = functools.partial(rollout, family, make_optimizer(optimizer), num_steps=num_steps)
    return jax.jit(jax.vmap(run, (0, None, 0)))(tasks.data, theta_0, tasks.keys)


def adapt_all(
    family: TaskFamily, theta_0: Params, contexts: PyTree, tuned: adaptation.Tuned
) -> Params:
    """The end weights of tuned Adam on every support, leading axis R."""

    def one(context):
        states = adaptation.adapt(
            family, theta_0, context, tuned.learning_rate, num_steps=tuned.num_steps
        )
        return jax.tree.map(lambda leaf: leaf[-1], states)

    return jax.jit(jax.vmap(one))(contexts)


def make_row(
    method: str, seed: int, scores: np.ndarray, *, gradients: int, latency: Sequence[float | None]
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


def latency(
    produce: Callable[[PyTree, jax.Array], Params], tasks: TaskBatch, batch: int
) -> list[float]:
    """Median milliseconds per network of `produce(context, key)`, alone and in a batch.

    Compilation is left out; every call is waited for.

    Args:
      produce: one network from one context.
      tasks: where contexts come from, repeated as needed.
      batch: networks per call in the second number.
    """
    index = np.arange(batch) % len(tasks.keys)
    contexts = jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], tasks.contexts)
    first = jax.tree.map(lambda leaf: leaf[0], (contexts, tasks.keys[index]))
    many = (contexts, tasks.keys[index])
    alone = _median_seconds(jax.jit(produce), first)
    together = _median_seconds(jax.jit(jax.vmap(produce)), many)
    return [1e3 * alone, 1e3 * together / batch]


def _median_seconds(call: Callable, arguments: tuple) -> float:
    jax.block_until_ready(call(*arguments))
    seconds = []
    for _ in range(_LATENCY_CALLS):
        start = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))
