"""Classification tasks cut from one labelled image set.

A task picks classes of the image set and gives each a label. Its data are indices only (a few
integers), the images stay in one shared array: a million tasks cost no more than one.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lohp_jax.data.images import ImageSet
from lohp_jax.tasks.networks import make_network
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
    Its context: `images` `[labels * shots, height, width, channels]` and `labels` `[labels * shots]`.

    Args:
      name: stored as `TaskFamily.name`.
      images: the image set; teachers and supports use its train pool, `evaluate` its query pool.
      tables: tasks for "train" and "held_out".
      network: name of a classifier, see `make_network`.
      shots: support images per label.
      teacher_data: "full": the inner loss is over all training images of the task, and `context`
        draws a fresh support with its key; "support": the inner loss is over the support that
        `sample` dealt, and `context` returns just that one.
      batch_size: images per evaluation of the inner loss, drawn with its key; None for all.

    Raises: ValueError for an unknown `teacher_data` or network, or more shots than images.
    """
    if teacher_data not in ("full", "support"):
        raise ValueError(f"teacher_data must be 'full' or 'support', got {teacher_data!r}.")
    per_class = images.train.shape[1]
    if not 1 <= shots <= per_class:
        raise ValueError(
            f"shots must be between 1 and {per_class}, the training images per class of "
            f"{images.name}; got {shots}."
        )
    num_labels = int(tables["train"].labels.max()) + 1
    net = make_network(network, images.train.shape[2:], num_labels)

    def sample(key, split="train"):
        row_key, name_key, support_key = jax.random.split(key, 3)
        if split not in tables:
            raise ValueError(f"split must be one of {sorted(tables)}, got {split!r}.")
        table = tables[split]
        row = jax.random.randint(row_key, (), 0, len(table.classes))
        names = jax.random.permutation(name_key, num_labels)
        labels = names[jnp.asarray(table.labels)[row]]
        data = {"classes": jnp.asarray(table.classes)[row], "labels": labels}
        if teacher_data == "support":
            data["support"] = draw_support(support_key, data)
        return data

    def draw_support(key, data):
        """`[labels * shots]` indices into the task's training images, without replacement."""
        labels = jnp.repeat(data["labels"], per_class)
        score = jax.random.uniform(key, labels.shape)
        of_label = labels == jnp.arange(num_labels)[:, None]
        return jax.lax.top_k(jnp.where(of_label, score, -1.0), shots)[1].reshape(-1)

    def gather(pool, data, index):
        """Images and labels of a task at `index` into its classes' images, laid end to end."""
        which, position = jnp.divmod(index, pool.shape[1])
        return jnp.asarray(pool)[data["classes"][which], position], data["labels"][which]

    def cross_entropy(params, batch, labels):
        losses = optax.softmax_cross_entropy_with_integer_labels(net.apply(params, batch), labels)
        return jnp.mean(losses)

    def loss(params, data, key):
        count = data["classes"].shape[0] * per_class
        index = data["support"] if teacher_data == "support" else jnp.arange(count)
        if batch_size is not None and batch_size < index.shape[0]:
            index = jax.random.choice(key, index, (batch_size,))
        return cross_entropy(params, *gather(images.train, data, index))

    def evaluate(params, data):
        index = jnp.arange(data["classes"].shape[0] * images.query.shape[1])
        batch, labels = gather(images.query, data, index)
        hits = jnp.argmax(net.apply(params, batch), axis=-1) == labels
        return {"accuracy": jnp.mean(hits), "loss": cross_entropy(params, batch, labels)}

    def context(data, key):
        fixed = teacher_data == "support"
        index = data["support"] if fixed else draw_support(key, data)
        batch, labels = gather(images.train, data, index)
        return {"images": batch, "labels": labels}

    def context_loss(params, context):
        return cross_entropy(params, context["images"], context["labels"])

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
    )
