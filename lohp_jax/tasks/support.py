"""How contexts are read: their faults, an order of their labels, and what they say of a task.

The names of the labels mean nothing, but a network that starts at theta_0 tells them apart: a task
and the same task under other names have different solutions. Where weights are learned, stored or
compared, labels therefore go by their canonical order, which leaves one name for each task to learn.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.checks import check_held
from lohp_jax.networks.encoders import Reading, set_encoder
from lohp_jax.types import Encoder, Params, PyTree, Support, TaskFamily

_NUM_FEATURES = 64
_MEASURED_TASKS = 64
_TASK = ""
"""Stands in `units` for all that describes a task as a whole."""


class _Sets:
    """What both readings below share; they say `like`, `num_classes` and `units`."""

    like: PyTree
    num_classes: int
    units: dict[str, tuple[np.ndarray, np.ndarray]] | None

    def check(self, context: PyTree) -> None:
        """Refuses a context that cannot be read.

        Raises: ValueError that says what was expected, what came and what to do.
        """
        _check_structure(context, self.like, self._names())
        for name in self._names():
            _check_set(name, context[name], context["x"])
        if self._labelled():
            self._check_labels(np.asarray(context["y"]))

    @property
    def order(self):
        """`(context) -> (context, rank)` of `Support`; None without labels.

        Labels are sorted by a fixed random projection of the mean of their examples.
        """
        return self._canonical if self._labelled() else None

    def encode(self, width: int) -> Encoder:
        """A set encoder (Zaheer et al., 2017) over the examples, beside the numbers of the task."""
        return set_encoder(self.read, width)

    def describe(self, context: PyTree) -> jax.Array:
        """`[labels, P]` mean example of each label beside the numbers of the task.

        Without labels `[1, F]`: means of y, and of its products with random features of x, which for a
        regression determine the fit of a linear model in these features up to their covariance.
        """
        reading = self.read(context)
        if self._labelled():
            means = self.inputs(context)
            task = jnp.broadcast_to(reading.task, (len(means), reading.task.size))
            return jnp.concatenate([means, task], axis=-1)
        return jnp.concatenate([self._moments(context), reading.task])[None]

    @property
    def inputs(self):
        """`(context) -> [labels, P]`, the mean example of each label; None without labels."""
        return self._class_means if self._labelled() else None

    def read(self, context: PyTree) -> Reading:
        """The context as an encoder takes it."""
        names = self._names()
        task = self._measure(_TASK, self._whole(context))
        if not names:
            return Reading(None, jnp.zeros((0, 0)), jnp.zeros((0, 1)), task)
        count = len(context["x"])
        images = self._measure("x", context["x"]) if context["x"].ndim == 4 else None
        rest = [n for n in names if (n != "x" or images is None) and not self._is_label(n)]
        features = [self._measure(name, context[name]).reshape(count, -1) for name in rest]
        features = jnp.concatenate(features, axis=-1) if features else jnp.zeros((count, 0))
        if self._labelled():
            member = jax.nn.one_hot(context["y"], self.num_classes, dtype=jnp.float32)
        else:
            member = jnp.ones((count, 1))
        return Reading(images, features, member, task)

    def _names(self) -> list[str]:
        """Entries that describe examples."""
        like = self.like
        if not isinstance(like, Mapping) or getattr(like.get("x"), "ndim", 0) < 1:
            return []
        count = like["x"].shape[0]
        return sorted(n for n, leaf in like.items() if getattr(leaf, "shape", ())[:1] == (count,))

    def _whole(self, context: PyTree) -> jax.Array:
        """`[G]` the numbers of all entries that describe the task as a whole."""
        names = self._names()
        rest = {n: tree for n, tree in context.items() if n not in names} if names else context
        numbers = [_number(leaf).reshape(-1) for leaf in jax.tree.leaves(rest)]
        return jnp.concatenate(numbers) if numbers else jnp.zeros(0)

    def _is_label(self, name: str) -> bool:
        return name == "y" and self._labelled()

    def _labelled(self) -> bool:
        return (
            self.num_classes > 0
            and "y" in self._names()
            and self.like["y"].ndim == 1
            and jnp.issubdtype(self.like["y"].dtype, jnp.integer)
        )

    def _measure(self, name: str, value: jax.Array) -> jax.Array:
        mean, std = (jnp.expand_dims(x, range(value.ndim - x.ndim)) for x in self._unit(name))
        return (_number(value) - mean) / std

    def _unit(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        return (np.float32(0), np.float32(1)) if self.units is None else self.units[name]

    def _canonical(self, context: dict) -> tuple[dict, jax.Array]:
        means = self._class_means(context)
        direction = jax.random.normal(jax.random.key(0), means.shape[1:])
        rank = jnp.argsort(jnp.argsort(means @ direction))
        return {**context, "y": rank[context["y"]]}, rank

    def _class_means(self, context: dict) -> jax.Array:
        x = self._measure("x", context["x"]).reshape(len(context["x"]), -1)
        member = jax.nn.one_hot(context["y"], self.num_classes, dtype=x.dtype)
        return (member.T @ x) / jnp.maximum(member.sum(axis=0), 1.0)[:, None]

    def _moments(self, context: PyTree) -> jax.Array:
        if not self._names():
            return jnp.zeros(0)
        count = len(context["x"])
        x = self._measure("x", context["x"]).reshape(count, -1)
        others = [n for n in self._names() if n != "x"]
        values = [self._measure(n, context[n]).reshape(count, -1) for n in others]
        values = jnp.concatenate([jnp.ones((count, 1)), *values], axis=-1)
        weight_key, phase_key = jax.random.split(jax.random.key(0))
        weights = jax.random.normal(weight_key, (x.shape[1], _NUM_FEATURES))
        phases = jax.random.uniform(phase_key, (_NUM_FEATURES,), maxval=2 * jnp.pi)
        features = jnp.sqrt(2.0) * jnp.cos(x @ weights + phases[None])
        return jnp.concatenate([values.mean(axis=0), ((values.T @ features) / count).reshape(-1)])

    def _check_labels(self, labels: np.ndarray) -> None:
        wanted, got = set(range(self.num_classes)), set(labels.tolist())
        if got != wanted:
            raise ValueError(
                f"generate: expected examples of every label 0..{self.num_classes - 1} and no other; "
                f"missing {sorted(wanted - got)}, unknown {sorted(got - wanted)}."
            )


@dataclasses.dataclass(frozen=True, eq=False)
class SetSupport(_Sets):
    """The generic reading: a set of examples {x, y, ...}, and what describes the task as a whole.

    In a dict with an entry "x", all arrays with the leading axis of "x" are examples; a vector of
    integers "y" of a family with `num_classes` are labels, all else are numbers. What is left, and any
    other pytree, describes the task.

    Attributes:
      like: a context, as `jax.ShapeDtypeStruct`s; the number of examples is free.
      num_classes: number of labels; 0 where there are none.
      units: `{entry: (mean, standard deviation)}` to measure entries in, "" for what describes the task
        as a whole; None leaves all as it is.
    """

    like: PyTree
    num_classes: int = 0
    units: dict[str, tuple[np.ndarray, np.ndarray]] | None = None

    def measured_on(self, contexts: PyTree) -> "SetSupport":
        """The same reading in the units of `contexts`, which have a leading axis of tasks."""
        units = {
            name: _unit(np.asarray(contexts[name], np.float32), 2)
            for name in self._names()
            if not self._is_label(name)
        }
        units[_TASK] = _unit(np.asarray(jax.jit(jax.vmap(self._whole))(contexts), np.float32), 1)
        return dataclasses.replace(self, units=units)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSupport(_Sets):
    """Labelled images: contexts `{"x": [n, height, width, channels] in [0, 1], "y": [n] labels}`.

    Attributes:
      num_classes: labels of a task.
      image_shape: (height, width, channels).
    """

    num_classes: int
    image_shape: tuple[int, int, int]
    units: ClassVar[None] = None

    @property
    def like(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A context with one example of each label."""
        return {
            "x": jax.ShapeDtypeStruct((self.num_classes, *self.image_shape), jnp.float32),
            "y": jax.ShapeDtypeStruct((self.num_classes,), jnp.int32),
        }

    def check(self, context: PyTree) -> None:
        """As of `SetSupport`, and raises ValueError for images that are not in [0, 1]."""
        super().check(context)
        images = np.asarray(context["x"])
        if not ((images >= 0) & (images <= 1)).all():
            raise ValueError(
                "generate: expected images in [0, 1], got values from "
                f"{images.min()} to {images.max()}; divide by the largest value a pixel can have."
            )


