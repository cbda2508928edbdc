"""Samplers: from noise to x_0 along a static grid of noise levels, each one `lax.scan`.

Every sampler is a table with one row for each evaluation of the denoiser, and a rule that takes z to
where the next evaluation is. The last evaluation's x_0 is the sample: the step to λ = ∞ is exact.
"""

import functools
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lohp_jax.checks import check_num_steps, check_option
from lohp_jax.diffusion.schedule import (
    Prediction,
    Schedule,
    alpha_sigma,
    to_x0,
)
from lohp_jax.types import PyTree


def _context_itself(params, context, guidance):
    del params, guidance
    return lambda z, log_snr, previous, key: context


class Denoiser(NamedTuple):
    """A denoiser as samplers see it; pure functions of one instance.

    Attributes:
      apply: `(params, z [n], log_snr, condition) -> [n]`, the prediction.
      size: `(context) -> n`.
      prediction: what it predicts.
      observe: `(params, context, guidance) -> (z, log_snr, previous, key) -> condition`, what it sees of
        the problem; the first call does once what all steps share. `previous [n]` is the x_0 of the
        evaluation before, zeros at first. By default the condition is the context.
    """

    apply: Callable[..., jax.Array]
    size: Callable[[PyTree], int]
    prediction: Prediction = "x0"
    observe: Callable[..., Callable[..., PyTree]] = _context_itself


class Path(NamedTuple):
    """What a sampler passes on its way, with a leading axis of evaluations.

    Attributes:
      z: `[evaluations, n]`.
      x0: `[evaluations, n]`, the denoiser's x_0 there; the last one is the sample.
      log_snr: `[evaluations]`.
    """

    z: jax.Array
    x0: jax.Array
    log_snr: jax.Array


SAMPLERS = ("ddim", "ancestral", "dpmpp_2m", "heun")


def sample(
    denoiser: Denoiser,
    params: PyTree,
    context: PyTree,
    key: jax.Array,
    *,
    schedule: Schedule,
    sampler: str = "ddim",
    num_steps: int = 10,
    num_samples: int = 1,
    guidance: Mapping[str, Any] | None = None,
    eta: float | jax.Array = 0.0,
    temperature: float | jax.Array = 1.0,
    return_path: bool = False,
) -> jax.Array | tuple[jax.Array, Path]:
    """Samples of one instance; `jax.vmap` over contexts and keys serves many.

    Compiled once per shape of the context and setting of the static arguments (all but `eta` and
    `temperature`).

    Args:
      denoiser: see `Denoiser`.
      params: of the denoiser.
      context: of the instance.
      key: randomness of the samples.
      schedule: of the noise; the levels are even in its time.
      sampler: "ddim" (Song et al., 2021), "ancestral" (DDPM's; DDIM with η = 1), "dpmpp_2m"
        (DPM-Solver++(2M), Lu et al., 2022) or "heun" (after Karras et al., 2022), which evaluates the
        denoiser 2 `num_steps` - 1 times, the others `num_steps` times.
      num_steps: noise levels.
      num_samples: independent samples.
      guidance: handed to `denoiser.observe`; None leaves it as trained.
      eta: of "ddim": share of fresh noise, 0 for none.
      temperature: factor of all noise; 0 starts at z = 0, so that all samples agree.
      return_path: whether to return the path too.

    Returns: `[num_samples, n]`, in the denoiser's coordinates; with it, if asked for, a `Path` whose
      leaves have that leading axis.

    Raises: ValueError for an unknown sampler (with the nearest), or `num_steps` or `num_samples` that
      is no positive whole number.
    """
    check_option("sample", "sampler", sampler, SAMPLERS)
    check_num_steps("sample", num_steps)
    if not isinstance(num_samples, numbers.Integral) or num_samples < 1:
        raise ValueError(
            f"sample: num_samples must be a positive whole number, got {num_samples!r}."
        )
    guidance = None if guidance is None else tuple(sorted(dict(guidance).items()))
    noise = jnp.asarray(eta, float), jnp.asarray(temperature, float)
    static = (schedule, sampler, num_steps, num_samples, guidance)
    path = _sample(denoiser, params, context, key, *noise, *static)
    return (path.x0[:, -1], path) if return_path else path.x0[:, -1]


def num_evaluations(sampler: str, num_steps: int) -> int:
    """How often a sampler evaluates the denoiser for one sample."""
    return 2 * num_steps - 1 if sampler == "heun" else num_steps


@functools.partial(jax.jit, static_argnums=(0, 6, 7, 8, 9, 10))
def _sample(
    denoiser,
    params,
    context,
    key,
    eta,
    temperature,
    schedule,
    sampler,
    num_steps,
    num_samples,
    guidance,
):
    # the level after the last is never evaluated: x_0 is exact there
    times = jnp.linspace(1.0, 0.0, num_steps + 1)[:-1]
    levels = jnp.append(schedule.log_snr(times), jnp.inf)
    if sampler == "ancestral":
        eta = jnp.ones_like(eta)
    rows, advance = _RULES[sampler](levels, eta)
    count = num_evaluations(sampler, num_steps)
    guidance = None if guidance is None else dict(guidance)
    observe = denoiser.observe(params, context, guidance)

    def one(key):
        start_key, observe_key, noise_key = jax.random.split(key, 3)
        z = temperature * jax.random.normal(start_key, (denoiser.size(context),))
        noises = temperature * jax.random.normal(noise_key, (count, *z.shape))
        keys = jax.random.split(observe_key, count)

        def body(carry, inputs):
            z, previous, memory = carry
            row, noise, key = inputs
            condition = observe(z, row["level"], previous, key)
            prediction = denoiser.apply(params, z, row["level"], condition)
            x0 = to_x0(denoiser.prediction, prediction, z, row["level"])
            reached, memory = advance(row, z, x0, memory, noise)
            return (reached, x0, memory), Path(z, x0, row["level"])

        zero = jnp.zeros_like(z)
        return jax.lax.scan(body, (z, zero, (zero, zero)), (rows, noises, keys))[1]

    return jax.vmap(one)(jax.random.split(key, num_samples))


