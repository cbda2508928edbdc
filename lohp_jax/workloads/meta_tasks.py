"""Small and varied tasks to meta-train a learned optimizer on, and to test it.

Classification of 8x8 images, real digits and made-up ones, by multi-layer perceptrons.
What is held out are classes (digits) or seeds (made-up tasks). The convolutional family is for tests of
what was never meta-trained on.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from lohp_jax.checks import check_option
from lohp_jax.networks.mlp import apply_mlp, init_mlp
from lohp_jax.tasks import make_family
from lohp_jax.tasks.splits import check_split
from lohp_jax.types import TaskFamily
from lohp_jax.workloads.classification import cross_entropy

_PIXELS = 64
_BATCH = 64


def meta_family(name: str) -> TaskFamily:
    """Builds a family of `META_FAMILIES`.

    Raises: ValueError for an unknown name, with the nearest.
    """
    check_option("meta_family", "name", name, META_FAMILIES)
    return META_FAMILIES[name]()


def synthetic_family(
    name: str,
    kind: Literal["prototypes", "teacher"],
    *,
    widths: Sequence[int],
    activation: Callable[[jax.Array], jax.Array],
    num_classes: int,
    num_train: int = 512,
    num_query: int = 128,
) -> TaskFamily:
    """Classification of made-up 8x8 images by a multi-layer perceptron.

    A task is a seed: even ones are for training, odd ones held out. Its data are `images` `[N, 64]`
    and `labels` `[N]`, and the same with `query_` before them, which only `evaluate` reads.

    Args:
      name: stored as `TaskFamily.name`.
      kind: "prototypes": an image is that of its class plus as much noise as to blur the classes a
        little; "teacher": images are noise, labelled by a random network with a hidden layer.
      widths: hidden units of the network that is trained, layer by layer.
      activation: of its hidden units.
      num_classes: labels.
      num_train: images to train on.
      num_query: images to evaluate on.
    """
    make = {"prototypes": _prototype_images, "teacher": _teacher_images}[kind]
    sizes = (_PIXELS, *widths, num_classes)

    def sample(key, split="train"):
        check_split(split)
        seed = 2 * jax.random.randint(key, (), 0, 2**30) + (split == "held_out")
        images, labels = make(jax.random.key(seed), num_train + num_query, num_classes)
        return {
            "images": images[:num_train],
            "labels": labels[:num_train],
            "query_images": images[num_train:],
            "query_labels": labels[num_train:],
        }

    def init(key):
        return init_mlp(key, sizes)

    def loss(params, data, key):
        index = jax.random.randint(key, (_BATCH,), 0, num_train)
        logits = apply_mlp(params, data["images"][index], activation)
        return cross_entropy(logits, data["labels"][index])

    def evaluate(params, data):
        logits = apply_mlp(params, data["query_images"], activation)
        hits = jnp.argmax(logits, axis=-1) == data["query_labels"]
        return {"accuracy": jnp.mean(hits), "loss": cross_entropy(logits, data["query_labels"])}

    def context(data, key):
        return {"images": data["images"], "labels": data["labels"]}

    return TaskFamily(sample, init, loss, evaluate, context, name=name, num_classes=num_classes)


def _prototype_images(key, count, num_classes):
    prototype_key, label_key, noise_key = jax.random.split(key, 3)
    prototypes = jax.random.normal(prototype_key, (num_classes, _PIXELS))
    labels = jax.random.randint(label_key, (count,), 0, num_classes)
    noise = jax.random.normal(noise_key, (count, _PIXELS))
    return (prototypes[labels] + 2.0 * noise) / jnp.sqrt(5.0), labels


def _teacher_images(key, count, num_classes):
    image_key, *keys = jax.random.split(key, 3)
    images = jax.random.normal(image_key, (count, _PIXELS))
    images = images * 3.0 / (1.0 + jnp.arange(_PIXELS)[None])  # few directions matter
    first = jax.random.normal(keys[0], (_PIXELS, 16)) / 2.0
    second = jax.random.normal(keys[1], (16, num_classes))
    return images, jnp.argmax(jnp.tanh(images @ first) @ second, axis=-1)


_digits = functools.partial(make_family, "digits_5way", holdout="classes", batch_size=_BATCH)

META_FAMILIES: dict[str, Callable[[], TaskFamily]] = {
    "digits_mlp": functools.partial(_digits, network="mlp"),
    "prototypes": functools.partial(
        synthetic_family,
        "prototypes",
        "prototypes",
        widths=(24, 24),
        activation=jnp.tanh,
        num_classes=8,
    ),
    "teacher": functools.partial(
        synthetic_family,
        "teacher",
        "teacher",
        widths=(32,),
        activation=jax.nn.relu,
        num_classes=5,
        num_train=1024,
    ),
    "digits_conv": functools.partial(_digits, network="conv"),
    "teacher_deep": functools.partial(
        synthetic_family,
        "teacher_deep",
        "teacher",
        widths=(16, 16, 16, 16),
        activation=jax.nn.gelu,
        num_classes=5,
        num_train=1024,
    ),
}
"""Builders by name; the last two are never meta-trained on by default."""
