"""Teachers: the optimizers whose trajectories a generator learns from, with a name and a price."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import ClosedJaxpr, Jaxpr

from lohp_jax.optimizers.extra_args import with_extra_args
from lohp_jax.optimizers.names import make_optimizer
from lohp_jax.types import Params, PyTree

_JAXPRS = (Jaxpr, ClosedJaxpr)


class Teacher(NamedTuple):
    """An optimizer to learn from.

    Attributes:
      name: what results call it, e.g. "adam".
      optimizer: gets `value`, `value_fn`, `grad` and `grad_fn` as far as it takes them.
      gradients: gradient evaluations of one step, see `count_gradients`.
      spec: what it was asked for by, e.g. "adam:0.1"; the name where that says no more.
    """

    name: str
    optimizer: optax.GradientTransformationExtraArgs
    gradients: int
    spec: str


Asked = str | optax.GradientTransformation | tuple[str, optax.GradientTransformation] | Teacher


def make_teachers(
    teachers: Asked | Iterable[Asked], num_steps: int, theta_0: Params | None = None
) -> tuple[Teacher, ...]:
    """Teachers from names, transformations and pairs of both, mixed as you like.

    A name for `make_optimizer` calls its teacher by its first part, "adam" for "adam:0.1", and in full
    where two begin alike; a pair by its own name, and a transformation alone by its place, "0" for the
    first.

    Args:
      teachers: one or several; a `Teacher` stays what it is.
      num_steps: T, which learned optimizers plan for.
      theta_0: weights to count the gradients of a step with, for transformations that only take a
        certain structure; None for a matrix and a vector.

    Raises: ValueError for what is none of these, no teacher at all, or two of one name; and what
      `make_optimizer` raises.
    """
    if isinstance(teachers, str) or _is_transformation(teachers) or isinstance(teachers, Teacher):
        teachers = (teachers,)
    if not (asked := list(teachers)):
        raise ValueError("make_teachers: expected at least one teacher, got none.")
    kinds = [_kind(each) for each in asked if isinstance(each, str)]
    made = []
    for place, each in enumerate(asked):
        if isinstance(each, Teacher):
            made.append(each)
            continue
        if isinstance(each, str):
            name = _kind(each) if kinds.count(_kind(each)) == 1 else each
            spec, optimizer = each, make_optimizer(each, num_steps)
        else:
            name, optimizer = _pair(place, each)
            spec, optimizer = name, with_extra_args(optimizer)
        made.append(Teacher(name, optimizer, count_gradients(optimizer, theta_0), spec))
    names = [teacher.name for teacher in made]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"make_teachers: expected teachers of different names, got two called {twice[0]!r}; give "
            "each a learning rate or, in a pair (name, transformation), a name of its own."
        )
    return tuple(made)


def count_gradients(optimizer: optax.GradientTransformation, params: Params | None = None) -> int:
    """Gradient evaluations that one step costs: the one given to `update`, and those it asks for.

    Counted in the traced step, in every round of a `scan` and in the dearest branch of a `cond`; a
    `while_loop`, as of a line search, counts as one round.

    Args:
      optimizer: any optax transformation.
      params: weights, or their shapes; None for a matrix and a vector.
    """
    if params is None:
        params = {"w": jnp.zeros((2, 2)), "b": jnp.zeros(2)}

    def loss(params):
        return sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(params))

    differentiable = jax.custom_jvp(loss)

    @differentiable.defjvp
    def _(primals, tangents):
        value, tangent = jax.jvp(loss, primals, tangents)
        return _gradient_counts(value), tangent

    def value_fn(params, grad_fn=None):  # line searches insist that it takes what is left over
        del grad_fn
        return differentiable(params)

    def grad_fn(params, _):
        return _gradient_counts(params)

    def step(params):
        extra = {"value": loss(params), "value_fn": value_fn, "grad": params, "grad_fn": grad_fn}
        update = with_extra_args(optimizer).update
        return update(params, optimizer.init(params), params, **extra)

    return 1 + _count_marks(jax.make_jaxpr(step)(params).jaxpr)


@jax.jit
def _gradient_counts(tree: PyTree) -> PyTree:
    """Marks a gradient evaluation in a traced step, where it appears by its name."""
    return jax.tree.map(jnp.negative, tree)


def _count_marks(jaxpr: Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.params.get("name") == _gradient_counts.__name__:
            total += 1
            continue
        parts = jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, _JAXPRS))
        inner = [
            _count_marks(getattr(part, "jaxpr", part))
            for part in parts
            if isinstance(part, _JAXPRS)
        ]
        if equation.primitive.name == "cond":
            total += max(inner)
        else:
            total += sum(inner) * equation.params.get("length", 1)
    return total


def _kind(name: str) -> str:
    return name.partition(":")[0]


def _is_transformation(value: Any) -> bool:
    return all(callable(getattr(value, name, None)) for name in ("init", "update"))


def _pair(place: int, asked: Any) -> tuple[str, optax.GradientTransformation]:
    """Name and transformation of a teacher that is not asked for by name."""
    if _is_transformation(asked):
        return str(place), asked
    if isinstance(asked, tuple | list) and len(asked) == 2:
        name, optimizer = asked
        if isinstance(name, str) and name and _is_transformation(optimizer):
            return name, optimizer
    raise ValueError(
        "make_teachers: expected names, optax transformations or pairs (name, transformation), got "
        f"{asked!r} at {place}."
    )
