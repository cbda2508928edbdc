"""A family of lines to be fitted, two weights each, and the space of its generators."""

import jax
import jax.numpy as jnp
import pytest

from lohp_jax.trajectories.dataset import Coordinates, make_space
from lohp_jax.types import Example, Space, TaskFamily


def _error(params, x, y):
    return jnp.mean((params["slope"] * x + params["offset"] - y) ** 2)


@pytest.fixture(scope="session")
def lines() -> TaskFamily:
    """Tasks are y = a x + b; a context has five points of one."""

    def sample(key, split="train"):
        return {"a": jax.random.normal(key), "b": jnp.float32(1.0)}

    def points(data, key):
        x = jax.random.normal(key, (5, 1))
        return {"x": x, "y": data["a"] * x + data["b"]}

    def evaluate(params, data):
        error = _error(params, **points(data, jax.random.key(0)))
        return {"objective": error, "loss": error}

    return TaskFamily(
        sample,
        init=lambda key: {"slope": jnp.zeros(()), "offset": jax.random.normal(key)},
        loss=lambda params, data, key: _error(params, **points(data, key)),
        evaluate=evaluate,
        context=points,
        name="lines",
        context_loss=lambda params, context: _error(params, **context),
    )


@pytest.fixture(scope="session")
def space(lines) -> Space:
    """Walks of two steps, after the second of three teachers."""
    theta_0 = {"slope": jnp.float32(0.0), "offset": jnp.float32(0.5)}
    scale = {"slope": jnp.float32(2.0), "offset": jnp.float32(1.0)}
    coordinates = Coordinates(theta_0, scale, jnp.int32(1))
    return make_space(lines, coordinates, channels=4, num_steps=2, num_teachers=3)


@pytest.fixture(scope="session")
def example(space) -> Example:
    """A straight trajectory to the line of its task."""
    data = space.family.sample(jax.random.key(3))
    end = space.codec.encode({"slope": data["a"], "offset": data["b"]})
    tokens = jnp.stack([0 * end, 0.5 * end, end])
    context = space.family.context(data, jax.random.key(4))
    return Example(tokens, jnp.int32(1), context, data)
