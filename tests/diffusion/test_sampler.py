"""Samplers against mixtures of Gaussians, whose denoiser has a closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from lohp_jax.diffusion.sampler import SAMPLERS, Denoiser, num_evaluations, sample
from lohp_jax.diffusion.schedule import Schedule, alpha_sigma, from_x0

WEIGHTS, MEANS, VARIANCES = np.array([0.3, 0.7]), np.array([-1.0, 0.8]), np.array([0.05, 0.1])
MIXTURE = {"weights": WEIGHTS, "means": MEANS, "variances": VARIANCES}
SCHEDULE = Schedule()


def mixture_x0(xp, z, alpha, sigma, mixture):
    """E[x_0 | z] coordinate by coordinate, by Bayes' rule; `xp` is numpy or jax.numpy."""
    means, variances = mixture["means"][None], mixture["variances"][None]
    spread = alpha**2 * variances + sigma**2
    gap = z[:, None] - alpha * means
    log_density = xp.log(mixture["weights"][None]) - gap**2 / (2 * spread) - xp.log(spread) / 2
    density = xp.exp(log_density - log_density.max(axis=1, keepdims=True))
    share = density / density.sum(axis=1, keepdims=True)
    return (share * (means + alpha * variances * gap / spread)).sum(axis=1)


@functools.cache
def mixture_denoiser(prediction="x0", size=1):
    def apply(params, z, log_snr, context):
        x0 = mixture_x0(jnp, z, *alpha_sigma(log_snr), context)
        return from_x0(prediction, x0, z, log_snr)

    return Denoiser(apply, lambda context: size, prediction)


def draw(key=0, prediction="x0", size=1, context=MIXTURE, **options):
    options = {"schedule": SCHEDULE, **options}
    return sample(mixture_denoiser(prediction, size), (), context, jax.random.key(key), **options)


def mixture_quantiles(count):
    """Evenly spaced quantiles of the mixture, from its distribution function on a grid."""
    grid = np.linspace(-3, 3, 20_001)
    cdf = (WEIGHTS * scipy.stats.norm.cdf(grid[:, None], MEANS, np.sqrt(VARIANCES))).sum(axis=1)
    return np.interp((np.arange(count) + 0.5) / count, cdf, grid)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("low", [-10.0, -24.0])
def test_few_steps_from_almost_pure_noise_do_not_overshoot(sampler, num_steps, low):
    """Of N(1, .5^2) every sampler that sees its exact denoiser makes no wider a distribution."""
    one = {"weights": np.ones(1), "means": np.ones(1), "variances": np.full(1, 0.25)}
    schedule = Schedule(log_snr_min=low)
    options = {"sampler": sampler, "num_steps": num_steps, "num_samples": 2000}
    x = draw(context=one, schedule=schedule, **options)[:, 0]
    assert abs(float(x.mean()) - 1.0) < 0.05
    assert float(x.std()) < 0.52


@pytest.mark.parametrize("sampler, eta", [*((s, 0.0) for s in SAMPLERS), ("ddim", 0.5)])
def test_samples_follow_the_mixture(sampler, eta):
    """As many exact samples are about 0.015 from the quantiles; fresh noise converges more slowly."""
    num_steps = 200 if eta or sampler == "ancestral" else 50
    x = draw(sampler=sampler, eta=eta, num_steps=num_steps, num_samples=3000)[:, 0]
    exact = mixture_quantiles(len(x))
    assert np.abs(np.sort(x) - exact).mean() < 0.05
    np.testing.assert_allclose(x.mean(), exact.mean(), atol=0.05)
    np.testing.assert_allclose(x.std(), exact.std(), atol=0.03)
    np.testing.assert_allclose((x < -0.2).mean(), WEIGHTS[0], atol=0.04)


def flow(start, first, last):
    """z at the level `last` by the probability-flow ODE from z at `first`, in y = z / α, s = σ / α."""

    def slope(s, y):
        alpha = (1 + s**2) ** -0.5
        return (y - mixture_x0(np, alpha * y, alpha, s * alpha, MIXTURE)) / s

    span = np.exp(-np.float64([first, last]) / 2)
    start = start * np.sqrt(1 + span[0] ** 2)
    solution = scipy.integrate.solve_ivp(slope, span, start, "DOP853", rtol=1e-11, atol=1e-11)
    return solution.y[:, -1] / np.sqrt(1 + span[1] ** 2)


