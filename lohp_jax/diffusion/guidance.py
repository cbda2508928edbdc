"""Guidance: what a denoiser sees of a problem besides z, and what that costs in gradients.

Everything is said in the coordinates of a frame, x = centre + scale y, where solutions have about unit
size. With y ~ N(0, I) before z is seen, y is N(α z, σ² I) after. So by default the raw gradient is that
at α z, and the smoothed gradient E_d ∇f(α z + σ d), d ~ N(0, I), is the mean gradient over all that z
leaves open. Around z / α, the other choice, points leave the frame by orders of magnitude at low λ.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from lohp_jax.checks import check_option
from lohp_jax.diffusion.sampler import num_evaluations
from lohp_jax.diffusion.schedule import alpha_sigma
from lohp_jax.networks.denoiser import Condition
from lohp_jax.types import PyTree

PARTS = ("parameters", "gradient", "smoothed_gradient")
GRADIENTS = PARTS[1:]
COMBINATIONS = ("fixed", "wiener", "learned")
AROUND = ("mean", "scaled")
SMALL = 1e-8  # gradients of this size count as zero
LARGEST_LOG_SNR = 10.0  # of a gradient


@dataclasses.dataclass(frozen=True)
class GuidanceConfig:
    """What a denoiser is trained to see."""

    parts: tuple[str, ...] = ("parameters",)
    """Among "parameters" (of the problem), "gradient" (of the objective) and "smoothed_gradient"."""
    dropout: tuple[float, ...] = (0.1,)
    """How often each part is left out in training; one number for all, or one for each."""
    combination: Literal["fixed", "wiener", "learned"] = "fixed"
    """Weights of the gradients: "fixed" 1, "wiener" SNR / (1 + SNR), or "learned" from λ and SNR."""
    probes: int = 4
    """K, antithetic pairs of probes of the smoothed gradient and of its SNR: 2 K gradients."""
    around: Literal["mean", "scaled"] = "mean"
    """Where gradients are taken: "mean", the mean of a solution given z, or "scaled", z over alpha."""

    def __post_init__(self):
        for part in self.parts:
            check_option("GuidanceConfig", "parts", part, PARTS)
        if len(set(self.parts)) < len(self.parts):
            raise ValueError(f"parts must name each part once, got {self.parts}.")
        check_option("GuidanceConfig", "combination", self.combination, COMBINATIONS)
        check_option("GuidanceConfig", "around", self.around, AROUND)
        if len(self.dropout) not in (1, len(self.parts)):
            raise ValueError(
                f"dropout must have 1 number or one for each of {self.parts}, got {self.dropout}."
            )
        if not all(0 <= rate < 1 for rate in self.dropout):
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}.")
        if self.probes < 2:
            raise ValueError(f"probes must be at least 2, to tell their noise, got {self.probes}.")


class Gradients(NamedTuple):
    """Those gradients at one z that were asked for, in the frame's coordinates.

    Attributes:
      values: part -> `[n]`.
      log_snr: part -> scalar log SNR, at most 10 in size; empty without SNRs.
    """

    values: dict[str, jax.Array]
    log_snr: dict[str, jax.Array]


def gradients_at(
    objective: Callable[[jax.Array], jax.Array],
    z: jax.Array,
    log_snr: jax.Array,
    key: jax.Array,
    *,
    parts: tuple[str, ...],
    probes: int,
    around: Literal["mean", "scaled"] = "mean",
    with_snr: bool = True,
) -> Gradients:
    """Raw and smoothed gradient, and how far each can be trusted.

    The smoothed gradient is the mean m of K antithetic pairs, exact for a quadratic. The variance V of
    the pairs and the variance V_1 of single probes (traces of covariances) give

        SNR of the smoothed gradient = max(|m|² - V / K, 0) / (V / K),
        SNR of the raw gradient      = max(|m|² - V / K, 0) / V_1.

    The subtraction makes |m|², which noise alone lifts to V / K, an unbiased estimate, and turns the
    gate SNR / (1 + SNR) into the positive-part estimate 1 - V / (K |m|²) of James and Stein.

    Args:
      objective: in the frame's coordinates.
      z: `[n]`.
      log_snr: λ.
      key: of the probes.
      parts: those of `GRADIENTS` to take.
      probes: K >= 2.
      around: α z or z / α; probes are σ away from it.
      with_snr: whether SNRs are needed; without them "gradient" costs 1 gradient and no probes.
    """
    alpha, sigma = alpha_sigma(log_snr)
    gradient = jax.grad(lambda y: jnp.sum(objective(y)))

    def finite(y):
        return jnp.nan_to_num(gradient(y), posinf=0.0, neginf=0.0)

    here = jax.lax.stop_gradient(alpha * z if around == "mean" else z / alpha)
    values, snr = {}, {}
    if "gradient" in parts:
        values["gradient"] = finite(here)
    if "smoothed_gradient" in parts or (with_snr and parts):
        steps = sigma * jax.random.normal(key, (probes, *z.shape), z.dtype)
        ahead, behind = (jax.vmap(finite)(here[None] + d) for d in (steps, -steps))
        pairs = (ahead + behind) / 2
        mean, noise = pairs.mean(axis=0), _trace_of_variance(pairs) / probes
        single = _trace_of_variance(jnp.concatenate([ahead, behind]))
        signal = jnp.maximum(jnp.sum(mean**2) - noise, 0.0)
        if "smoothed_gradient" in parts:
            values["smoothed_gradient"] = mean
        snr = {part: _ratio(signal, single if part == "gradient" else noise) for part in parts}
    bound = LARGEST_LOG_SNR
    clipped = {
        part: jnp.clip(jnp.log(jnp.nan_to_num(ratio)), -bound, bound) for part, ratio in snr.items()
    }
    return Gradients(values, clipped)


def _ratio(signal: jax.Array, noise: jax.Array) -> jax.Array:
    """Signal / noise, both >= 0; 0 / 0 is 0."""
    some = noise > 0.0
    return jnp.where(
        some, signal / jnp.where(some, noise, 1.0), jnp.where(signal > 0.0, jnp.inf, 0.0)
    )


def _trace_of_variance(samples: jax.Array) -> jax.Array:
    """`[K, n]` -> trace of their covariance, unbiased."""
    return jnp.sum(jnp.var(samples, axis=0, ddof=1))


def gate_start(config: GuidanceConfig) -> dict[str, jax.Array]:
    """Parameters of the learned gates: one logistic curve for each gradient, at first Wiener's."""
    if config.combination != "learned":
        return {}
    wiener = jnp.zeros(6).at[1].set(1.0)
    return {part: wiener for part in GRADIENTS if part in config.parts}