def ddim_rule(levels: jax.Array, eta: jax.Array):
    """Takes z to α' x_0 + σ' (sqrt(1 - η² c) ε + η sqrt(c) noise), c = 1 - exp(λ - λ')."""
    alpha, sigma = alpha_sigma(levels)
    fresh = eta * jnp.sqrt(-jnp.expm1(levels[:-1] - levels[1:]))
    rows = {
        "level": levels[:-1],
        "alpha": alpha[:-1],
        "sigma": sigma[:-1],
        "next_alpha": alpha[1:],
        "kept": sigma[1:] * jnp.sqrt(jnp.maximum(1.0 - fresh**2, 0.0)),
        "fresh": sigma[1:] * fresh,
    }

    def advance(row, z, x0, memory, noise):
        eps = (z - row["alpha"] * x0) / row["sigma"]
        return row["next_alpha"] * x0 + row["kept"] * eps + row["fresh"] * noise, memory

    return rows, advance


def _dpmpp_2m(levels: jax.Array, eta: jax.Array):
    """Takes z to (σ'/σ) z + α' (1 - exp(-h)) D, where h = (λ' - λ) / 2.

    D = x_0 + (h / 2h_before) (x_0 - x_0 before) extrapolates to the middle of the step; the first step
    and the last, to λ = ∞, have D = x_0.
    """
    del eta
    alpha, sigma = alpha_sigma(levels)
    h = jnp.diff(levels) / 2
    extrapolation = jnp.zeros_like(h).at[1:-1].set(h[1:-1] / (2 * h[:-2]))
    rows = {
        "level": levels[:-1],
        "kept": sigma[1:] / sigma[:-1],
        "gain": -alpha[1:] * jnp.expm1(-h),
        "extrapolation": extrapolation,
    }

    def advance(row, z, x0, memory, noise):
        del noise
        before, _ = memory
        direction = x0 + row["extrapolation"] * (x0 - before)
        return row["kept"] * z + row["gain"] * direction, (x0, before)

    return rows, advance


def _heun(levels: jax.Array, eta: jax.Array):
    """Heun's method for dy/ds = (y - x_0) / s with y = z / α, s = σ / α, exact for an x_0 linear in s.

    Evaluations alternate between the start of a step and its end, as it is guessed with the x_0 of the
    start; the last step, to s = 0, has y = x_0. The memory is y and x_0 at the start. The trapezoid of
    Karras et al. agrees with it to second order, but multiplies the change of x_0 by (s / s' - 1) / 2,
    which is large in the first steps from almost pure noise; here both x_0 have weights in [0, 1].
    """
    del eta
    alpha, sigma = alpha_sigma(levels)
    s = sigma / alpha
    at = jnp.arange(2 * len(levels) - 3)  # the evaluations
    begun, end = at // 2, (at + 1) // 2  # the step's first level, and the level of the evaluation
    kept = s[begun + 1] / s[begun]
    rows = {
        "level": levels[end],
        "alpha": alpha[end],
        "kept": kept,
        "share": jnp.where(at % 2 == 1, _share_of_the_start(kept), 1.0),
        "next_alpha": alpha[begun + 1],
        "corrects": at % 2 == 1,
    }

    def advance(row, z, x0, memory, noise):
        del noise
        start = jnp.where(row["corrects"], memory[0], z / row["alpha"])
        first = jnp.where(row["corrects"], memory[1], x0)
        towards = row["share"] * first + (1.0 - row["share"]) * x0
        reached = row["kept"] * start + (1.0 - row["kept"]) * towards
        return row["next_alpha"] * reached, (start, first)

    return rows, advance


def _share_of_the_start(kept: jax.Array) -> jax.Array:
    """Weight of x_0 at s, beside that at s' = kept s, in the integral of x_0 / s^2 between them.

    It is (r log r / (r - 1) - 1) / (r - 1) with r = s / s': a half for short steps, 0 for the last.
    """
    excess = 1.0 / jnp.where(kept > 0, kept, 0.5) - 1.0
    small = excess < 0.01
    safe = jnp.where(small, 1.0, excess)
    share = ((1.0 + safe) * jnp.log1p(safe) / safe - 1.0) / safe
    return jnp.where(kept > 0, jnp.where(small, 0.5 - excess / 6 + excess**2 / 12, share), 0.0)


_RULES = {"ddim": ddim_rule, "ancestral": ddim_rule, "dpmpp_2m": _dpmpp_2m, "heun": _heun}
