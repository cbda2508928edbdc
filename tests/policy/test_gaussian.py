import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from lohp_jax.policy import gaussian

NUM_STEPS, DIMENSION = 5, 3


@pytest.fixture(autouse=True)
def _no_rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


def kernels(seed, dimension=7):
    """float32 arguments of `log_ratio`: two states, two means, two log stds."""
    rng = np.random.default_rng(seed)
    state, next_state, forward_mean, backward_mean = rng.normal(size=(4, dimension))
    forward_log_std, backward_log_std = rng.normal(-0.5, 0.5, size=(2, dimension))
    arguments = state, next_state, forward_mean, forward_log_std, backward_mean, backward_log_std
    return tuple(np.float32(a) for a in arguments)


def log_ratio_oracle(
    state, next_state, forward_mean, forward_log_std, backward_mean, backward_log_std
):
    forward = scipy.stats.norm.logpdf(
        np.float64(next_state), np.float64(forward_mean), np.exp(np.float64(forward_log_std))
    )
    backward = scipy.stats.norm.logpdf(
        np.float64(state), np.float64(backward_mean), np.exp(np.float64(backward_log_std))
    )
    return forward - backward


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_log_prob_is_the_density_of_a_gaussian(transform):
    x, _, mean, log_std, _, _ = kernels(0)
    expected = scipy.stats.norm.logpdf(np.float64(x), np.float64(mean), np.exp(np.float64(log_std)))
    actual = transform(gaussian.log_prob)(x, mean, log_std)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_log_ratio_is_the_difference_of_log_densities(transform):
    arguments = kernels(1)
    expected = log_ratio_oracle(*arguments)
    per_dimension = transform(gaussian.log_ratio_per_dimension)(*arguments)
    np.testing.assert_allclose(per_dimension, expected, rtol=1e-5, atol=1e-5)
    total = transform(gaussian.log_ratio)(*arguments)
    assert total.shape == () and total.dtype == jnp.float32
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-5, atol=1e-5)


def test_log_ratio_takes_a_scalar_log_std():
    state, next_state, forward_mean, _, backward_mean, _ = kernels(2)
    actual = gaussian.log_ratio(state, next_state, forward_mean, 0.3, backward_mean, -0.2)
    full = [np.full_like(state, value) for value in (0.3, -0.2)]
    expected = log_ratio_oracle(state, next_state, forward_mean, full[0], backward_mean, full[1])
    np.testing.assert_allclose(actual, expected.sum(), rtol=1e-5)


def test_log_ratio_rejects_states_of_another_shape():
    arguments = kernels(3)
    with pytest.raises(AssertionError):
        gaussian.log_ratio(arguments[0][:1], *arguments[1:])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_results_keep_the_dtype_of_the_input_under_x64(dtype):
    with jax.enable_x64(True):
        x, _, mean, log_std, _, _ = (dtype(a) for a in kernels(4))
        key = jax.random.key(0)
        assert gaussian.log_prob(x, mean, log_std).dtype == dtype
        assert gaussian.log_ratio(x, x, mean, log_std, mean, log_std).dtype == dtype
        assert gaussian.sample(key, mean, log_std).dtype == dtype
        assert gaussian.bounded_log_std(x, 0.0, 2.0).dtype == dtype
        assert gaussian.bridge_forward(x, mean, mean, log_std, log_std, 0.5)[0].dtype == dtype


def test_log_ratio_of_a_million_dimensions_is_precise_in_float32():
    rng = np.random.default_rng(0)
    shape = (10**6,)
    state = rng.normal(size=shape)
    next_state = state + 0.1 * rng.normal(size=shape)
    forward_mean, backward_mean = (x + 0.02 * rng.normal(size=shape) for x in (state, next_state))
    forward_log_std, backward_log_std = np.log(0.1) + 0.2 * rng.normal(size=(2, *shape))
    forward, backward = (forward_mean, forward_log_std), (backward_mean, backward_log_std)
    arguments = [np.float32(a) for a in (state, next_state, *forward, *backward)]
    exact = log_ratio_oracle(*arguments).sum()
    error = abs(jax.jit(gaussian.log_ratio)(*arguments) - exact)
    apart = jax.jit(
        lambda s, n, f, f_std, b, b_std: (
            gaussian.log_prob(n, f, f_std).sum() - gaussian.log_prob(s, b, b_std).sum()
        )
    )
    assert error < 1e-3
    assert abs(apart(*arguments) - exact) > 3 * error  # why the ratio is the primitive


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_samples_have_the_mean_and_the_scaled_std(temperature):
    mean, log_std = jnp.array([1.0, -2.0]), jnp.array([0.0, -1.0])
    keys = jax.random.split(jax.random.key(0), 20_000)
    draw = jax.vmap(gaussian.sample, in_axes=(0, None, None, None))
    samples = np.asarray(draw(keys, mean, log_std, temperature), np.float64)
    std = temperature * np.exp(np.asarray(log_std))
    standard_error = std / np.sqrt(len(keys))
    np.testing.assert_array_less(abs(samples.mean(0) - mean), 4 * standard_error)
    np.testing.assert_array_less(abs(samples.std(0) - std), 4 * standard_error)


