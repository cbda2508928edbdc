"""Is a generator conditional, alive, and more than a memory? Numbers and verdicts that say when not."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.evaluation.memory import (
    beside_training_weights,
    coders,
    find_neighbours,
    predictions,
)
from lohp_jax.evaluation.scores import Producer, TaskBatch, scores
from lohp_jax.evaluation.verdicts import judge, win_share
from lohp_jax.tasks.door import describe_family
from lohp_jax.types import Codec, Params, PyTree, TaskFamily


def honesty(
    family: TaskFamily,
    producer: Producer,
    tasks: TaskBatch,
    *,
    codec: Codec,
    weights: Params,
    teacher_weights: Params,
    training_tokens: jax.Array | None,
) -> dict[str, Any]:
    """Checks one generator on held-out tasks, of families with an accuracy or an objective.

    Args:
      family: the tasks.
      producer: what is checked.
      tasks: held-out tasks, leading axis R.
      codec: standardised tokens; distances are root mean squares over them.
      weights: what the generator made of the tasks, leading axis R.
      teacher_weights: what the imitated teacher reached on them, leading axis R.
      training_tokens: `[S, length, channels]` end weights of that teacher on training tasks; None leaves
        the memory check out.

    Returns: JSON values: `non_finite`, the share of tasks with weights or scores that are not, and of
      the others, `num_tasks`:
      `constant_predictions`, the share of them whose network gives all examples one label;
      `chance`, the score that sees no input, and `shuffled`, that with the context of another task;
      `chance_wins` and `shuffled_wins`, on what share of tasks the generator is better;
      `rms_ratio`, how far weights lie from theta_0, over the same of the teacher's;
      `spread_ratio`, how far from their mean over tasks, as a share of that, over the same share of the
      teacher's;
      `teacher_distance`, between generated and teacher's weights of the same task;
      what `_beside_training` returns; and `verdicts` and `verdict` of `judge`.
    """
    sign = 1 if describe_family(family).higher_is_better else -1
    own = scores(family, weights, tasks.data)
    fine = np.isfinite(own) & _finite(weights)
    measures: dict[str, Any] = {"non_finite": float(1 - fine.mean()), "num_tasks": int(fine.sum())}
    if fine.sum() < 2:
        return measures | judge(measures, sign)
    shuffled = _shuffled(family, producer, tasks)[fine]
    own, tasks, weights, teacher_weights = jax.tree.map(
        lambda leaf: leaf[fine], (own, tasks, weights, teacher_weights)
    )
    measures |= _constant(family, tasks, weights)
    measures |= _chance(family, teacher_weights, tasks, own, sign)
    measures["shuffled"] = float(shuffled.mean())
    measures["shuffled_wins"] = win_share(own, shuffled, sign)
    measures |= _sizes(codec, weights, teacher_weights)
    if training_tokens is not None:
        made = weights, teacher_weights
        measures |= _beside_training(family, codec, tasks, own, made, np.asarray(training_tokens))
    return measures | judge(measures, sign)


def _beside_training(
    family: TaskFamily,
    codec: Codec,
    tasks: TaskBatch,
    own: np.ndarray,
    made: tuple[Params, Params],
    trained: np.ndarray,
) -> dict[str, Any]:
    """Generated weights, of scores `own` `[R]`, and the teacher's, beside those of training.

    Returns: mean distances to the nearest training weights, `nearest_training_distance` of generated and
      `teacher_nearest_training_distance` of the teacher's; mean scores of training weights on the unseen
      tasks, `training_scores`; on what share of tasks the generator beats them, `noise_wins` and
      `average_wins`; and `error_overlap`, see `beside_training_weights`.
    """
    sign = 1 if describe_family(family).higher_is_better else -1
    encode, _ = coders(codec)
    weights, reached = made
    around, expected = (
        find_neighbours(family, codec, np.asarray(encode(w)), trained) for w in made
    )
    others, overlaps = beside_training_weights(
        family, codec, tasks, weights, around, (reached, expected)
    )
    return {
        "nearest_training_distance": float(around.distance.mean()),
        "teacher_nearest_training_distance": float(expected.distance.mean()),
        "training_scores": {n: _number(v.mean()) for n, v in others.items()},
        **{f"{n}_wins": win_share(own, others[n], sign) for n in ("noise", "average")},
        "error_overlap": overlaps,
    }


def _finite(weights: Params) -> np.ndarray:
    """`[R]` whether all weights of a task are finite."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(weights)]
    return np.all([np.isfinite(x.reshape(len(x), -1)).all(axis=1) for x in leaves], axis=0)


