"""The small learned optimizer: Celo2 with a learning rate that is meta-trained together with it."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lohp_jax.optimizers.celo2 import celo2
from lohp_jax.optimizers.theta import expected_shapes
from lohp_jax.types import PyTree

_START_POWER = 2.0


class Rate(NamedTuple):
    """The learning rate of the small learned optimizer at step t of T.

    peak * (T / 1000)^exponent * (1 - t / T)^power
    """

    peak: float
    exponent: float
    power: float


def small_start(key: jax.Array, *, learning_rate: float) -> dict[str, PyTree]:
    """Meta-parameters to start from: the direction of Adam, and a peak of the learning rate.

    Two hidden units carry the momentum over the root of the mean square to the output; the others
    are random and not yet connected to it.

    Returns: `theta` as `celo2` takes it; `log_peak`, `exponent` and `log_power`, scalars, see `Rate`.
    """
    shapes = expected_shapes("celo2")["ff_mod_stack"]["~"]
    inputs = {name: 30 if name.startswith("w0") else shape[0] for name, shape in shapes.items()}
    weights = {}
    for weight_key, (name, shape) in zip(
        jax.random.split(key, len(shapes)), shapes.items(), strict=True
    ):
        weights[name] = jnp.zeros(shape)
        if name[:2] in ("w0", "w1"):
            draw = jax.random.truncated_normal(weight_key, -2, 2, shape) / math.sqrt(inputs[name])
            weights[name] = draw.at[:, :2].set(0.0)
    signs = jnp.array([1.0, -1.0])
    weights["w0__5"] = weights["w0__5"].at[0, :2].set(signs)
    weights["w1"] = weights["w1"].at[:2, :2].set(jnp.eye(2))
    weights["w2"] = weights["w2"].at[:2, 0].set(signs)
    theta = {"ff_mod_stack": {"~": weights}}
    return {"theta": theta} | pack_rate(Rate(learning_rate, 0.0, _START_POWER))


def small_optimizer(
    meta: dict[str, PyTree], num_steps: jax.Array | int
) -> optax.GradientTransformationExtraArgs:
    """`celo2` with a learning rate that follows from the number of steps, see `Rate`."""
    rate = unpack_rate(meta)
    highest = rate.peak * (num_steps / 1000) ** rate.exponent

    def schedule(count):
        left = jnp.maximum(1.0 - count / num_steps, jnp.finfo(jnp.float32).tiny)
        return highest * left**rate.power

    return celo2(meta["theta"], schedule, orthogonalise=False)


def pack_rate(rate: Rate) -> dict[str, jax.Array]:
    """The meta-parameters of a rate, free of bounds."""
    return {
        "log_peak": jnp.log(jnp.float32(rate.peak)),
        "exponent": jnp.float32(rate.exponent),
        "log_power": jnp.log(jnp.float32(rate.power)),
    }


def unpack_rate(meta: dict[str, PyTree]) -> Rate:
    """The rate of meta-parameters."""
    return Rate(jnp.exp(meta["log_peak"]), meta["exponent"], jnp.exp(meta["log_power"]))
