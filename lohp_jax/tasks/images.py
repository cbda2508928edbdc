"""Classification tasks cut from one labelled image set, or from features of one.

A task picks classes of the image set and gives each a label. Its data are indices only (a few
integers), the images stay in one shared array: a million tasks cost no more than one.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lohp_jax.checks import as_held, check_option
from lohp_jax.data.images import ImageSet
from lohp_jax.networks.classifiers import Network, make_network
from lohp_jax.tasks.pools import DealtPool, FixedPools
from lohp_jax.tasks.splits import draw_support
from lohp_jax.tasks.support import ImageSupport
from lohp_jax.types import TaskFamily

TeacherData = Literal["full", "support"]


class Tasks(Protocol):
    """The tasks of one split, up to a renaming of their labels: a `TaskTable`, or `Episodes`."""

    @property
    def num_labels(self) -> int:
        """Labels of a task."""

    def draw(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The classes `[M]` that a random task uses and the label `[M]` of each; int32, pure."""


class TaskTable(NamedTuple):
    """All tasks of one split, listed.

    Attributes:
      classes: `[R, M]` int32, the classes of the image set that a task uses.
      labels: `[R, M]` int32, the label of each in the task.
    """

    classes: np.ndarray
    labels: np.ndarray

    @property
    def num_labels(self) -> int:
        """Labels of a task."""
        return int(self.labels.max()) + 1

    def draw(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A row, all of them equally likely."""
        row = jax.random.randint(key, (), 0, len(self.classes))
        return jnp.asarray(self.classes)[row], jnp.asarray(self.labels)[row]


def image_family(
    name: str,
    images: ImageSet | DealtPool,
    tables: Mapping[str, Tasks],
    *,
    network: str | Network,
    shots: int,
    teacher_data: TeacherData = "full",
    batch_size: int | None = None,
) -> TaskFamily:
    """Turns tables of tasks over an image set into a `TaskFamily`.

    A sampled task is one of its split's under a random renaming of the labels. Its data: `classes` and
    `labels` `[M]`, with a `DealtPool` the `order` of the images of each and, with
    `teacher_data="support"`, the `support` it was dealt. Its context: the images `x` `[labels * shots,
    height, width, channels]`, label by label, and their labels `y` `[labels * shots]`.

    Features in place of images, `[classes, n, F]`, make a family of heads; contexts are then read as
    sets of numbers are.

    Args:
      name: stored as `TaskFamily.name`.
      images: the image set; teachers and supports use its train pool, `evaluate` its query pool. Of a
        `DealtPool` every task has pools of its own.
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
    pools = (
        images
        if isinstance(images, DealtPool)
        else FixedPools(**read_pools("image_family", images))
    )
    _check_options(teacher_data, shots, pools.num_train, batch_size)
    num_labels, shape = tables["train"].num_labels, pools.example_shape
    net = network
    if isinstance(network, str):
        net = make_network(network, shape, num_labels)
    tasks = _ImageTasks(pools, tables, net, num_labels, shots, teacher_data, batch_size)
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
        support=ImageSupport(num_labels, shape) if len(shape) == 3 else None,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _ImageTasks:
    """The functions of an `image_family`."""

    pools: FixedPools | DealtPool
    tables: Mapping[str, Tasks]
    net: Network
    num_labels: int
    shots: int
    teacher_data: TeacherData
    batch_size: int | None

    def sample(self, key, split="train"):
        if split not in self.tables:
            raise ValueError(f"sample: split must be one of {sorted(self.tables)}, got {split!r}.")
        row_key, name_key, support_key = jax.random.split(key, 3)
        deal_key = jax.random.fold_in(key, 3)  # a fourth, which leaves the other three as they are
        classes, labels = self.tables[split].draw(row_key)
        labels = jax.random.permutation(name_key, self.num_labels)[labels]
        data = {"classes": classes, "labels": labels, **self.pools.deal(deal_key, classes)}
        if self.teacher_data == "support":
            data["support"] = self._deal(support_key, labels)
        return data

    def loss(self, params, data, key):
        if self.teacher_data == "support":
            index = data["support"]
        else:
            index = jnp.arange(data["classes"].shape[0] * self.pools.num_train)
        if self.batch_size is not None and self.batch_size < index.shape[0]:
            index = jax.random.choice(key, index, (self.batch_size,))
        batch, labels = self.pools.training(data, index)
        return mean_cross_entropy(self.net.apply(params, batch), labels)

    def evaluate(self, params, data):
        index = jnp.arange(data["classes"].shape[0] * self.pools.num_query)
        batch, labels = self.pools.queries(data, index)
        logits = self.net.apply(params, batch)
        counts = jnp.bincount(labels, length=self.num_labels)
        return {
            "accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == labels),
            "loss": mean_cross_entropy(logits, labels),
            "chance": counts.max() / counts.sum(),
        }

    def context(self, data, key):
        dealt = self.teacher_data == "support"
        index = data["support"] if dealt else self._deal(key, data["labels"])
        batch, labels = self.pools.training(data, index)
        return {"x": batch, "y": labels}

    def context_loss(self, params, context):
        return mean_cross_entropy(self.net.apply(params, context["x"]), context["y"])

    def _deal(self, key, labels):
        of_images = jnp.repeat(labels, self.pools.num_train)
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


def read_pools(function: str, images: Any) -> dict[str, np.ndarray]:
    """The "train" and "query" pools of `images`, in the type that JAX holds them in.

    Raises: ValueError, in the name of `function`, for images that are no real floats.
    """
    pools = {}
    for name in ("train", "query"):
        pool = as_held(function, name, getattr(images, name))
        if not jnp.issubdtype(pool.dtype, jnp.floating):
            raise ValueError(
                f"{function}: expected floating-point images in [0, 1] in {name}, got {pool.dtype}; "
                "divide them by the largest value of their type."
            )
        pools[name] = pool
    return pools


def mean_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Of logits `[N, M]` and labels `[N]`; a scalar, in nats."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
