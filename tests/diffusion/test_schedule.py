"""λ against its definitions in float64, and the conversions between what a denoiser may predict."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.diffusion.schedule import (
    PREDICTIONS,
    Schedule,
    alpha_sigma,
    from_x0,
    to_x0,
)

KINDS = ("cosine", "linear")


def log_snr_oracle(kind, time):
    """λ at the schedule's own time in (0, 1), whose range is not cut."""
    if kind == "cosine":
        return -2 * np.log(np.tan(np.pi * time / 2))
    beta = 0.1 + (20 - 0.1) * np.linspace(0, time, 100_001)
    alpha_squared = np.exp(-np.trapezoid(beta, np.linspace(0, time, 100_001)))
    return np.log(alpha_squared) - np.log1p(-alpha_squared)


@pytest.mark.parametrize("kind", KINDS)
def test_log_snr_equals_its_definition_on_its_range(kind):
    """Time is linear in t: the ends are where λ leaves the range, found by bisection."""
    ends = []
    for bound in (6.0, -5.0):
        low, high = 1e-9, 1 - 1e-9
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if log_snr_oracle(kind, middle) > bound else (low, middle)
        ends.append(low)
    t = np.linspace(0, 1, 11)
    expected = [log_snr_oracle(kind, ends[0] + (ends[1] - ends[0]) * x) for x in t]
    np.testing.assert_allclose(Schedule(kind, -5.0, 6.0).log_snr(t), expected, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_log_snr_falls_from_end_to_end(kind):
    log_snr = np.asarray(Schedule(kind).log_snr(jnp.linspace(0, 1, 1001)))
    assert (np.diff(log_snr) < 0).all()
    np.testing.assert_allclose(log_snr[[0, -1]], [10, -10], atol=1e-3)
    assert np.abs(log_snr).max() <= 10


def test_alpha_and_sigma_keep_their_relative_precision():
    log_snr = np.linspace(-30, 30, 241)
    alpha, sigma = alpha_sigma(jnp.float32(log_snr))
    np.testing.assert_allclose(alpha, (1 + np.exp(-log_snr)) ** -0.5, rtol=1e-5)
    np.testing.assert_allclose(sigma, (1 + np.exp(log_snr)) ** -0.5, rtol=1e-5)
    assert alpha_sigma(jnp.inf) == (1, 0)


@hypothesis.settings(deadline=None)
@hypothesis.given(
    st.sampled_from(PREDICTIONS),
    st.floats(-10, 10, width=32),
    st.floats(-3, 3, width=32),
    st.floats(-3, 3, width=32),
)
def test_conversions_round_trip(kind, log_snr, x0, eps):
    """To 1e-6 of x_0 and z, apart from the divisions that the docstrings name: by α and by σ."""
    alpha, sigma = (1 + np.exp(-log_snr)) ** -0.5, (1 + np.exp(log_snr)) ** -0.5
    z = np.float32(alpha * x0 + sigma * eps)
    exact = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0}[kind]
    size = max(abs(x0), abs(z), abs(exact), 1e-3)
    prediction = from_x0(kind, jnp.float32(x0), z, jnp.float32(log_snr))
    back = to_x0(kind, prediction, z, jnp.float32(log_snr))
    to_x0_error, from_x0_error = {"x0": (1, 1), "eps": (1 / alpha, 1 / sigma), "v": (1, 1 / sigma)}[
        kind
    ]
    np.testing.assert_allclose(prediction, exact, rtol=0, atol=2e-6 * size * from_x0_error)
    np.testing.assert_allclose(back, x0, rtol=0, atol=1e-6 * size * to_x0_error)


def test_the_error_of_eps_at_low_signal_is_as_documented():
    """Float32 cannot do better: ε is rounded, and x_0 is what is left of z without it."""
    x0 = np.random.default_rng(0).uniform(-1, 1, 1000).astype(np.float32)
    alpha, sigma = alpha_sigma(jnp.float32(-10))
    z = alpha * x0 + sigma * np.float32(1.2345)
    errors = {
        kind: np.abs(to_x0(kind, from_x0(kind, x0, z, -10.0), z, -10.0) - x0).max()
        for kind in PREDICTIONS
    }
    assert errors["v"] < 1e-6 < errors["eps"] < 4e-5


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kind": "cosin"}, r"kind must be one of .*, got 'cosin'; did you mean 'cosine'\?"),
        ({"log_snr_min": 3.0, "log_snr_max": 3.0}, r"rising and within .* got 3\.0 and 3\.0"),
        ({"log_snr_max": 31.0}, r"got -10\.0 and 31\.0"),
        ({"log_snr_min": float("nan")}, r"got nan and 10\.0"),
    ],
)
def test_bad_schedules_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**arguments)
