"""Generated weights beside training weights, of which they may be copies.

Zeng et al. ("Generative Modeling of Weights: Generalization or Memorization?", 2025) found generated
networks to be copies or averages of training networks, no better than these with noise. So each is held
beside the training network nearest to it, that network with noise, and the mean of the nearest ones, on
the unseen task.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.baselines.retrieval import renamings
from lohp_jax.evaluation.predictions import make_predictor
from lohp_jax.evaluation.scores import TaskBatch, scores
from lohp_jax.types import Codec, Params, TaskFamily

NUM_NEIGHBOURS = 8
"""Training networks in the mean of the nearest ones."""
_FRESH_CONTEXTS = 4


class Neighbours(NamedTuple):
    """Training weights around each of R networks, labels renamed to fit it.

    Attributes:
      distance: `[R]` root mean square over weights to the nearest.
      nearest: `[R, length, channels]` tokens of it.
      average: `[R, length, channels]` mean of the `NUM_NEIGHBOURS` nearest.
    """

    distance: np.ndarray
    nearest: np.ndarray
    average: np.ndarray


def find_neighbours(
    family: TaskFamily, codec: Codec, tokens: np.ndarray, trained: np.ndarray
) -> Neighbours:
    """The training weights nearest to each network, labels renamed as brings them closest.

    Args:
      family: says whether names of labels mean something.
      codec: of the tokens.
      tokens: `[R, length, channels]` networks.
      trained: `[S, length, channels]` training weights.
    """
    num_labels, split = codec.num_classes, codec.shared_length
    orders = np.asarray(renamings(family, num_labels)) if num_labels else np.zeros((1, 0), int)
    width = math.prod(trained.shape[1:]) - split * trained.shape[2]
    width //= max(num_labels, 1)
    blocks = trained[:, split:].reshape(len(trained), num_labels, width)
    to_shared = _squared_distances(trained[:, :split].reshape(len(trained), -1))
    to_blocks = _squared_distances(blocks.reshape(len(trained) * num_labels, width))
    found = []
    for network in tokens:
        total = to_shared(network[:split].reshape(1, -1))  # [1, S], and [orders, S] with labels
        own = to_blocks(network[split:].reshape(num_labels, width))
        own = own.reshape(num_labels, len(trained), num_labels)
        for label in range(num_labels):
            total = total + own[label].T[orders[:, label]]
        rows = np.argsort(total.min(axis=0), kind="stable")[:NUM_NEIGHBOURS]
        alike = trained[rows]
        renamed = [blocks[row][orders[total[:, row].argmin()]] for row in rows]
        alike[:, split:] = np.stack(renamed).reshape(alike[:, split:].shape)
        found.append((alike[0], alike.mean(axis=0)))
    nearest, average = map(np.stack, zip(*found, strict=True))
    squares = ((tokens - nearest) ** 2).sum(axis=(1, 2))
    return Neighbours(np.sqrt(squares / codec.mask.sum()), nearest, average)


def beside_training_weights(
    family: TaskFamily,
    codec: Codec,
    tasks: TaskBatch,
    weights: Params,
    neighbours: Neighbours,
    teacher: tuple[Params, Neighbours],
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Scores of training weights on unseen tasks, and how alike errors are.

    Args:
      family: the tasks.
      codec: of the neighbours.
      tasks: unseen tasks, leading axis R.
      weights: generated for them, leading axis R.
      neighbours: of the generated weights.
      teacher: what the teacher reached on the tasks, and the neighbours of that.

    Returns: `[R]` scores of the "nearest" training network, the same with "noise" that takes it as far
      as the generated one is, and the "average" of the nearest; and the mean over tasks of
      |A and B| / |A or B| of the errors A and B on fresh examples of the task, of the nearest training
      network and the "generated", noisy, averaged one, and of "teacher" and its own nearest. Empty for
      families whose errors cannot be seen, see `make_predictor`.
    """
    noise = np.random.default_rng(0).standard_normal(neighbours.nearest.shape) * codec.mask
    noise *= (neighbours.distance / np.sqrt((noise**2).sum((1, 2)) / codec.mask.sum()))[
        :, None, None
    ]
    tokens = {
        "nearest": neighbours.nearest,
        "noise": neighbours.nearest + noise,
        "average": neighbours.average,
    }
    _, decode = coders(codec)
    others = {name: decode(jnp.asarray(made, jnp.float32)) for name, made in tokens.items()}
    scored = {name: scores(family, made, tasks.data) for name, made in others.items()}
    wrong = errors(family, tasks)
    if wrong is None:
        return scored, {}
    reached, around = teacher
    nearest = wrong(others["nearest"])
    pairs = {
        "generated": (wrong(weights), nearest),
        "noise": (wrong(others["noise"]), nearest),
        "average": (wrong(others["average"]), nearest),
        "teacher": (wrong(reached), wrong(decode(jnp.asarray(around.nearest)))),
    }
    overlaps = {name: overlap(*pair) for name, pair in pairs.items()}
    return scored, {name: value for name, value in overlaps.items() if np.isfinite(value)}


def errors(family: TaskFamily, tasks: TaskBatch) -> Callable[[Params], np.ndarray] | None:
    """`weights -> [R, n]` which of examples drawn anew networks get wrong; None if unseen."""
    answers = predictions(family, tasks)
    if answers is None:
        return None

    def wrong(weights: Params) -> np.ndarray:
        predicted, labels = answers(weights)
        return predicted != labels

    return wrong


def predictions(
    family: TaskFamily, tasks: TaskBatch
) -> Callable[[Params], tuple[np.ndarray, np.ndarray]] | None:
    """`weights -> ([R, n] predictions, [R, n] labels)` at examples drawn anew; None if unseen."""
    if (answers := _answers(family)) is None:
        return None
    return lambda weights: jax.device_get(answers(weights, tasks.data, tasks.keys))


@functools.lru_cache(maxsize=16)
def _answers(family: TaskFamily) -> Callable | None:
    """Compiled once for a family, as all generators are asked the same."""
    if (predict := make_predictor(family)) is None:
        return None

    def answers(weights, data, key):
        def one(key):
            context = family.context(data, key)
            return predict(weights, context), context["y"]

        predicted, labels = jax.lax.map(one, jax.random.split(key, _FRESH_CONTEXTS))
        return predicted.reshape(-1), labels.reshape(-1)

    return jax.jit(jax.vmap(answers))


@functools.lru_cache(maxsize=16)
def coders(codec: Codec) -> tuple[Callable, Callable]:
    """`encode` and `decode` of many networks, compiled once."""
    return jax.jit(jax.vmap(codec.encode)), jax.jit(jax.vmap(codec.decode))


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Mean over tasks of |A and B| / |A or B| of errors `[R, n]`; NaN where no network errs."""
    either = (one | other).sum(axis=1)
    both = (one & other).sum(axis=1)
    return float((both[either > 0] / either[either > 0]).mean()) if either.any() else np.nan


def _squared_distances(others: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """`points [P, D] -> [P, Q]` squared distances to `others` `[Q, D]`."""
    sizes = (others**2).sum(axis=1)[None]

    def measure(points):
        squares = (points**2).sum(axis=1)[:, None] + sizes - 2 * points @ others.T
        return np.maximum(squares, 0)

    return measure