def _shuffled(family: TaskFamily, producer: Producer, tasks: TaskBatch) -> np.ndarray:
    """`[R]` scores with the context of another task, under other names of the labels."""
    others = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), tasks.contexts)
    return scores(family, producer.many(others, tasks.keys), _name_at_random(family, tasks))


def _constant(family: TaskFamily, tasks: TaskBatch, weights: Params) -> dict[str, float]:
    """Share of tasks on which all predictions agree; empty where predictions cannot be seen."""
    answers = predictions(family, tasks)
    if answers is None:
        return {}
    predicted, _ = answers(weights)
    return {"constant_predictions": float((predicted == predicted[:, :1]).all(axis=1).mean())}


def _chance(
    family: TaskFamily, weights: Params, tasks: TaskBatch, own: np.ndarray, sign: int
) -> dict[str, float]:
    """`chance` of the tasks, which does not depend on the weights; empty where there is none."""
    evaluated = jax.eval_shape(jax.vmap(family.evaluate), weights, tasks.data)
    if "chance" not in evaluated:
        return {}
    chance = np.asarray(_chances(family)(weights, tasks.data))
    return {"chance": float(chance.mean()), "chance_wins": win_share(own, chance, sign)}


def _sizes(codec: Codec, weights: Params, teacher_weights: Params) -> dict[str, float]:
    """How far weights lie from theta_0, from each other and from the teacher's."""
    real, (encode, _) = np.flatnonzero(codec.mask), coders(codec)
    generated, taught = (
        np.asarray(encode(w)).reshape(-1, codec.mask.size)[:, real]
        for w in (weights, teacher_weights)
    )
    spread, expected = (_spread(w) / max(_rms(w), 1e-30) for w in (generated, taught))
    ratios = {
        "spread_ratio": spread / max(expected, 1e-30),
        "rms_ratio": _rms(generated) / max(_rms(taught), 1e-30),
    }
    return {name: float(ratio) for name, ratio in ratios.items()} | {
        "teacher_distance": float(np.sqrt(np.mean((generated - taught) ** 2, axis=1)).mean()),
    }


@functools.lru_cache(maxsize=16)
def _chances(family: TaskFamily) -> Callable[[Params, PyTree], jax.Array]:
    return jax.jit(jax.vmap(lambda params, data: family.evaluate(params, data)["chance"]))


def _name_at_random(family: TaskFamily, tasks: TaskBatch) -> PyTree:
    """The tasks under other names of their labels: canonical ones give a class the same name often."""
    return tasks.data if family.rename is None else _renamer(family)(tasks.data, tasks.keys)


@functools.lru_cache(maxsize=16)
def _renamer(family: TaskFamily) -> Callable[[PyTree, jax.Array], PyTree]:
    def rename(data, key):
        return family.rename(data, jax.random.permutation(key, family.num_classes))

    return jax.jit(jax.vmap(rename))


def _spread(values: np.ndarray) -> float:
    return _rms(values - values.mean(axis=0))


def _rms(values: np.ndarray) -> float:
    return np.sqrt(np.mean(values**2))


def _number(value: float) -> float | None:
    """A number as JSON has it."""
    return float(value) if np.isfinite(value) else None