def gate(params: jax.Array, log_snr: jax.Array, gradient_log_snr: jax.Array) -> jax.Array:
    """Learned weight of a gradient: the sigmoid of 10 times a quadratic in λ and log SNR, both over 10.

    Coefficients of about 1 suit the learning rate of a network: Adam moves each by little more than the
    sum of the rates, about 1 in a training, which is no change beside a coefficient of 10.
    """
    a, b = log_snr / 10.0, gradient_log_snr / LARGEST_LOG_SNR
    terms = jnp.stack([jnp.ones_like(a), b, a, a * b, a * a, b * b])
    return jax.nn.sigmoid(LARGEST_LOG_SNR * (params @ terms))


def resolve_weights(
    config: GuidanceConfig, weights: Mapping[str, float | str] | None
) -> dict[str, float | str]:
    """A weight for each part: a number, "wiener" or "learned".

    Args:
      config: of the training.
      weights: what to use in place of the trained combination, part by part; a number is a fixed
        weight and 0 leaves a part out, at no cost. A denoiser trained with SNRs is shown those of every
        gradient that is left, so that they take probes at any weight.

    Raises: ValueError for a part that was not trained (with the nearest), or a weight that is no finite
      number, "wiener" or, if gates were trained, "learned".
    """
    trained = 1.0 if config.combination == "fixed" else config.combination
    resolved = {part: 1.0 if part == "parameters" else trained for part in config.parts}
    for part, weight in (weights or {}).items():
        check_option("sample", "guidance", part, config.parts)
        adaptive = part in GRADIENTS and (
            weight == "wiener" or (weight == "learned" and config.combination == "learned")
        )
        number = isinstance(weight, numbers.Real) and math.isfinite(weight)
        if not (adaptive or number):
            raise ValueError(
                f"guidance: the weight of {part!r} must be a finite number, or for gradients 'wiener', "
                f"or 'learned' where gates were trained; got {weight!r}."
            )
        resolved[part] = float(weight) if number else weight
    return resolved