def test_samples_of_temperature_zero_are_the_mean():
    mean, log_std = jnp.array([1.0, -2.0]), jnp.array([3.0, -1.0])
    draw = jax.jit(gaussian.sample)(jax.random.key(0), mean, log_std, 0.0)
    np.testing.assert_array_equal(draw, mean)


def test_bounded_log_std_has_unit_slope_a_floor_and_a_ceiling():
    base, log_range = -3.0, 2.0
    raw = jnp.array([-1e6, -5.0, 0.0, 5.0, 1e6])
    bounded = gaussian.bounded_log_std(raw, base, log_range)
    np.testing.assert_allclose(
        bounded, base + log_range * np.tanh(np.asarray(raw) / log_range), 1e-6
    )
    assert bounded.min() >= base - log_range and bounded.max() <= base + log_range
    assert jax.grad(gaussian.bounded_log_std)(0.0, base, log_range) == 1.0


@pytest.mark.parametrize("log_range", [0.0, -1.0, float("nan")])
def test_bounded_log_std_rejects_an_empty_range(log_range):
    with pytest.raises(ValueError, match="log_range must be > 0"):
        gaussian.bounded_log_std(jnp.zeros(2), 0.0, log_range)


def test_tube_std_is_annealed_geometrically():
    std = gaussian.tube_std(4, 2.0, 0.125)
    np.testing.assert_allclose(std, [2.0, 1.0, 0.5, 0.25, 0.125], rtol=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 1.0, 0.1), "num_steps must be >= 1"),
        ((3, 0.0, 0.1), "widths must be > 0"),
        ((3, 1.0, -0.1), "widths must be > 0"),
    ],
)
def test_tube_std_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        gaussian.tube_std(*arguments)


def test_bridges_are_the_conditionals_of_a_correlated_pair():
    rng = np.random.default_rng(0)
    state, next_state, center, next_center = rng.normal(size=(4, DIMENSION))
    std, next_std, rho = 0.7, 0.4, 0.6
    arguments = [jnp.float32(a) for a in (center, next_center, std, next_std)]
    mean, log_std = gaussian.bridge_backward(jnp.float32(next_state), *arguments, rho)
    next_mean, next_log_std = gaussian.bridge_forward(jnp.float32(state), *arguments, rho)
    covariance = rho * std * next_std
    np.testing.assert_allclose(
        mean, center + covariance / next_std**2 * (next_state - next_center), rtol=1e-5
    )
    np.testing.assert_allclose(np.exp(2 * log_std), std**2 - covariance**2 / next_std**2, rtol=1e-5)
    np.testing.assert_allclose(
        next_mean, next_center + covariance / std**2 * (state - center), rtol=1e-5
    )
    np.testing.assert_allclose(
        np.exp(2 * next_log_std), next_std**2 - covariance**2 / std**2, rtol=1e-5
    )


@pytest.mark.parametrize("bridge", [gaussian.bridge_backward, gaussian.bridge_forward])
@pytest.mark.parametrize("rho", [-0.1, 1.0, float("nan")])
def test_bridges_reject_a_correlation_outside_zero_to_one(bridge, rho):
    x = jnp.zeros(2)
    with pytest.raises(ValueError, match=rf"{bridge.__name__}: rho must be in \[0, 1\)"):
        bridge(x, x, x, 1.0, 1.0, rho)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.95])
def test_a_tube_is_in_detailed_balance_on_any_trajectory(rho):
    rng = np.random.default_rng(1)
    states, centers = (jnp.float32(3 * rng.normal(size=(NUM_STEPS + 1, DIMENSION))) for _ in "ab")
    std = gaussian.tube_std(NUM_STEPS, 1.0, 0.3)

    @jax.jit
    @jax.vmap
    def residual(state, next_state, center, next_center, tau, next_tau):
        tube = center, next_center, tau, next_tau, rho
        forward = gaussian.bridge_forward(state, *tube)
        backward = gaussian.bridge_backward(next_state, *tube)
        flow = gaussian.log_prob(state, center, jnp.log(tau))
        next_flow = gaussian.log_prob(next_state, next_center, jnp.log(next_tau))
        ratio = gaussian.log_ratio_per_dimension(state, next_state, *forward, *backward)
        return flow + ratio - next_flow

    residuals = residual(states[:-1], states[1:], centers[:-1], centers[1:], std[:-1], std[1:])
    np.testing.assert_allclose(residuals, 0.0, atol=2e-3 if rho > 0.9 else 2e-4)


def test_tube_log_coefficient_turns_the_reward_into_the_flow():
    std = gaussian.tube_std(NUM_STEPS, 1.0, 0.3)
    x, centers = (jnp.float32(np.random.default_rng(i).normal(size=NUM_STEPS + 1)) for i in (0, 1))
    log_coefficient = gaussian.tube_log_coefficient(std)
    log_reward = -((x - centers) ** 2) / (2 * std**2)
    offset = gaussian.log_prob(x, centers, jnp.log(std)) - log_coefficient - log_reward
    assert log_coefficient[-1] == 0.0
    np.testing.assert_allclose(offset, offset[-1], rtol=1e-5)