@functools.lru_cache(maxsize=16)
def support_of(family: TaskFamily) -> Support:
    """The family's own way to read its contexts, or the generic one.

    The generic one measures every entry in units of its mean and standard deviation over the contexts
    of a few training tasks.
    """
    if family.support is not None:
        return family.support

    def draw(key):
        return family.context(family.sample(key, "train"), key)

    with jax.ensure_compile_time_eval():  # constants, also for a caller that is being traced
        contexts = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), _MEASURED_TASKS))
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), contexts)
        return SetSupport(like, family.num_classes).measured_on(contexts)


def relabel(params: Params, class_axes: PyTree | None, order: jax.Array | None) -> Params:
    """Weights of the task whose label c was label `order[c]`: permutes every class axis.

    Args:
      params: weights.
      class_axes: of the family; None or -1 leaves a leaf alone.
      order: `[num_classes]` int32.
    """
    if class_axes is None or order is None:
        return params
    return jax.tree.map(
        lambda leaf, axis: jnp.take(leaf, order, axis=axis) if axis >= 0 else leaf,
        params,
        class_axes,
    )


def canonical_order(family: TaskFamily, context: PyTree) -> tuple[PyTree, jax.Array | None]:
    """Renames the labels of a context to an order that depends on their examples alone.

    A family without class axes, or whose support knows no order, keeps its contexts as they are.

    Returns: the context, and `[num_classes]` the new name of each label, for `relabel`, or None.
    """
    if family.class_axes is None or support_of(family).order is None:
        return context, None
    return support_of(family).order(context)