@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("dpmpp_2m", 2), ("heun", 2)])
def test_order_of_convergence(sampler, order):
    """Slope of the error half-way against the exact flow from the same noise; in float64.

    The level after the last is infinite and the ends of the time are steep: they hide the order.
    """
    schedule, errors, counts = Schedule(log_snr_min=-4.0), [], (32, 64, 128)
    with jax.enable_x64(True):
        for num_steps in counts:
            options = {"schedule": schedule, "num_steps": num_steps, "return_path": True}
            _, path = draw(size=32, sampler=sampler, **options)
            half = num_steps // 2 if sampler != "heun" else num_steps
            assert path.z.dtype == np.float64
            exact = flow(path.z[0, 0], path.log_snr[0, 0], path.log_snr[0, half])
            errors.append(np.abs(path.z[0, half] - exact).mean())
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    np.testing.assert_allclose(slope, order, atol=0.2)
    assert errors[-1] < {1: 5e-3, 2: 5e-4}[order]


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_what_is_predicted_does_not_matter(prediction):
    x = draw(prediction=prediction, num_samples=4)
    np.testing.assert_allclose(x, draw(num_samples=4), atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_denoiser_that_knows_x0_is_followed_exactly(sampler):
    """The last step is exact, and every level before it is a mixture of x_0 and the noise."""
    known = jnp.float32([1.25, -3.5])
    denoiser = Denoiser(lambda params, z, log_snr, context: context, lambda context: 2)
    x, path = sample(
        denoiser,
        (),
        known,
        jax.random.key(0),
        schedule=SCHEDULE,
        sampler=sampler,
        num_steps=5,
        num_samples=3,
        return_path=True,
    )
    np.testing.assert_array_equal(x, np.tile(known, (3, 1)))
    evaluations = num_evaluations(sampler, 5)
    assert path.z.shape == path.x0.shape == (3, evaluations, 2)
    assert path.log_snr.shape == (3, evaluations)
    if sampler != "ancestral":  # the noise of the start is kept
        alpha, sigma = (v[:, :, None] for v in alpha_sigma(path.log_snr))
        noise = (path.z - alpha * known[None, None]) / sigma
        np.testing.assert_allclose(noise, np.tile(noise[:, :1], (1, evaluations, 1)), atol=2e-3)


def test_one_step_is_the_denoiser_at_pure_noise():
    x, path = draw(num_steps=1, return_path=True)
    alpha, sigma = alpha_sigma(SCHEDULE.log_snr_min)
    np.testing.assert_allclose(x[0], mixture_x0(np, path.z[0, 0], alpha, sigma, MIXTURE), rtol=1e-5)


def test_eta_one_is_ancestral_and_temperature_zero_has_no_noise():
    options = {"num_samples": 3, "num_steps": 4}
    ancestral = draw(sampler="ancestral", **options)
    np.testing.assert_allclose(draw(eta=1.0, **options), ancestral, rtol=1e-5)
    assert np.abs(draw(**options) - ancestral).max() > 0.01
    cold = draw(sampler="ancestral", temperature=0.0, **options)
    np.testing.assert_array_equal(cold, np.tile(cold[:1], (3, 1)))
    assert np.ptp(ancestral) > 0.1


def test_vmap_over_instances_equals_a_loop_and_compiles_once():
    traces = []

    def apply(params, z, log_snr, context):
        traces.append(z.shape)
        return params * z + context

    denoiser = Denoiser(apply, lambda context: 2)
    one = functools.partial(
        sample, denoiser, jnp.float32(0.5), schedule=SCHEDULE, num_steps=3, num_samples=2
    )
    contexts = jnp.arange(8.0).reshape(4, 2)
    keys = jax.random.split(jax.random.key(1), 4)
    looped = [one(context, key) for context, key in zip(contexts, keys, strict=True)]
    together = jax.jit(jax.vmap(one))
    for shift in range(3):
        batch = together(contexts + shift, keys)
    assert len(traces) == 1  # the loop and the batch share it
    assert together._cache_size() == 1
    np.testing.assert_allclose(together(contexts, keys), np.stack(looped), rtol=1e-5)
    assert batch.shape == (4, 2, 2)


def test_observations_see_the_last_x0_and_the_guidance():
    """`observe` is called with what the scan is at, and its result is what `apply` gets."""

    def observe(params, context, guidance):
        scale = context * guidance["gradient"]
        return lambda z, log_snr, previous, key: previous + scale

    def apply(params, z, log_snr, condition):
        return condition

    denoiser = Denoiser(apply, lambda context: 1, "x0", observe)
    x = sample(
        denoiser,
        (),
        jnp.ones(1),
        jax.random.key(0),
        schedule=SCHEDULE,
        num_steps=4,
        guidance={"gradient": 0.5},
    )
    np.testing.assert_allclose(x, [[4 * 0.5]])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sampler": "dpm2m"}, r"sampler must be one of .*'dpm2m'; did you mean 'dpmpp_2m'\?"),
        ({"num_steps": 0}, "num_steps must be a positive whole number, got 0"),
        ({"num_steps": 2.5}, r"num_steps must be a positive whole number, got 2\.5"),
        ({"num_samples": -1}, "num_samples must be a positive whole number, got -1"),
        ({"num_samples": 2.0}, r"num_samples must be a positive whole number, got 2\.0"),
    ],
)
def test_bad_arguments_are_named_at_once(options, message):
    with pytest.raises(ValueError, match=f"sample: {message}"):
        draw(**options)
