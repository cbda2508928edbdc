"""Checks at the door: whether the functions of a family fit, and whether it is the family of before.

Everything is traced with shapes alone (`jax.eval_shape`): nothing is computed or compiled.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lohp_jax.files import first_difference
from lohp_jax.types import PyTree, TaskFamily

MEASURES = {"accuracy": True, "objective": False}
"""What `evaluate` may measure, and whether higher is better."""


class FamilyDescription(NamedTuple):
    """What a family is like, in values that JSON can hold; `_asdict()` is what to save.

    Attributes:
      name: of the family.
      measure: "accuracy" or "objective".
      higher_is_better: True for an accuracy.
      num_classes: labels of a task, or 0.
      params: type and shape of each leaf of the weights, e.g. `{"['w']": "float32[3,4]"}`.
      context: the same of a context.
    """

    name: str
    measure: str
    higher_is_better: bool
    num_classes: int
    params: dict[str, str]
    context: dict[str, str]


def describe_family(family: TaskFamily) -> FamilyDescription:
    """Checks that the functions of a family fit together, and says what it is like.

    Raises: ValueError that names the first function that does not fit, what was expected and what
      came; where a function raised an error of its own, that error is its cause.
    """
    if not isinstance(family, TaskFamily):
        raise ValueError(
            f"describe_family: expected a TaskFamily, got {type(family).__name__}; make one with "
            "supervised_family, or TaskFamily(sample, init, loss, evaluate, context)."
        )
    return _described(family)


@functools.lru_cache(maxsize=16)
def _described(family: TaskFamily) -> FamilyDescription:
    where = f"family {family.name!r}"
    data = _check_sample(where, family)
    params = trace(where, "init(key)", family.init, _KEY)
    check_params(where, "init(key)", params)
    loss = trace(where, "loss(params, data, key)", family.loss, params, data, _KEY)
    check_scalar(where, "loss(params, data, key)", loss)
    measure = _check_evaluate(where, family, params, data)
    context = trace(where, "context(data, key)", family.context, data, _KEY)
    if not jax.tree.leaves(context):
        raise _misfit(
            where,
            "context(data, key)",
            "a pytree with at least one array",
            repr(context),
            "return what a generator may see of the task, e.g. a dict of arrays",
        )
    if family.context_loss is not None:
        call = "context_loss(params, context)"
        check_scalar(where, call, trace(where, call, family.context_loss, params, context))
    _check_labels(where, family, params, data)
    return FamilyDescription(
        family.name,
        measure,
        MEASURES[measure],
        family.num_classes,
        describe_arrays(params),
        describe_arrays(context),
    )


def check_same_family(description: FamilyDescription, saved: dict[str, Any], where: str) -> None:
    """Refuses a family that is not the one that a directory was made with.

    Args:
      description: of the family that is given now.
      saved: `_asdict()` of the description of before, as read from JSON.
      where: what holds it, named in the error, e.g. the directory.

    Raises: ValueError with the first difference.
    """
    if difference := first_difference(saved, description._asdict()):
        raise ValueError(
            f"{where} holds a run of another family: {difference}; give the family that it was made "
            "with, or another directory."
        )


def describe_arrays(tree: PyTree) -> dict[str, str]:
    """Type and shape of each leaf by its path, e.g. `{"['x']": "float32[5,1]"}`."""
    return {
        jax.tree_util.keystr(path): describe_array(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def describe_array(leaf: Any) -> str:
    """E.g. "float32[5,1]"."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def trace(where: str, call: str, function: Callable, *args: Any) -> PyTree:
    """Shapes of what a function returns, without running it.

    Raises: ValueError, caused by the function's own error; also if it returns what is no array.
    """
    try:
        return jax.eval_shape(function, *args)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{where}: {call} must be a pure function of arrays that jax.jit accepts; it raised "
            f"{type(error).__name__}: {reason}"
        ) from error


def check_params(where: str, call: str, params: PyTree) -> None:
    """Raises: ValueError unless weights are at least one array, and all of them floating."""
    advice = (
        "keep counters, keys and flags out of the weights (flax: nnx.split(model, nnx.Param, ...); "
        "Equinox: eqx.partition(model, eqx.is_inexact_array))"
    )
    for path, leaf in jax.tree.leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            got = f"{describe_array(leaf)} at {jax.tree_util.keystr(path) or 'the root'}"
            raise _misfit(where, call, "a pytree of floating-point arrays", got, advice)
    if not jax.tree.leaves(params):
        raise _misfit(where, call, "at least one floating-point array", repr(params), advice)