def name_canonically(family: TaskFamily, data: PyTree, key: jax.Array) -> PyTree:
    """The same task with its labels in the canonical order of the support that `key` draws."""
    if family.rename is None:
        return data
    _, rank = canonical_order(family, family.context(data, key))
    return data if rank is None else family.rename(data, rank)


def _number(value: jax.Array) -> jax.Array:
    """Floating-point numbers as they are, at least float32, and others as float32."""
    return jnp.asarray(value).astype(jnp.promote_types(value.dtype, jnp.float32))


def _unit(values: np.ndarray, leading: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over the leading axes, of which all but one stay, of size 1.

    The standard deviation is 1 where nothing varies.
    """
    axes = tuple(range(leading))
    mean, std = (f(axis=axes, keepdims=True)[0] for f in (values.mean, values.std))
    constant = std <= 1e-6 * np.maximum(np.abs(mean), 1e-30)
    return mean, np.where(constant, 1.0, std).astype(np.float32)


def _check_structure(context: PyTree, like: PyTree, sets: list[str]) -> None:
    """Raises ValueError for another structure, shape or type than `like`, or numbers not finite."""
    wanted, got = (jax.tree.structure(tree) for tree in (like, context))
    if wanted != got:
        described = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", like)
        raise ValueError(
            f"generate: expected a context like {described}, got "
            f"{sorted(context) if isinstance(context, Mapping) else type(context).__name__}."
        )
    named = jax.tree.leaves_with_path(like)
    for (path, expected), leaf in zip(named, jax.tree.leaves(context), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "the context"
        array = np.asarray(leaf)
        free = path and getattr(path[0], "key", None) in sets
        shape, came = (s[1:] if free else s for s in (expected.shape, array.shape))
        if array.ndim != len(expected.shape) or came != shape:
            wanted = ["n", *shape] if free else list(shape)
            raise ValueError(
                f"generate: expected {name} of shape [{', '.join(map(str, wanted))}], "
                f"got {list(array.shape)}."
            )
        _check_numbers(name, array, expected.dtype)


def _check_numbers(name: str, array: np.ndarray, dtype: np.dtype) -> None:
    kind = "floating-point" if jnp.issubdtype(dtype, jnp.floating) else "integer"
    family = jnp.floating if kind == "floating-point" else jnp.integer
    if jnp.issubdtype(dtype, jnp.bool_):
        kind, family = "boolean", jnp.bool_
    if not jnp.issubdtype(array.dtype, family):
        raise ValueError(f"generate: expected {kind} {name}, got {array.dtype}; convert it.")
    check_held("generate", name, array)
    if family is jnp.floating and not np.isfinite(array).all():
        raise ValueError(
            f"generate: expected finite numbers in {name}, got {np.isnan(array).sum()} NaN and "
            f"{np.isinf(array).sum()} infinite; take them out."
        )


def _check_set(name: str, value: jax.Array, x: jax.Array) -> None:
    if len(value) != len(x) or not len(x):
        raise ValueError(
            f"generate: expected as many examples in {name} as in x, and one at least, got "
            f"{len(value)} and {len(x)}."
        )
