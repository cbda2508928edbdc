"""Classification tasks cut from one labelled image set.

A task picks classes of the image set and gives each a label. Its data are indices only (a few
integers), the images stay in one shared array: a million tasks cost no more than one.
"""

import dataclasses
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lohp_jax.checks import as_held, check_option
from lohp_jax.data.images import ImageSet
from lohp_jax.networks.classifiers import Network, make_network
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
    network: str | Network,
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
      network: a classifier, or the name of one for `make_network`.
      shots: support images per label.
      teacher_data: "full": the inner loss is over all training images of the task, and `context`
        draws a fresh support with its key; "support": the inner loss is over the support that
        `sample` dealt, and `context` returns just that one.
      batch_size: images per evaluation of the inner loss, drawn with its key and with replacement;
        None, or a number no smaller than there are images, for all of them.

    Raises: ValueError for images that are no real floats, an unknown `teacher_data` or network, more
      shots than images, or a `batch_size` that is not positive; `sample` raises it for an unknown split.
    """
    images = _read_pools(images)
    _check_options(teacher_data, shots, images.train.shape[1], batch_size)
    num_labels = int(tables["train"].labels.max()) + 1
    net = network
    if isinstance(network, str):
        net = make_network(network, images.train.shape[2:], num_labels)
    tasks = _ImageTasks(images, tables, net, num_labels, shots, teacher_data, batch_size)
    return TaskFamily(
        tasks.sample,
        net.init,
        tasks.loss,
        tasks.evaluate,
        tasks.context,
        name=name,
        num_classes=num_labels,
        class_axes=net.class_axes,
        context_loss=tasks.context_loss,
        rename=lambda data, order: {**data, "labels": order[data["labels"]]},
        support=ImageSupport(num_labels, images.train.shape[2:]),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _ImageTasks:
    """The functions of an `image_family`."""

    images: ImageSet
    tables: dict[str, TaskTable]
    net: Network
    num_labels: int
    shots: int
    teacher_data: TeacherData
    batch_size: int | None

    def sample(self, key, split="train"):
        if split not in self.tables:
            raise ValueError(f"sample: split must be one of {sorted(self.tables)}, got {split!r}.")
        row_key, name_key, support_key = jax.random.split(key, 3)
        classes, labels = _pick_row(row_key, self.tables[split])
        labels = jax.random.permutation(name_key, self.num_labels)[labels]
        data = {"classes": classes, "labels": labels}
        if self.teacher_data == "support":
            data["support"] = self._deal(support_key, labels)
        return data

    def loss(self, params, data, key):
        if self.teacher_data == "support":
            index = data["support"]
        else:
            index = jnp.arange(data["classes"].shape[0] * self.images.train.shape[1])
        if self.batch_size is not None and self.batch_size < index.shape[0]:
            index = jax.random.choice(key, index, (self.batch_size,))
        batch, labels = _gather(self.images.train, data, index)
        return _cross_entropy(self.net.apply(params, batch), labels)

    def evaluate(self, params, data):
        index = jnp.arange(data["classes"].shape[0] * self.images.query.shape[1])
        batch, labels = _gather(self.images.query, data, index)
        logits = self.net.apply(params, batch)
        counts = jnp.bincount(labels, length=self.num_labels)
        return {
            "accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == labels),
            "loss": _cross_entropy(logits, labels),
            "chance": counts.max() / counts.sum(),
        }

    def context(self, data, key):
        dealt = self.teacher_data == "support"
        index = data["support"] if dealt else self._deal(key, data["labels"])
        batch, labels = _gather(self.images.train, data, index)
        return {"x": batch, "y": labels}

    def context_loss(self, params, context):
        return _cross_entropy(self.net.apply(params, context["x"]), context["y"])

    def _deal(self, key, labels):
        of_images = jnp.repeat(labels, self.images.train.shape[1])
        return draw_support(key, of_images, jnp.arange(self.num_labels), self.shots)


def _check_options(teacher_data: str, shots: int, per_class: int, batch_size: int | None):
    check_option("image_family", "teacher_data", teacher_data, get_args(TeacherData))
    if not 1 <= shots <= per_class:
        raise ValueError(
            f"image_family: shots must be between 1 and {per_class}, the training images per "
            f"class; got {shots}."
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"image_family: batch_size must be at least 1, got {batch_size}.")


def _read_pools(images: ImageSet) -> ImageSet:
    """Both pools in the type that JAX holds them in."""
    pools = {}
    for name in ("train", "query"):
        pool = as_held("image_family", name, getattr(images, name))
        if not jnp.issubdtype(pool.dtype, jnp.floating):
            raise ValueError(
                f"image_family: expected floating-point images in [0, 1] in {name}, got {pool.dtype}; "
                "divide them by the largest value of their type."
            )
        pools[name] = pool
    return images._replace(**pools)


def _pick_row(key: jax.Array, table: TaskTable) -> TaskTable:
    row = jax.random.randint(key, (), 0, len(table.classes))
    return jax.tree.map(lambda column: jnp.asarray(column)[row], table)


def _gather(pool: np.ndarray, data: dict, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images and labels of a task, at `index` into its classes' images laid end to end."""
    which, position = jnp.divmod(index, pool.shape[1])
    return jnp.asarray(pool)[data["classes"][which], position], data["labels"][which]


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