def gradient_calls(
    config: GuidanceConfig,
    num_steps: int,
    num_samples: int = 1,
    *,
    sampler: str = "ddim",
    weights: Mapping[str, float | str] | None = None,
) -> int:
    """Gradients of the objective that sampling one instance takes.

    Args:
      config: of the training.
      num_steps: of the sampler.
      num_samples: of the sampler.
      sampler: its name; "heun" evaluates nearly twice in a step.
      weights: as in `resolve_weights`.
    """
    on = {p: w for p, w in resolve_weights(config, weights).items() if p in GRADIENTS and w != 0}
    calls = int("gradient" in on)
    calls += 2 * config.probes * ("smoothed_gradient" in on or _needs_snr(config, on))
    return calls * num_evaluations(sampler, num_steps) * num_samples


def _shows_snr(config: GuidanceConfig) -> bool:
    """Whether the denoiser sees SNRs, in sampling as in training, whatever the weights are."""
    return config.combination != "fixed"


def _needs_snr(config: GuidanceConfig, on: Mapping[str, float | str]) -> bool:
    """Whether those gradients that are on take probes for their SNR."""
    return bool(on) and (_shows_snr(config) or any(isinstance(w, str) for w in on.values()))


def observe(
    config: GuidanceConfig,
    gates: Mapping[str, jax.Array],
    objective: Callable[[jax.Array], jax.Array],
    features: jax.Array,
    prepared: PyTree,
    z: jax.Array,
    log_snr: jax.Array,
    previous: jax.Array | None,
    key: jax.Array,
    *,
    weights: Mapping[str, float | str],
    keep: Mapping[str, jax.Array] | None = None,
) -> Condition:
    """What the denoiser sees at z.

    A gradient g enters as g / (|g| / sqrt(n)), times its weight, beside log(|g| / sqrt(n)): whatever
    the units of the objective are, the direction has unit entries.

    Args:
      config: of the training.
      gates: of `gate_start`, trained.
      objective: in the frame's coordinates.
      features: `[F]`.
      prepared: what the network's `prepare` made of the problem.
      z: `[n]`.
      log_snr: λ.
      previous: `[n]`, the x_0 of the step before; None if the denoiser is not fed with it.
      key: of the probes.
      weights: of `resolve_weights`.
      keep: part -> 0 to drop it or 1, in training; None keeps all.
    """
    keep = dict.fromkeys(config.parts, 1.0) if keep is None else keep
    on = {part: w for part, w in weights.items() if part in GRADIENTS and w != 0}
    options = {"probes": config.probes, "around": config.around, "with_snr": _needs_snr(config, on)}
    gradients = gradients_at(objective, z, log_snr, key, parts=tuple(on), **options)
    vectors, scalars = [] if previous is None else [previous], []
    for part in (part for part in GRADIENTS if part in config.parts):
        trust = gradients.log_snr.get(part, jnp.zeros(()))
        weight = jnp.float32(0.0)
        if part in on:
            weight = _weight(on[part], gates.get(part), log_snr, trust) * keep[part]
        vector = gradients.values.get(part, jnp.zeros_like(z))
        size = jnp.sqrt(jnp.mean(vector**2) + SMALL**2)
        vectors.append(weight * vector / size)
        scalars += [weight, weight * jnp.log(size) / 5.0]
        scalars.append((weight if _shows_snr(config) else 0.0) * trust / LARGEST_LOG_SNR)
    known = jnp.float32(weights.get("parameters", 0.0)) * keep.get("parameters", 0.0)
    empty = jnp.zeros((len(z), 0))
    return Condition(
        prepared,
        known,
        known * features,
        jnp.stack(vectors, axis=-1) if vectors else empty,
        jnp.stack([known, *(jnp.asarray(s, jnp.float32) for s in scalars)]),
    )


def _weight(kind, params, log_snr, gradient_log_snr) -> jax.Array:
    """The weight of a gradient; Wiener's SNR / (1 + SNR) is the sigmoid of log SNR."""
    if kind == "wiener":
        return jax.nn.sigmoid(gradient_log_snr)
    return gate(params, log_snr, gradient_log_snr) if kind == "learned" else jnp.float32(kind)
