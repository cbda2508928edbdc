"""Ackley's function: one deep well in a nearly flat, rippled plain."""

import math

import jax
import jax.numpy as jnp

from lohp_jax.problems.family import check_sizes
from lohp_jax.problems.shifted import Features, shifted_family
from lohp_jax.types import ProblemFamily


def ackley(
    n: int = 2,
    *,
    rotated: bool = False,
    shifted: bool = True,
    features: Features = "probes",
    num_probes: int | None = None,
) -> ProblemFamily:
    """Minimise `ackley_function` of Q (x - shift); shifts are uniform in (-2, 2), starts in (-5, 5).

    Args:
      n: dimension.
      rotated: by a random Q for each problem.
      shifted: by a random shift for each problem; without, every minimum is at 0.
      features: "probes", "none" or the control "shift", see `shifted_family`.
      num_probes: points where "probes" looks at the function; None for n.

    Raises: ValueError for unknown features or sizes under 1.
    """
    check_sizes("ackley", n=n)
    return shifted_family(
        "ackley_rotated" if rotated else "ackley",
        ackley_function,
        n,
        rotated=rotated,
        shifted=shifted,
        features=features,
        num_probes=num_probes,
        units=(11.0, 4.0 / math.sqrt(n)),
    )


def ackley_function(z: jax.Array) -> jax.Array:
    """-20 exp(-|z| / (5 √n)) - exp(mean cos 2πz) + 20 + e, with slope 0 at its minimum, 0 at z = 0."""
    square = jnp.mean(z**2)
    away = square > 0.0
    radius = jnp.where(away, jnp.sqrt(jnp.where(away, square, 1.0)), 0.0)
    ripple = jnp.exp(jnp.mean(jnp.cos(2.0 * jnp.pi * z)))
    return -20.0 * jnp.expm1(-0.2 * radius) + math.e - ripple
