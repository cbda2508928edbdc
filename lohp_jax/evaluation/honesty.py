"""Is a generator conditional, alive, and more than a memory? Numbers that catch it when not."""

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.evaluation.scores import Producer, TaskBatch, scores
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
) -> dict[str, float]:
    """Checks one generator on held-out tasks.

    Args:
      family: the tasks.
      producer: what is checked.
      tasks: held-out tasks, leading axis R.
      codec: standardised tokens; distances are root mean squares over them.
      weights: what the generator made of the tasks, leading axis R.
      teacher_weights: what the imitated teacher reached on them, leading axis R.
      training_tokens: `[S, length, channels]` end weights of that teacher on training tasks; None leaves
        the distances to them out.

    Returns: `shuffled`, the score with the context of another task (wanted: no better than `chance`,
      plus .05 for an accuracy); `chance`, the score that sees no input, where the family says it;
      `rms_ratio`, distance of generated weights from theta_0 over that of the teacher's (wanted: .8 to
      1.2); and the mean distances to the nearest training weights of the generated
      (`nearest_training_distance`) and the teacher's weights (`teacher_nearest_training_distance`): a
      memory has a distance near 0; and `teacher_distance`, between generated and teacher's weights of
      the same task.
    """
    others = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), tasks.contexts)
    shuffled = producer.many(others, tasks.keys)
    unrelated = _name_at_random(family, tasks)
    tokens, teacher = (jax.jit(jax.vmap(codec.encode))(w) for w in (weights, teacher_weights))
    real = np.flatnonzero(codec.mask)
    generated, taught = (_flat(t)[:, real] for t in (tokens, teacher))
    nearest = {}
    if training_tokens is not None:
        trained = _flat(training_tokens)[:, real]
        nearest = {
            "nearest_training_distance": _nearest(generated, trained),
            "teacher_nearest_training_distance": _nearest(taught, trained),
        }
    return {
        "shuffled": float(scores(family, shuffled, unrelated).mean()),
        **_chance(family, teacher_weights, tasks),
        "rms_ratio": float(_rms(generated) / _rms(taught)),
        **nearest,
        "teacher_distance": float(np.sqrt(np.mean((generated - taught) ** 2, axis=1)).mean()),
    }


def _chance(family: TaskFamily, weights: Params, tasks: TaskBatch) -> dict[str, float]:
    """Mean `chance` of the tasks, which does not depend on the weights; empty where there is none."""
    evaluated = jax.jit(jax.vmap(family.evaluate))(weights, tasks.data)
    return {"chance": float(evaluated["chance"].mean())} if "chance" in evaluated else {}


def _name_at_random(family: TaskFamily, tasks: TaskBatch) -> PyTree:
    """The tasks under other names of their labels: canonical ones give a class the same name often."""
    if family.rename is None:
        return tasks.data

    def rename(data, key):
        return family.rename(data, jax.random.permutation(key, family.num_classes))

    return jax.jit(jax.vmap(rename))(tasks.data, tasks.keys)


def _flat(tokens: jax.Array) -> np.ndarray:
    return np.asarray(tokens).reshape(len(tokens), -1)


def _rms(values: np.ndarray) -> float:
    return np.sqrt(np.mean(values**2))


def _nearest(points: np.ndarray, others: np.ndarray) -> float:
    """Mean over `points` `[R, D]` of the root-mean-square distance to the nearest of `others`."""
    squared = (points**2).sum(1)[:, None] + (others**2).sum(1)[None] - 2 * points @ others.T
    return float(np.sqrt(np.maximum(squared.min(axis=1), 0) / points.shape[1]).mean())
