"""Classifying all classes of an image set: one task, to compare optimizers on."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lohp_jax.data.images import ImageSet
from lohp_jax.networks.classifiers import Network, make_classifier
from lohp_jax.tasks.splits import check_split
from lohp_jax.types import Params, PyTree, TaskFamily
from lohp_jax.workloads.single import no_context

Labelled = tuple[jax.Array, jax.Array]
"""Images `[N, height, width, channels]` and their labels `[N]`."""
_IMAGES_AT_ONCE = 256  # in `evaluate`, whose pools may be large


def classification(
    images: ImageSet, network: str = "cnn", *, batch_size: int = 128, **options: Any
) -> TaskFamily:
    """Trains on the training pool, evaluates on the query pool; the one task of both splits.

    Its data, `{"train": (images, labels), "query": (images, labels)}`, are the same for every key:
    sample once and share them between runs.

    Args:
      images: the image set, e.g. `image_set("digits")`.
      network: "cnn" or "vit", see `make_classifier`.
      batch_size: images per evaluation of the loss, drawn with its key and with replacement.
      **options: of the network.

    Raises: ValueError for a `batch_size` that is not positive; what `make_classifier` raises; `sample`
      raises it for an unknown split.
    """
    net = make_classifier(network, images.train.shape[2:], len(images.train), **options)
    return classifier_family(
        f"classification_{network}", images, net, batch_size=batch_size, init=net.init
    )


def classifier_family(
    name: str,
    images: ImageSet,
    net: Network,
    *,
    batch_size: int,
    init: Callable[[jax.Array], Params],
    measure: Callable[[Params, PyTree], dict[str, jax.Array]] = lambda params, data: {},
    **more: Labelled,
) -> TaskFamily:
    """The family of one classification task from any start.

    Args:
      name: stored as `TaskFamily.name`.
      images: the image set.
      net: the classifier.
      batch_size: as for `classification`.
      init: `(key) -> params`.
      measure: `(params, data)`, what `evaluate` returns besides accuracy and loss.
      more: more labelled images `(images, labels)`, by the name they have in the data of the task.

    Raises: ValueError for a `batch_size` that is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"{name}: batch_size must be at least 1, got {batch_size}.")
    pools = {"train": labelled(images.train), "query": labelled(images.query), **more}

    def sample(key, split="train"):
        check_split(split)
        return pools

    def loss(params, data, key):
        pool, labels = data["train"]
        index = jax.random.randint(key, (batch_size,), 0, len(labels))
        return cross_entropy(net.apply(params, pool[index]), labels[index])

    def evaluate(params, data):
        return score(net, params, data["query"]) | measure(params, data)

    return TaskFamily(
        sample,
        init,
        loss,
        evaluate,
        no_context,
        name=name,
        num_classes=len(images.train),
        class_axes=net.class_axes,
    )


def score(net: Network, params: Params, examples: Labelled) -> dict[str, jax.Array]:
    """Accuracy and mean cross-entropy."""
    logits, labels = _logits(net, params, examples[0]), examples[1]
    hits = jnp.argmax(logits, axis=-1) == labels
    return {"accuracy": jnp.mean(hits), "loss": cross_entropy(logits, labels)}


def count_hits(net: Network, params: Params, examples: Labelled) -> jax.Array:
    """How many images are classified rightly; int32."""
    return jnp.sum(jnp.argmax(_logits(net, params, examples[0]), axis=-1) == examples[1])


def labelled(pool: np.ndarray) -> Labelled:
    """`[classes, images_per_class, ...]` -> images `[N, ...]` and their labels `[N]`."""
    labels = jnp.repeat(jnp.arange(pool.shape[0]), pool.shape[1])
    return jnp.asarray(pool).reshape(-1, *pool.shape[2:]), labels


def _logits(net: Network, params: Params, images: jax.Array) -> jax.Array:
    return jax.lax.map(
        lambda image: net.apply(params, image[None])[0], images, batch_size=_IMAGES_AT_ONCE
    )


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over examples, of logits `[N, classes]` and labels `[N]`."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