def check_scalar(where: str, call: str, value: PyTree) -> None:
    """Raises: ValueError unless `value` is one floating-point number."""
    if not _is_scalar(value):
        raise _misfit(
            where,
            call,
            "one floating-point scalar",
            _describe(value),
            "take the mean over the examples, and return nothing else",
        )


_KEY = jax.eval_shape(lambda: jax.random.key(0))


def _misfit(where: str, call: str, expected: str, got: str, advice: str) -> ValueError:
    return ValueError(f"{where}: {call} must return {expected}, got {got}; {advice}.")


def _is_scalar(value: PyTree) -> bool:
    return (
        isinstance(value, jax.ShapeDtypeStruct)
        and value.shape == ()
        and jnp.issubdtype(value.dtype, jnp.floating)
    )


def _describe(tree: PyTree) -> str:
    if isinstance(tree, jax.ShapeDtypeStruct):
        return describe_array(tree)
    return f"{type(tree).__name__} of {describe_arrays(tree)}"


def _check_sample(where: str, family: TaskFamily) -> PyTree:
    """Shapes of a task, the same in both splits."""
    splits = ("train", "held_out")
    data, other = (
        trace(where, f'sample(key, "{split}")', lambda key, s=split: family.sample(key, s), _KEY)
        for split in splits
    )
    if jax.tree.structure(data) != jax.tree.structure(other) or (
        describe_arrays(data) != describe_arrays(other)
    ):
        raise _misfit(
            where,
            'sample(key, "held_out")',
            f'the same arrays as sample(key, "train"), {_describe(data)}',
            _describe(other),
            "tasks of both splits share one network and one program",
        )
    return data


def _check_evaluate(where: str, family: TaskFamily, params: PyTree, data: PyTree) -> str:
    """The measure of `evaluate`."""
    call = "evaluate(params, data)"
    scores = trace(where, call, family.evaluate, params, data)
    expected = 'a dict of scalars with "loss" and either "accuracy" or "objective"'
    advice = (
        '"accuracy" is better when higher, "objective" when lower, both on examples of their own'
    )
    measures = [name for name in MEASURES if isinstance(scores, dict) and name in scores]
    if not measures or "loss" not in scores:
        raise _misfit(where, call, expected, _describe(scores), advice)
    for name in (measures[0], "loss"):
        if not _is_scalar(scores[name]):
            got = f"{_describe(scores[name])} for {name!r}"
            raise _misfit(where, call, expected, got, "take the mean over the examples")
    return measures[0]


def _check_labels(where: str, family: TaskFamily, params: PyTree, data: PyTree) -> None:
    """Raises: ValueError unless `num_classes`, `class_axes` and `rename` agree."""
    axes, num_classes = family.class_axes, family.num_classes
    if (axes is None) != (family.rename is None):
        missing, given = ("class_axes", "rename") if axes is None else ("rename", "class_axes")
        raise ValueError(
            f"{where}: {given} is given without {missing}; a task whose labels go by other names needs "
            "both, one for its data and one for its weights."
        )
    if axes is None:
        return
    check_class_axes(where, axes, params, num_classes)
    order = jax.ShapeDtypeStruct((num_classes,), jnp.int32)
    renamed = trace(where, "rename(data, order)", family.rename, data, order)
    if describe_arrays(renamed) != describe_arrays(data):
        raise _misfit(
            where,
            "rename(data, order)",
            f"a task like the one it got, {_describe(data)}",
            _describe(renamed),
            "only the names of the labels may change",
        )


def check_class_axes(where: str, class_axes: PyTree, params: PyTree, num_classes: int) -> None:
    """Raises: ValueError unless every leaf has an axis of `num_classes`, or -1, and one has an axis."""
    if jax.tree.structure(class_axes) != jax.tree.structure(params):
        raise ValueError(
            f"{where}: class_axes must be a pytree like the params, {jax.tree.structure(params)}, got "
            f"{jax.tree.structure(class_axes)}; use -1 for a leaf without a class axis."
        )
    leaves = jax.tree.leaves_with_path(params)
    for (path, leaf), axis in zip(leaves, jax.tree.leaves(class_axes), strict=True):
        fits = isinstance(axis, int) and -1 <= axis < len(leaf.shape)
        if not fits or (axis >= 0 and leaf.shape[axis] != num_classes):
            raise ValueError(
                f"{where}: class_axes at {jax.tree_util.keystr(path)} must be an axis of "
                f"num_classes={num_classes} entries of {describe_array(leaf)}, or -1, got {axis!r}."
            )
    if max(jax.tree.leaves(class_axes)) < 0:
        raise ValueError(
            f"{where}: class_axes must name an axis of at least one leaf, got -1 for all; leave "
            "class_axes out where labels have no symmetry."
        )
