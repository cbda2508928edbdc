"""Classification tasks cut from one labelled image set.

A task picks classes of the image set and gives each a label. Its data are indices only (a few
integers), the images stay in one shared array: a million tasks cost no more than one.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lohp_jax.checks import check_option
from lohp_jax.data.images import ImageSet
from lohp_jax.networks.classifiers import make_network
from lohp_jax.tasks.splits import draw_support
from lohp_jax.tasks.support import ImageSupport
from lohp_jax.types import TaskFamily

TeacherData = Literal["full", "support"]


class TaskTable(NamedTuple):
    """All tasks of one split, up to a renaming of their labels.

    Attributes:
      classes: `[R, M]` int32, the classes of the image set that a task uses.
      labels: `[R, M]` int32, the label of each in the task.
    """

    classes: np.ndarray
    labels: np.ndarray


def image_family(
    name: str,
    images: ImageSet,
    tables: dict[str, TaskTable],
    *,
    network: str,
    shots: int,
    teacher_data: TeacherData = "full",
    batch_size: int | None = None,
) -> TaskFamily:
    """Turns tables of tasks over an image set into a `TaskFamily`.

    A sampled task is a row of its split's table under a random renaming of the labels. Its data:
    `classes` and `labels` `[M]` and, with `teacher_data="support"`, the `support` it was dealt.
    Its context: the images `x` `[labels * shots, height, width, channels]`, label by label, and their
    labels `y` `[labels * shots]`.

    Args:
      name: stored as `TaskFamily.name`.
      images: the image set; teachers and supports use its train pool, `evaluate` its query pool.
      tables: tasks for "train" and "held_out".
      network: name of a classifier, see `make_network`.
      shots: support images per label.
      teacher_data: "full": the inner loss is over all training images of the task, and `context`
        draws a fresh support with its key; "support": the inner loss is over the support that
        `sample` dealt, and `context` returns just that one.
      batch_size: images per evaluation of the inner loss, drawn with its key and with replacement;
        None, or a number no smaller than there are images, for all of them.

    Raises: ValueError for an unknown `teacher_data` or network, more shots than images, or a
      `batch_size` that is not positive; `sample` raises it for an unknown split.
    """
    per_class = images.train.shape[1]
    _check_options(teacher_data, shots, per_class, batch_size)
    num_labels = int(tables["train"].labels.max()) + 1
    net = make_network(network, images.train.shape[2:], num_labels)

    def deal(key, labels):
        return draw_support(key, jnp.repeat(labels, per_class), jnp.arange(num_labels), shots)

    def sample(key, split="train"):
        if split not in tables:
            raise ValueError(f"sample: split must be one of {sorted(tables)}, got {split!r}.")
        row_key, name_key, support_key = jax.random.split(key, 3)
        classes, labels = _pick_row(row_key, tables[split])
        labels = jax.random.permutation(name_key, num_labels)[labels]
        support = {"support": deal(support_key, labels)} if teacher_data == "support" else {}
        return {"classes": classes, "labels": labels, **support}

    def loss(params, data, key):
        count = data["classes"].shape[0] * per_class
        index = data["support"] if teacher_data == "support" else jnp.arange(count)
        if batch_size is not None and batch_size < index.shape[0]:
            index = jax.random.choice(key, index, (batch_size,))
        batch, labels = _gather(images.train, data, index)
        return _cross_entropy(net.apply(params, batch), labels)

    def evaluate(params, data):
        index = jnp.arange(data["classes"].shape[0] * images.query.shape[1])
        batch, labels = _gather(images.query, data, index)
        logits = net.apply(params, batch)
        hits = jnp.argmax(logits, axis=-1) == labels
        counts = jnp.bincount(labels, length=num_labels)
        return {
            "accuracy": jnp.mean(hits),
            "loss": _cross_entropy(logits, labels),
            "chance": counts.max() / counts.sum(),
        }

    def context(data, key):
        index = data["support"] if teacher_data == "support" else deal(key, data["labels"])
        batch, labels = _gather(images.train, data, index)
        return {"x": batch, "y": labels}

    def context_loss(params, context):
        return _cross_entropy(net.apply(params, context["x"]), context["y"])

    return TaskFamily(
        sample,
        net.init,
        loss,
        evaluate,
        context,
        name=name,
        num_classes=num_labels,
        class_axes=net.class_axes,
        context_loss=context_loss,
        rename=lambda data, order: {**data, "labels": order[data["labels"]]},
        support=ImageSupport(num_labels, images.train.shape[2:]),
    )


def _check_options(teacher_data: str, shots: int, per_class: int, batch_size: int | None):
    check_option("image_family", "teacher_data", teacher_data, get_args(TeacherData))
    if not 1 <= shots <= per_class:
        raise ValueError(
            f"image_family: shots must be between 1 and {per_class}, the training images per "
            f"class; got {shots}."
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"image_family: batch_size must be at least 1, got {batch_size}.")


def _pick_row(key: jax.Array, table: TaskTable) -> TaskTable:
    row = jax.random.randint(key, (), 0, len(table.classes))
    return jax.tree.map(lambda column: jnp.asarray(column)[row], table)


def _gather(pool: np.ndarray, data: dict, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images and labels of a task, at `index` into its classes' images laid end to end."""
    which, position = jnp.divmod(index, pool.shape[1])
    return jnp.asarray(pool)[data["classes"][which], position], data["labels"][which]


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
