"""A model of the user's own: an `init`, an `apply` and what is minimised, checked by their shapes."""

import inspect
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lohp_jax.checks import check_option
from lohp_jax.tasks.door import check_params, check_scalar, describe_array, trace
from lohp_jax.types import Params, PyTree

LossName = Literal["cross_entropy", "mse"]
Loss = Callable[[jax.Array, jax.Array], jax.Array]


class Kind(NamedTuple):
    """What is minimised: its name, "" for a user's own loss, and the mean over examples."""

    name: str
    loss: Loss


class Model(NamedTuple):
    """A user's model: `init(key)`, `apply(params, x)` and what is minimised."""

    init: Callable[[jax.Array], Params]
    apply: Callable[[Params, jax.Array], jax.Array]
    kind: Kind


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def mean_squared_error(predictions: jax.Array, y: jax.Array) -> jax.Array:
    """Mean over examples and outputs."""
    return jnp.mean((predictions - y) ** 2)


_LOSSES = {"cross_entropy": _cross_entropy, "mse": mean_squared_error}


def read_loss(function: str, loss: LossName | Loss | None, y: np.ndarray) -> Kind:
    """The loss of a name, of the user's own, or by the type of y; ValueError for another name."""
    if callable(loss):
        return Kind("", loss)
    if loss is None:
        loss = "cross_entropy" if np.asarray(y).dtype.kind in "iu" else "mse"
    check_option(function, "loss", loss, get_args(LossName))
    return Kind(loss, _LOSSES[loss])


def read_model(
    function: str,
    init: Callable,
    apply: Callable,
    kind: Kind,
    x: np.ndarray,
    y: np.ndarray,
    num_classes: int,
) -> Model:
    """Checks by shapes alone that a model fits its data.

    Args:
      function: named in errors.
      init: `(key) -> params` or `(key, x) -> params`.
      apply: `(params, x [b, ...]) -> predictions [b, ...]`.
      kind: what is minimised.
      x: `[b, ...]` examples.
      y: `[b, ...]` their targets.
      num_classes: predictions for an example with the cross-entropy, 0 with other losses.

    Raises: ValueError that names what does not fit, what was expected and what came.
    """
    init = _bind_init(function, init, x[:1])
    params = trace(function, "init", init, jax.eval_shape(lambda: jax.random.key(0)))
    check_params(function, "init", params)
    _check_arguments(function, "apply", apply, 2, "(params, x)")
    x, y = (jax.ShapeDtypeStruct((3, *a.shape[1:]), a.dtype) for a in (x, y))
    predictions = trace(function, f"apply(params, x {describe_array(x)})", apply, params, x)
    if kind.name:
        wanted = (3, num_classes) if num_classes else y.shape
        _check_predictions(function, predictions, wanted, y, num_classes)
    call = "loss(predictions, y)"
    check_scalar(function, call, trace(function, call, kind.loss, predictions, y))
    return Model(init, apply, kind)


def _bind_init(function: str, init: Callable, x: np.ndarray) -> Callable[[jax.Array], Params]:
    """`(key) -> params` from an `init` with or without an argument for the inputs."""
    required, any_number = _count_arguments(init)
    if required == 1 and not any_number:
        return init
    _check_arguments(function, "init", init, 2, "(key) or (key, x)")

    def with_example(key):
        return init(key, jnp.asarray(x))

    return with_example


def _count_arguments(function: Callable) -> tuple[int, bool]:
    """How many positional arguments a function needs, and whether it takes any number."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C
        return 0, True
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in positional)
    return required, any(p.kind is p.VAR_POSITIONAL for p in parameters)


def _check_arguments(function: str, name: str, given: Callable, most: int, expected: str) -> None:
    required, _ = _count_arguments(given)
    if required > most:
        raise ValueError(
            f"{function}: expected {name}{expected}, got a function of {required} arguments; fix the "
            "others with functools.partial, and wrap a Haiku model in hk.without_apply_rng."
        )


def _check_predictions(
    function: str,
    predictions: PyTree,
    wanted: tuple[int, ...],
    y: jax.ShapeDtypeStruct,
    num_classes: int,
) -> None:
    """Raises: ValueError unless predictions for three examples are floats of the shape `wanted`."""
    single = isinstance(predictions, jax.ShapeDtypeStruct)
    if single and predictions.shape == wanted and jnp.issubdtype(predictions.dtype, jnp.floating):
        return
    got = describe_array(predictions) if single else f"a {type(predictions).__name__}"
    advice = (
        f"give each of num_classes={num_classes} labels a logit, or num_classes if there are more"
        if num_classes
        else "make them agree, or give a loss of your own"
    )
    raise ValueError(
        f"{function}: expected apply to return floating-point predictions of shape {list(wanted)} for 3 "
        f"examples with y {describe_array(y)}, got {got}; {advice}."
    )
