"""The multi-layer perceptron, as plain functions on a dict of weights."""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lohp_jax.types import Params

Initializer = Callable[[jax.Array, tuple[int, int]], jax.Array]


def unit_variance(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Weights `[inputs, outputs]`, normal with variance 1 / inputs."""
    return jax.random.normal(key, shape) / jnp.sqrt(shape[0])


def init_mlp(
    key: jax.Array, sizes: Sequence[int], *, w_init: Initializer = unit_variance
) -> Params:
    """Weights `w` drawn by `w_init` and zero biases `b` of every layer.

    Args:
      key: of the draw.
      sizes: inputs, hidden units of each layer, outputs.
      w_init: `(key, (inputs, outputs)) -> weights`, e.g. one of `jax.nn.initializers`.

    Returns: `{"layer_0": {"w": [inputs, outputs], "b": [outputs]}, "layer_1": ...}`.
    """
    keys = jax.random.split(key, len(sizes) - 1)
    return {
        f"layer_{i}": {"w": w_init(keys[i], shape), "b": jnp.zeros(shape[1])}
        for i, shape in enumerate(itertools.pairwise(sizes))
    }


def apply_mlp(
    params: Params, x: jax.Array, activation: Callable[[jax.Array], jax.Array] = jax.nn.relu
) -> jax.Array:
    """`[N, inputs]` -> `[N, outputs]`, without an activation after the last layer."""
    last = len(params) - 1
    for i in range(last + 1):
        layer = params[f"layer_{i}"]
        x = x @ layer["w"] + layer["b"][None]
        x = x if i == last else activation(x)
    return x
