"""Noise schedules by log signal-to-noise ratio, and the three things that a denoiser may predict.

Variance preserving: z = α x_0 + σ ε with α² + σ² = 1, so that λ = log α²/σ² says everything, α² is the
sigmoid of λ and σ² that of -λ (Kingma et al., 2021).
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from lohp_jax.checks import check_option

Prediction = Literal["x0", "eps", "v"]
"""What a denoiser predicts: x_0, the noise, or their mixture v (Salimans & Ho, 2022)."""
PREDICTIONS = ("x0", "eps", "v")
KINDS = ("cosine", "linear")
BETA_MIN, BETA_MAX = 0.1, 20.0  # of the VP-SDE (Song et al., 2021): DDPM's schedule for any T


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How λ falls with time t from 0, the data, to 1, noise."""

    kind: Literal["cosine", "linear"] = "cosine"
    """"cosine": λ = -2 log tan(π t / 2) (Nichol & Dhariwal, 2021); "linear": DDPM's, whose rate β grows
    linearly from 0.1 to 20, λ = -log(exp(∫β) - 1)."""
    log_snr_min: float = -10.0
    """λ at t = 1; the ends of the time of `kind` are cut off where λ would leave the range."""
    log_snr_max: float = 10.0
    """λ at t = 0."""

    def __post_init__(self):
        check_option("Schedule", "kind", self.kind, KINDS)
        if not -30 <= self.log_snr_min < self.log_snr_max <= 30:
            raise ValueError(
                "log_snr_min and log_snr_max must be rising and within [-30, 30], got "
                f"{self.log_snr_min} and {self.log_snr_max}."
            )

    def log_snr(self, t: jax.Array) -> jax.Array:
        """λ of times t in [0, 1], from `log_snr_max` down to `log_snr_min`, strictly decreasing."""
        first, last = (_time(self.kind, x) for x in (self.log_snr_max, self.log_snr_min))
        time = first + (last - first) * jnp.asarray(t, jnp.result_type(float))
        if self.kind == "cosine":
            log_snr = -2.0 * jnp.log(jnp.tan(time))
        else:
            integral = BETA_MIN * time + (BETA_MAX - BETA_MIN) / 2 * time**2
            log_snr = -jnp.log(jnp.expm1(integral))
        return jnp.clip(log_snr, self.log_snr_min, self.log_snr_max)


def _time(kind: str, log_snr: float) -> float:
    """When `kind` reaches λ: an angle for "cosine"."""
    if kind == "cosine":
        return math.atan(math.exp(-log_snr / 2))
    integral, slope = math.log1p(math.exp(-log_snr)), BETA_MAX - BETA_MIN
    return (math.sqrt(BETA_MIN**2 + 2 * slope * integral) - BETA_MIN) / slope


def alpha_sigma(log_snr: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(α, σ), both to full relative precision at any λ, also at ∞."""
    return jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))


def to_x0(kind: Prediction, prediction: jax.Array, z: jax.Array, log_snr: jax.Array) -> jax.Array:
    """x_0 as a prediction of ε or v at z implies it.

    From ε it is (z - σ ε) / α, whose rounding error is that of z divided by α: where λ is low, ε hardly
    tells x_0 in float32 (error about 2e-5 at λ = -10). From v it is α z - σ v, exact at any λ.
    """
    alpha, sigma = alpha_sigma(log_snr)
    if kind == "x0":
        return prediction
    return (z - sigma * prediction) / alpha if kind == "eps" else alpha * z - sigma * prediction


def from_x0(kind: Prediction, x0: jax.Array, z: jax.Array, log_snr: jax.Array) -> jax.Array:
    """What a denoiser of this kind should predict at z, so that `to_x0` gives x_0; v = α ε - σ x_0.

    ε = (z - α x_0) / σ and v = (α z - x_0) / σ: the rounding error of z is divided by σ, so that both
    are known to about 2e-5 only at λ = 10.
    """
    alpha, sigma = alpha_sigma(log_snr)
    if kind == "x0":
        return x0
    return (z - alpha * x0) / sigma if kind == "eps" else (alpha * z - x0) / sigma
