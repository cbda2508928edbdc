"""Rivals that are trained over tasks, by name: tuned on training tasks, with the seed of the run."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from lohp_jax.baselines import meta_learning
from lohp_jax.baselines.heads import Head, linear_head
from lohp_jax.evaluation import scores
from lohp_jax.runs.clock import stopwatch
from lohp_jax.runs.config import RIVALS
from lohp_jax.tasks.door import describe_family
from lohp_jax.types import Generator, Params, TaskFamily

INNER_RATES = (0.01, 0.1, 1.0)
"""Of the descent that starts are learned for."""
STEPS = (1, 5, 20)
"""Gradients that a learned start may spend on a new task."""


class _Candidate(NamedTuple):
    settings: dict[str, float]
    generator: Generator


def check_rivals(family: TaskFamily, names: Iterable[str]) -> None:
    """Raises: ValueError for a rival that the family cannot have."""
    for name in names:
        if family.context_loss is None:
            raise ValueError(
                f"rivals: {name} descends the context loss, which the family {family.name!r} lacks; "
                "give it a context_loss, or leave the rival out."
            )
        if name == "prototypes" and linear_head(family) is None:
            raise ValueError(
                f"rivals: {name} needs labelled examples and a network that ends in a linear layer "
                f"under the cross-entropy, with class_axes; {family.name!r} has none: leave it out."
            )


def make_rival(
    family: TaskFamily, name: str, key: jax.Array, updates: int, tuning: scores.TaskBatch
) -> tuple[Generator, dict[str, Any]]:
    """Trains a rival and picks its settings by the mean score on training tasks.

    Args:
      family: the tasks.
      name: of `RIVALS`.
      key: of the training.
      updates: of each training.
      tuning: training tasks to pick settings by.

    Returns: the generator; and what was picked with `train_seconds` and `compile_seconds`, of all
      trainings and the tuning.
    """
    sign = 1 if describe_family(family).higher_is_better else -1
    key = jax.random.fold_in(key, RIVALS.index(name))
    with stopwatch() as lap:
        candidates = _MAKERS[name](family, linear_head(family), key, updates)
        means = [sign * _score(family, c.generator, tuning) for c in candidates]
        best = candidates[int(np.argmax(np.where(np.isfinite(means), means, -np.inf)))]
        seconds = lap()
    spent = {"train_seconds": seconds.total, "compile_seconds": seconds.compilation}
    return best.generator, {**best.settings, "updates": updates, **spent}


def _score(family: TaskFamily, generator: Generator, tasks: scores.TaskBatch) -> float:
    producer = scores.make_producer(scores.from_generator(generator))
    weights = producer.many(tasks.contexts, tasks.keys)
    return float(scores.scores(family, weights, tasks.data).mean())


def _starts(train: Callable[..., Params]) -> Callable[..., list[_Candidate]]:
    """A start for each inner rate, used with each number of steps."""

    def make(family, head, key, updates):
        del head
        trained = jax.jit(lambda rate: train(family, key, updates=updates, inner_rate=rate))
        found = []
        for rate in INNER_RATES:
            start = jax.block_until_ready(trained(rate))
            for num_steps in STEPS:
                generator = meta_learning.descent_from(
                    family, start, rate=rate, num_steps=num_steps
                )
                found.append(_Candidate({"rate": rate, "num_steps": num_steps}, generator))
        return found

    return make


def _prototypes(family: TaskFamily, head: Head, key: jax.Array, updates: int) -> list[_Candidate]:
    params = jax.jit(
        lambda key: meta_learning.train_prototypes(family, head, key, updates=updates)
    )(key)
    return [_Candidate({}, meta_learning.prototypes(family, head, jax.block_until_ready(params)))]


def _first_order(*args: Any, **settings: Any) -> Params:
    return meta_learning.train_maml(*args, first_order=True, **settings)


_MAKERS = {
    "maml": _starts(meta_learning.train_maml),
    "maml_first_order": _starts(_first_order),
    "reptile": _starts(meta_learning.train_reptile),
    "prototypes": _prototypes,
}
