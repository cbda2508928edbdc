"""Fine-tuning: a classifier of one image set learns another, and may forget the first."""

import functools
from typing import Any

import jax
import numpy as np
import optax

from lohp_jax.checks import check_option
from lohp_jax.data.images import ImageSet
from lohp_jax.networks.classifiers import HEAD, make_classifier
from lohp_jax.types import Params, TaskFamily
from lohp_jax.workloads.classification import classifier_family, count_hits, labelled


def fine_tuning(
    source: ImageSet,
    target: ImageSet,
    theta_0: Params,
    network: str = "cnn",
    *,
    batch_size: int = 64,
    **options: Any,
) -> TaskFamily:
    """Trains all of a pre-trained classifier, with a new head, on the training pool of the target.

    `init` returns `theta_0` with its module "head" drawn anew, so that the blocks of HUB are picked by
    `block_wise(lambda path: path[0] == "head")`. `evaluate` returns "accuracy" and "loss" on the query
    pool of the target; "source_accuracy", on the query pool of the source, of the fine-tuned body
    under the head of `theta_0`, which is kept as it was; and "forgetting", by how much this is below
    the accuracy of `theta_0` itself. Forgetting is thus 0 at the start, and also counts a drift of
    the features that a new fit of the old head would undo.

    Args:
      source: what `theta_0` was trained on.
      target: what is learned now; images of the same shape, in any number of classes.
      theta_0: weights of a `classification` family of the source, e.g. from `pretrain`.
      network: as that family's.
      batch_size: as for `classification`.
      **options: of the network, as that family's.

    Raises: ValueError for images of two shapes, a `theta_0` that does not fit the network, or a
      `batch_size` that is not positive; what `make_classifier` raises; `sample` raises it for an
      unknown split.
    """
    shape = source.train.shape[2:]
    if target.train.shape[2:] != shape:
        raise ValueError(
            f"fine_tuning: expected target images of shape {shape}, as of the source, got "
            f"{target.train.shape[2:]}; read both with the same image_size."
        )
    old = make_classifier(network, shape, len(source.train), **options)
    new = make_classifier(network, shape, len(target.train), **options)
    _check_start(theta_0, jax.eval_shape(old.init, jax.random.key(0)))
    hits_on_source = jax.jit(functools.partial(count_hits, old))
    source_query = labelled(source.query)
    before, num_images = hits_on_source(theta_0, source_query), len(source_query[1])

    def init(key):
        return {**theta_0, HEAD: new.init(key)[HEAD]}

    def measure(params, data):
        hits = hits_on_source({**params, HEAD: theta_0[HEAD]}, data["source_query"])
        return {"source_accuracy": hits / num_images, "forgetting": (before - hits) / num_images}

    name = f"fine_tuning_{network}"
    return classifier_family(
        name,
        target,
        new,
        batch_size=batch_size,
        init=init,
        measure=measure,
        source_query=source_query,
    )


def pretrain(
    family: TaskFamily, key: jax.Array, *, num_steps: int = 1000, learning_rate: float = 1e-3
) -> Params:
    """Weights after `num_steps` of Adam on the training task of a family; pure, one compiled loop.

    Args:
      family: e.g. `classification(source)`.
      key: of the start and of the batches.
      num_steps: T, >= 1.
      learning_rate: of Adam; falls to zero along a cosine.
    """
    task_key, init_key, loss_key = jax.random.split(key, 3)
    data, params = family.sample(task_key), family.init(init_key)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))

    def step(carry, step_key):
        params, state = carry
        updates, state = optimizer.update(jax.grad(family.loss)(params, data, step_key), state)
        return (optax.apply_updates(params, updates), state), None

    start = (params, optimizer.init(params))
    (params, _), _ = jax.lax.scan(step, start, jax.random.split(loss_key, num_steps))
    return params


def transfer_pair(images: ImageSet, shift: str, *, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """A source and a target out of one image set.

    "classes": the source has the first half of the classes, the target the others. Otherwise both
    have all classes, those of the target in another order (so that the old head is of no use), and
    the target's images are "rotated" by a quarter turn, "inverted" (1 - x) or "noisy" (normal noise of
    standard deviation 0.3 added, then cut to [0, 1]).

    Args:
      images: with square images, if they are to be rotated.
      shift: one of the above.
      seed: of the order and the noise.

    Raises: ValueError for another shift, or fewer than four classes to halve.
    """
    check_option("transfer_pair", "shift", shift, ("classes", *_SHIFTS))
    num_classes = len(images.train)
    if shift == "classes":
        if num_classes < 4:
            raise ValueError(f"transfer_pair: expected 4 or more classes, got {num_classes}.")
        half = num_classes // 2
        return (
            ImageSet(images.train[:half], images.query[:half], f"{images.name}/first"),
            ImageSet(images.train[half:], images.query[half:], f"{images.name}/last"),
        )
    rng = np.random.default_rng(seed)
    order = rng.permutation(num_classes)
    train, query = (_SHIFTS[shift](pool[order], rng) for pool in (images.train, images.query))
    return images, ImageSet(train, query, f"{images.name}/{shift}")


def _rotated(pool: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.rot90(pool, axes=(2, 3))


def _inverted(pool: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return 1 - pool


def _noisy(pool: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(pool + _NOISE * rng.standard_normal(pool.shape, np.float32), 0, 1)


_NOISE = np.float32(0.3)
_SHIFTS = {"rotated": _rotated, "inverted": _inverted, "noisy": _noisy}


def _check_start(theta_0: Params, expected: Params) -> None:
    """Raises ValueError, if `theta_0` has other leaves, or leaves of other shapes, than `expected`."""
    shapes, wanted = (
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (theta_0, expected)
    )
    if shapes != wanted:
        name = min(n for n in shapes | wanted if shapes.get(n) != wanted.get(n))
        raise ValueError(
            f"fine_tuning: expected theta_0 of the same network on the source, with {name} of shape "
            f"{wanted.get(name)}, got {shapes.get(name)}; give the network and the options that it was "
            "trained with."
        )
