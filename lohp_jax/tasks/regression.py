"""Few-shot regression of sines, the first experiment of meta-learning (Finn et al., 2017)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.checks import check_option
from lohp_jax.networks.mlp import apply_mlp, init_mlp
from lohp_jax.tasks.model import Kind, mean_squared_error, read_model
from lohp_jax.tasks.splits import check_split, draw_support
from lohp_jax.types import Params, TaskFamily

TeacherData = Literal["full", "support"]
AMPLITUDES, PHASES, INPUTS = (0.1, 5.0), (0.0, float(np.pi)), (-5.0, 5.0)
SIZES = (1, 40, 40, 1)


def sine_regression(
    init: Callable[..., Params] | None = None,
    apply: Callable[[Params, jax.Array], jax.Array] | None = None,
    *,
    shots: int = 10,
    num_train: int = 100,
    num_query: int = 100,
    teacher_data: TeacherData = "full",
    batch_size: int | None = None,
) -> TaskFamily:
    """Learns y = a sin(x - φ), a in [0.1, 5], φ in [0, π], from a few x in [-5, 5].

    A task is a seed, even for training and odd if held out. Its data are `amplitude`, `phase` and `x`
    `[num_train, 1]`, random training inputs; a context is `{"x": [shots, 1], "y": [shots, 1]}`, some
    of them. "objective" is the mean squared error at `num_query` evenly spaced inputs, "chance" that
    of the mean of the training y.

    Args:
      init: `(key) -> params` or `(key, x) -> params`; None for a perceptron of 40-40 rectified units.
      apply: `(params, x [b, 1]) -> [b, 1]`; given with `init`.
      shots: points in a context.
      num_train: training points of a task.
      num_query: points of the evaluation.
      teacher_data: "full": the loss is over all training points, contexts are some of them; "support":
        over the first `shots`, which are the only context of the task.
      batch_size: points per evaluation of the loss, drawn with replacement; None for all.

    Raises: ValueError for a model that does not fit, or numbers out of range.
    """
    check_option("sine_regression", "teacher_data", teacher_data, get_args(TeacherData))
    _check_numbers(shots, num_train, num_query, batch_size)
    init, apply = _read_network(init, apply)
    num_seen, query = num_train if teacher_data == "full" else shots, _evenly(num_query)

    def context_loss(params, context):
        return mean_squared_error(apply(params, context["x"]), context["y"])

    def error(params, data, x):
        return context_loss(params, {"x": x, "y": sine(data, x)})

    def loss(params, data, key):
        x = data["x"][:num_seen]
        if batch_size is not None and batch_size < num_seen:
            x = jax.random.choice(key, x, (batch_size,))
        return error(params, data, x)

    def evaluate(params, data):
        value, constant = error(params, data, query), jnp.mean(sine(data, data["x"]))
        chance = mean_squared_error(constant, sine(data, query))
        return {"objective": value, "loss": value, "chance": chance}

    def context(data, key):
        x = data["x"][:num_seen]
        same = jnp.zeros(num_seen, jnp.int32)
        x = x if num_seen == shots else x[draw_support(key, same, same[:1], shots)]
        return {"x": x, "y": sine(data, x)}

    sample = functools.partial(sample_sine, num_train=num_train)
    family = TaskFamily(sample, init, loss, evaluate, context, name="sine")
    return dataclasses.replace(family, context_loss=context_loss)


def sample_sine(key: jax.Array, split: str = "train", *, num_train: int) -> dict[str, jax.Array]:
    """A task: `amplitude` and `phase`, scalars, and `x` `[num_train, 1]`, all uniform."""
    check_split(split)
    seed = 2 * jax.random.randint(key, (), 0, 2**30) + (split == "held_out")
    amplitude_key, phase_key, x_key = jax.random.split(jax.random.key(seed), 3)
    return {
        "amplitude": jax.random.uniform(amplitude_key, (), jnp.float32, *AMPLITUDES),
        "phase": jax.random.uniform(phase_key, (), jnp.float32, *PHASES),
        "x": jax.random.uniform(x_key, (num_train, 1), jnp.float32, *INPUTS),
    }


def sine(data: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """The function of a task at inputs of any shape."""
    return data["amplitude"] * jnp.sin(x - data["phase"])


def _read_network(init: Callable | None, apply: Callable | None) -> tuple[Callable, Callable]:
    if init is None and apply is None:
        return functools.partial(init_mlp, sizes=SIZES), apply_mlp
    if init is None or apply is None:
        missing = "init" if init is None else "apply"
        raise ValueError(
            f"sine_regression: expected init and apply of one model, or neither, got no {missing}."
        )
    examples = np.zeros((1, 1), np.float32)
    kind = Kind("mse", mean_squared_error)
    model = read_model("sine_regression", init, apply, kind, examples, examples, 0)
    return model.init, model.apply


def _evenly(count: int) -> jax.Array:
    """`[count, 1]` the middles of as many equal parts of the interval of inputs."""
    low, high = INPUTS
    return jnp.float32(low + (high - low) * (np.arange(count)[:, None] + 0.5) / count)


def _check_numbers(shots: int, num_train: int, num_query: int, batch_size: int | None) -> None:
    numbers = {"num_train": num_train, "num_query": num_query}
    numbers |= {} if batch_size is None else {"batch_size": batch_size}
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"sine_regression: {name} must be at least 1, got {number}.")
    if not 1 <= shots <= num_train:
        raise ValueError(
            f"sine_regression: shots must be between 1 and num_train={num_train}, got {shots}."
        )
