import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.policy import balance, gaussian

ORACLE_PATH = pathlib.Path(__file__).parents[2].parent / "shared" / "oracles" / "balance.npz"
LAMBDAS = [0.5, 0.9, 1.0, 2.0]
KERNELS = ["fwd_mean", "fwd_logstd", "bwd_mean", "bwd_logstd"]
eager_and_jit = pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])


@pytest.fixture(autouse=True)
def _no_rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


# Definitions, as loops in float64.


def residual_oracle(log_ratio, log_flow):
    num_states = len(log_flow)
    residuals = np.zeros((num_states, num_states))
    for m, n in itertools.combinations(range(num_states), 2):
        residuals[m, n] = log_flow[m] + log_ratio[m:n].sum() - log_flow[n]
    return residuals


def loss_oracle(residuals, lambda_):
    num = den = 0.0
    for m, n in itertools.combinations(range(len(residuals)), 2):
        num += lambda_ ** (n - m) * residuals[m, n] ** 2
        den += lambda_ ** (n - m)
    return num / den


def lohp_oracle(log_ratio, states, offline, log_coefficient, variance, compression, reward):
    num_states = len(states)
    residuals = np.zeros((num_states, num_states))
    variance = np.broadcast_to(variance, (num_states,))

    def log_reward(n, state):
        return -((state - offline[compression * n]) ** 2).sum() / (2 * variance[n])

    for m, n in itertools.combinations(range(num_states), 2):
        start = log_reward(m if reward == "matched" else n, states[m])
        flow = log_coefficient[m] + start + log_ratio[m:n].sum()
        residuals[m, n] = flow - log_coefficient[n] - log_reward(n, states[n])
    return residuals


def trajectory(seed, num_steps):
    """float32 values, as float64 arrays: what the losses and the loops see is the same."""
    rng = np.random.default_rng(seed)
    return tuple(np.float64(np.float32(rng.normal(size=n))) for n in (num_steps, num_steps + 1))


def lohp_case(seed, num_steps=4, dimension=3, compression=2):
    rng = np.random.default_rng(seed)
    shapes = (
        (num_steps,),
        (num_steps + 1, dimension),
        (compression * num_steps + 1, dimension),
        (num_steps + 1,),
    )
    return tuple(np.float64(np.float32(rng.normal(size=shape))) for shape in shapes)


def float32(*arrays):
    return tuple(jnp.asarray(np.float32(a)) for a in arrays)


@eager_and_jit
@pytest.mark.parametrize("num_steps", [1, 2, 17])
def test_losses_equal_their_definitions(num_steps, transform):
    log_ratio, log_flow = trajectory(num_steps, num_steps)
    residuals = residual_oracle(log_ratio, log_flow)
    arguments = float32(log_ratio, log_flow)
    potential = transform(balance.potentials)(*arguments)
    np.testing.assert_allclose(
        np.triu(np.subtract.outer(potential, potential), 1), residuals, atol=1e-5
    )
    np.testing.assert_allclose(
        transform(balance.db_loss)(*arguments), np.mean(np.diag(residuals, 1) ** 2), rtol=1e-5
    )
    np.testing.assert_allclose(
        transform(balance.tb_loss)(*arguments), residuals[0, -1] ** 2, rtol=1e-5
    )
    for lambda_ in LAMBDAS:
        loss = transform(functools.partial(balance.subtb_loss, lambda_=lambda_))(*arguments)
        np.testing.assert_allclose(loss, loss_oracle(residuals, lambda_), rtol=1e-5)


@eager_and_jit
def test_log_variance_is_the_population_variance(transform):
    (log_weight, _) = trajectory(0, 9)
    expected = sum((w - sum(log_weight) / 9) ** 2 for w in log_weight) / 9
    (argument,) = float32(log_weight)
    np.testing.assert_allclose(transform(balance.log_variance_loss)(argument), expected, rtol=1e-5)
    shifted = balance.log_variance_loss(argument + 5.0)  # an unknown log Z
    np.testing.assert_allclose(shifted, expected, rtol=1e-4)


@eager_and_jit
@pytest.mark.parametrize("reward", ["matched", "end"])
@pytest.mark.parametrize(
    "variance", [0.5, np.array([1.0, 0.8, 0.6, 0.4, 0.3])], ids=["one", "each"]
)
def test_lohp_residuals_and_loss_equal_their_definition(variance, reward, transform):
    case = lohp_case(1)
    expected = lohp_oracle(*case, variance, 2, reward)
    residuals_fn = functools.partial(
        balance.lohp_residuals, variance=variance, compression=2, reward=reward
    )
    residuals = transform(residuals_fn)(*float32(*case))
    np.testing.assert_allclose(residuals, expected, rtol=1e-5, atol=1e-5)
    for lambda_ in LAMBDAS:
        loss = transform(functools.partial(balance.lohp_loss, lambda_=lambda_))(residuals)
        np.testing.assert_allclose(loss, loss_oracle(expected, lambda_), rtol=1e-5)


@eager_and_jit
def test_huber_residuals_are_squared_below_the_threshold_and_linear_beyond(transform):
    residuals = np.triu(np.random.default_rng(0).normal(0, 3, size=(5, 5)), k=1)
    delta, lambda_ = 2.0, 0.7
    assert 0 < (np.abs(residuals) > delta).sum() < (np.abs(residuals) > 0).sum()
    total = weights = 0.0
    for m in range(5):
        for n in range(m + 1, 5):
            size = abs(residuals[m, n])
            cost = size**2 if size < delta else delta * (2 * size - delta)
            total, weights = total + lambda_ ** (n - m) * cost, weights + lambda_ ** (n - m)
    loss_fn = functools.partial(balance.lohp_loss, lambda_=lambda_, huber_delta=delta)
    np.testing.assert_allclose(transform(loss_fn)(*float32(residuals)), total / weights, rtol=1e-5)
    steep = jax.grad(loss_fn)(1e6 * jnp.triu(jnp.ones((2, 2)), k=1))
    np.testing.assert_allclose(steep[0, 1], 2 * delta, rtol=1e-6)


def test_matched_lohp_is_subtb_of_the_rewards_as_flows():
    case = float32(*lohp_case(2))
    log_ratio, states, offline, log_coefficient = case
    log_flow = log_coefficient - jnp.sum((states - offline[::2]) ** 2, -1) / (2 * 0.5)
    residuals = balance.lohp_residuals(*case, variance=0.5, compression=2)
    np.testing.assert_allclose(
        balance.lohp_loss(residuals, lambda_=0.7),
        balance.subtb_loss(log_ratio, log_flow, lambda_=0.7),
        rtol=1e-5,
    )


@pytest.mark.parametrize("reward", ["matched", "end"])
def test_lohp_residuals_per_dimension_add_up_to_the_whole(reward):
    _, states, offline, log_coefficient = float32(*lohp_case(3))
    log_ratio = jnp.float32(np.random.default_rng(4).normal(size=(4, 3)))
    residuals_fn = functools.partial(
        balance.lohp_residuals, variance=0.5, compression=2, reward=reward
    )
    per_dimension = jax.jit(jax.vmap(residuals_fn, in_axes=(1, 1, 1, None)))(
        log_ratio, states[..., None], offline[..., None], log_coefficient / 3
    )
    assert per_dimension.shape == (3, 5, 5)
    whole = residuals_fn(jnp.sum(log_ratio, -1), states, offline, log_coefficient)
    np.testing.assert_allclose(per_dimension.sum(0), whole, rtol=1e-5, atol=1e-5)


def test_stored_states_get_no_gradient_and_all_else_does():
    def loss(*case):
        residuals = balance.lohp_residuals(*case, variance=0.5, compression=2)
        return balance.lohp_loss(residuals, lambda_=0.9)

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*float32(*lohp_case(5)))
    assert [bool(jnp.all(g != 0)) for g in gradients] == [True, True, False, True]
    np.testing.assert_array_equal(gradients[2], 0.0)


# Limits and large inputs.


def test_subtb_goes_from_detailed_to_trajectory_balance():
    arguments = float32(*trajectory(6, 12))
    subtb = functools.partial(balance.subtb_loss, *arguments)
    np.testing.assert_allclose(subtb(lambda_=1e-7), balance.db_loss(*arguments), rtol=1e-5)
    np.testing.assert_allclose(subtb(lambda_=1e7), balance.tb_loss(*arguments), rtol=1e-5)


def test_a_traced_lambda_equals_a_constant_one():
    arguments = float32(*trajectory(6, 12))
    traced = jax.jit(lambda lambda_: balance.subtb_loss(*arguments, lambda_=lambda_))(0.7)
    np.testing.assert_allclose(traced, balance.subtb_loss(*arguments, lambda_=0.7), rtol=1e-6)


@pytest.mark.parametrize("num_steps, lambda_", [(100, 2.0), (100, 100.0), (100, 0.01)])
def test_subtb_weights_do_not_overflow(num_steps, lambda_):
    log_ratio, log_flow = trajectory(7, num_steps)
    loss_fn = functools.partial(balance.subtb_loss, lambda_=lambda_)
    loss, gradient = jax.jit(jax.value_and_grad(loss_fn))(*float32(log_ratio, log_flow))
    expected = loss_oracle(residual_oracle(log_ratio, log_flow), lambda_)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert jnp.all(jnp.isfinite(gradient))


def test_subtb_of_a_thousand_steps_takes_quadratic_memory():
    num_steps = 1000
    arguments = jnp.zeros(num_steps), jnp.zeros(num_steps + 1)
    step = jax.jit(jax.value_and_grad(balance.subtb_loss, argnums=(0, 1)))
    compiled = step.lower(*arguments).compile()
    matrix = (num_steps + 1) ** 2 * np.dtype(np.float32).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * matrix
    loss, _ = compiled(*arguments)
    assert loss == 0.0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_results_keep_the_dtype_of_the_input_under_x64(dtype):
    def results(log_ratio, log_flow, case):
        residuals = balance.lohp_residuals(*case, variance=np.float64(0.5), compression=2)
        return (
            balance.potentials(log_ratio, log_flow),
            balance.db_loss(log_ratio, log_flow),
            balance.tb_loss(log_ratio, log_flow),
            balance.subtb_loss(log_ratio, log_flow, lambda_=np.float64(0.9)),
            balance.log_variance_loss(log_flow),
            residuals,
            balance.lohp_loss(residuals, lambda_=0.9),
            balance.residual_by_length(residuals),
            balance.additivity_defect(residuals),
            balance.effective_sample_size(log_flow),
        )

    with jax.enable_x64(True):
        arguments = jax.tree.map(dtype, (*trajectory(9, 4), lohp_case(9)))
        assert {x.dtype for x in jax.eval_shape(results, *arguments)} == {np.dtype(dtype)}


# What balance means.


def test_wrong_interior_flows_are_seen_by_detailed_balance_only():
    log_ratio, log_flow = float32(*trajectory(10, 6))
    exact = log_flow[0] + jnp.pad(jnp.cumsum(log_ratio), (1, 0))
    wrong = exact.at[3].add(1.0)
    np.testing.assert_allclose(balance.db_loss(log_ratio, exact), 0.0, atol=1e-10)
    np.testing.assert_allclose(balance.tb_loss(log_ratio, wrong), 0.0, atol=1e-10)
    np.testing.assert_allclose(balance.db_loss(log_ratio, wrong), 2 / 6, rtol=1e-5)


def test_a_constant_shift_of_interior_flows_is_invisible_to_interior_pairs():
    log_ratio, log_flow = float32(*trajectory(11, 6))
    shifted = log_flow.at[1:-1].add(3.0)
    before, after = (
        np.subtract.outer(potential, potential)
        for potential in (
            balance.potentials(log_ratio, log_flow),
            balance.potentials(log_ratio, shifted),
        )
    )
    np.testing.assert_allclose(after[1:-1, 1:-1], before[1:-1, 1:-1], atol=1e-5)
    np.testing.assert_allclose(after[0, 1:-1], before[0, 1:-1] - 3.0, atol=1e-5)


def test_losses_of_a_batch_do_not_depend_on_its_order():
    rng = np.random.default_rng(12)
    log_ratio, log_flow = float32(rng.normal(size=(8, 5)), rng.normal(size=(8, 6)))
    order = rng.permutation(8)
    for loss_fn in (balance.db_loss, balance.tb_loss, balance.subtb_loss):
        loss = jax.jit(jax.vmap(loss_fn))
        np.testing.assert_array_equal(
            loss(log_ratio[order], log_flow[order]), loss(log_ratio, log_flow)[order]
        )
    np.testing.assert_allclose(
        balance.log_variance_loss(log_flow[order, 0]),
        balance.log_variance_loss(log_flow[:, 0]),
        rtol=1e-6,
    )


def test_end_rewards_are_not_additive_and_matched_ones_are():
    case = float32(*lohp_case(13))
    matched, end = (
        balance.lohp_residuals(*case, variance=0.5, compression=2, reward=reward)
        for reward in ("matched", "end")
    )
    assert balance.additivity_defect(matched) < 1e-5
    assert balance.additivity_defect(end) > 0.1


# Chains whose flows are known: q(s_0) prod_t N(s_{t+1}; a s_t + drift, w^2) and its reversal.

DECAY, WIDTH, LOG_Z = 0.8, 0.5, 1.7


def marginal_variance(num_steps):
    variance = [1.0]
    for _ in range(num_steps):
        variance.append(DECAY**2 * variance[-1] + WIDTH**2)
    return np.array(variance)


def chain_potentials(states, shift=0.0, log_scale=0.0):
    """Potentials of states `[T + 1]` under P_F = N(a s + shift, (e^log_scale w)^2).

    Flows and P_B are those of q, in balance with P_F where shift and log_scale are 0.
    """
    variance = jnp.float32(marginal_variance(len(states) - 1))
    gain = DECAY * variance[:-1] / variance[1:]
    log_ratio = gaussian.log_ratio_per_dimension(
        states[:-1],
        states[1:],
        DECAY * states[:-1] + shift,
        np.log(WIDTH) + log_scale,
        gain * states[1:],
        0.5 * jnp.log(variance[:-1] * (WIDTH**2 / variance[1:])),
    )
    log_flow = LOG_Z + gaussian.log_prob(states, jnp.zeros_like(states), 0.5 * jnp.log(variance))
    return balance.potentials(log_ratio, log_flow), log_ratio, log_flow


def chain_samples(seed, num_samples, num_steps, shift=0.0, log_scale=0.0):
    """`[num_samples, T + 1]` states drawn from q(s_0) and P_F."""
    rng = np.random.default_rng(seed)
    states = [rng.normal(size=num_samples)]
    for _ in range(num_steps):
        noise = WIDTH * np.exp(log_scale) * rng.normal(size=num_samples)
        states.append(DECAY * states[-1] + shift + noise)
    return jnp.float32(np.stack(states, 1))


def test_an_exact_chain_has_no_residual_on_any_trajectory():
    states = jnp.float32(2 * np.random.default_rng(14).normal(size=7))
    potential, log_ratio, log_flow = jax.jit(chain_potentials)(states)
    np.testing.assert_allclose(potential, potential[0], atol=1e-4)
    for loss_fn in (balance.db_loss, balance.tb_loss, balance.subtb_loss):
        np.testing.assert_allclose(loss_fn(log_ratio, log_flow), 0.0, atol=1e-8)


def test_log_z_lies_between_the_bounds():
    num_steps, shift, log_scale = 4, 0.2, -0.3
    log_weight_fn = jax.jit(jax.vmap(lambda s: chain_potentials(s, shift, log_scale)[0][-1]))
    on_policy, target = (
        chain_samples(15, 20_000, num_steps, shift, log_scale),
        chain_samples(16, 20_000, num_steps),
    )
    log_prior = -0.5 * np.log(2 * np.pi)
    on_policy_weight, target_weight = (
        log_weight_fn(s) - (log_prior - 0.5 * s[:, 0] ** 2) for s in (on_policy, target)
    )
    scale, square = np.exp(log_scale), (shift / WIDTH) ** 2
    elbo = LOG_Z - num_steps * (-log_scale + (scale**2 + square - 1) / 2)
    eubo = LOG_Z + num_steps * (log_scale + (1 + square) / (2 * scale**2) - 0.5)
    assert on_policy_weight.mean() < LOG_Z < target_weight.mean()
    np.testing.assert_allclose(on_policy_weight.mean(), elbo, atol=0.03)
    np.testing.assert_allclose(target_weight.mean(), eubo, atol=0.03)
    gap = balance.elbo_eubo_gap(on_policy_weight, target_weight)
    np.testing.assert_allclose(gap, eubo - elbo, atol=0.06)


def test_expected_on_policy_tb_gradient_is_twice_that_of_the_kl():
    num_steps, shift, log_scale = 3, 0.2, -0.3
    states = chain_samples(17, 40_000, num_steps, shift, log_scale)

    def loss(shift, log_scale, states):
        _, log_ratio, log_flow = chain_potentials(states, shift, log_scale)
        return balance.tb_loss(log_ratio, log_flow)

    gradient_fn = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1)), in_axes=(None, None, 0)))
    gradients = np.stack(gradient_fn(shift, log_scale, states)).astype(np.float64)
    # KL(P_F || q) = T (-log_scale + (e^(2 log_scale) + (shift / w)^2 - 1) / 2)
    kl_gradient = num_steps * np.array([shift / WIDTH**2, np.exp(2 * log_scale) - 1])
    standard_error = gradients.std(1) / np.sqrt(states.shape[0])
    assert np.all(standard_error < 0.05 * abs(2 * kl_gradient))
    np.testing.assert_array_less(abs(gradients.mean(1) - 2 * kl_gradient), 4 * standard_error)


def test_composed_steps_are_in_balance_with_the_same_flows():
    """Compression k: k exact steps are one exact step of the coarse chain."""
    num_steps, k = 6, 3
    variance = marginal_variance(num_steps)
    states = 2 * np.random.default_rng(18).normal(size=num_steps // k + 1)
    decay = DECAY**k
    width = np.sqrt(WIDTH**2 * sum(DECAY ** (2 * i) for i in range(k)))
    coarse = variance[::k]
    states, coarse = float32(states, coarse)
    log_ratio = gaussian.log_ratio_per_dimension(
        states[:-1],
        states[1:],
        decay * states[:-1],
        np.log(width),
        decay * coarse[:-1] / coarse[1:] * states[1:],
        0.5 * jnp.log(coarse[:-1] * (width**2 / coarse[1:])),
    )
    log_flow = LOG_Z + gaussian.log_prob(states, jnp.zeros_like(states), 0.5 * jnp.log(coarse))
    np.testing.assert_allclose(balance.subtb_loss(log_ratio, log_flow), 0.0, atol=1e-8)


def test_a_tube_has_no_lohp_residual_on_any_states():
    rng = np.random.default_rng(19)
    num_steps, dimension, compression, rho = 4, 3, 2, 0.5
    states, offline = float32(
        rng.normal(size=(num_steps + 1, dimension)),
        rng.normal(size=(compression * num_steps + 1, dimension)),
    )
    std = gaussian.tube_std(num_steps, 1.0, 0.3)
    centers = offline[::compression]

    @jax.jit
    @jax.vmap
    def log_ratio(state, next_state, *tube):
        forward = gaussian.bridge_forward(state, *tube, rho)
        backward = gaussian.bridge_backward(next_state, *tube, rho)
        return gaussian.log_ratio(state, next_state, *forward, *backward)

    residuals = balance.lohp_residuals(
        log_ratio(states[:-1], states[1:], centers[:-1], centers[1:], std[:-1], std[1:]),
        states,
        offline,
        dimension * gaussian.tube_log_coefficient(std),
        variance=std**2,
        compression=compression,
    )
    np.testing.assert_allclose(residuals, 0.0, atol=2e-4)


# Diagnostics.


def test_residual_by_length_is_the_root_mean_square_of_each_diagonal():
    residuals = residual_oracle(*trajectory(20, 5))
    expected = [np.sqrt(np.mean(np.diag(residuals, length) ** 2)) for length in range(1, 6)]
    actual = jax.jit(balance.residual_by_length)(jnp.float32(residuals))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_additivity_defect_is_the_largest_over_all_triples():
    residuals = np.triu(np.random.default_rng(21).normal(size=(6, 6)), 1)
    expected = max(
        abs(residuals[m, n] + residuals[n, p] - residuals[m, p])
        for m, n, p in itertools.combinations(range(6), 3)
    )
    actual = jax.jit(balance.additivity_defect)(jnp.float32(residuals))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert balance.additivity_defect(jnp.ones((2, 2))) == 0.0  # one step: no triple


def test_effective_sample_size_goes_from_one_sample_to_all():
    log_weight, _ = trajectory(22, 50)
    weight = np.exp(log_weight)
    (argument,) = float32(log_weight)
    expected = sum(weight) ** 2 / (50 * sum(weight**2))
    np.testing.assert_allclose(balance.effective_sample_size(argument), expected, rtol=1e-5)
    np.testing.assert_allclose(
        balance.effective_sample_size(argument + 1e3), expected, rtol=1e-3
    )  # no overflow
    assert balance.effective_sample_size(jnp.full(7, 1e4)) == 1.0
    np.testing.assert_allclose(
        balance.effective_sample_size(jnp.array([0.0, -1e3, -1e3, -1e3])), 1 / 4
    )


# Errors.


@pytest.mark.parametrize("lambda_", [0.0, -1.0, float("inf"), float("nan")])
def test_lambda_must_be_positive_and_finite(lambda_):
    with pytest.raises(ValueError, match="subtb_loss: lambda_ must be positive and finite"):
        balance.subtb_loss(jnp.zeros(2), jnp.zeros(3), lambda_=lambda_)
    with pytest.raises(ValueError, match="lohp_loss: lambda_ must be positive and finite"):
        balance.lohp_loss(jnp.zeros((3, 3)), lambda_=lambda_)
    with pytest.raises(ValueError, match="lohp_loss: huber_delta must be positive and finite"):
        balance.lohp_loss(jnp.zeros((3, 3)), lambda_=0.9, huber_delta=lambda_)


@eager_and_jit
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"reward": "both"}, r"reward must be one of \('matched', 'end'\), got 'both'"),
        ({"compression": 0}, "compression must be >= 1, got 0"),
        ({"variance": 0.0}, "variance must be positive and finite"),
        ({"variance": jnp.array([1.0, 1.0, -1.0, 1.0, 1.0])}, "variance must be positive"),
    ],
)
def test_lohp_residuals_reject_settings(settings, message, transform):
    settings = {"variance": 0.5, "compression": 2, **settings}
    with pytest.raises(ValueError, match=f"lohp_residuals: {message}"):
        transform(functools.partial(balance.lohp_residuals, **settings))(*float32(*lohp_case(0)))


def test_a_traced_variance_is_accepted():
    case = float32(*lohp_case(0))
    residuals_fn = jax.jit(
        lambda variance: balance.lohp_residuals(*case, variance=variance, compression=2)
    )
    np.testing.assert_allclose(
        residuals_fn(0.5),
        balance.lohp_residuals(*case, variance=0.5, compression=2),
        rtol=1e-5,
        atol=1e-5,
    )


def test_shapes_are_checked():
    for loss_fn in (balance.db_loss, balance.tb_loss, balance.subtb_loss, balance.potentials):
        with pytest.raises(AssertionError):
            loss_fn(jnp.zeros(3), jnp.zeros(3))
    log_ratio, states, offline, log_coefficient = float32(*lohp_case(0))
    with pytest.raises(AssertionError):  # 9 stored states are not 3 * 4 + 1
        balance.lohp_residuals(
            log_ratio, states, offline, log_coefficient, variance=0.5, compression=3
        )
    for function in (balance.residual_by_length, balance.additivity_defect):
        with pytest.raises(AssertionError):
            function(jnp.zeros((3, 4)))


# Reference numbers.


@pytest.fixture(scope="module")
def oracle():
    if not ORACLE_PATH.exists():
        pytest.skip("needs ../shared/oracles/balance.npz")
    with np.load(ORACLE_PATH, allow_pickle=False) as archive:
        return dict(archive)


def select(oracle, case):
    """Arrays of one case under their short names."""
    prefix = f"{case}__"
    return {k.removeprefix(prefix): v for k, v in oracle.items() if k.startswith(prefix)}


def oracle_log_ratio(kernels, states, mask):
    """`[T]` log-ratios of one trajectory; log P_B is 0 where the mask is (P_B a point mass)."""
    ratio = gaussian.log_ratio(states[:-1], states[1:], *(kernels[k] for k in KERNELS))
    forward = gaussian.log_prob(states[1:], kernels["fwd_mean"], kernels["fwd_logstd"]).sum(-1)
    return jnp.where(mask > 0, ratio, forward)


def oracle_inputs(arrays):
    kernels = {k: np.float32(arrays[k]) for k in KERNELS}
    mask = np.float32(arrays.get("bwd_mask", np.ones(kernels["fwd_mean"].shape[1])))
    return kernels, mask


@pytest.mark.parametrize("case", ["A_exact", "A_pert", "B_exact", "B_pert", "B_coarse"])
def test_losses_match_the_reference_numbers(oracle, case):
    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, 0, None))
    def results(kernels, states, log_flow, mask):
        log_ratio = oracle_log_ratio(kernels, states, mask)
        potential = balance.potentials(log_ratio, log_flow)
        losses = {
            "db_loss": balance.db_loss(log_ratio, log_flow),
            "tb_loss": balance.tb_loss(log_ratio, log_flow),
        }
        for lambda_ in LAMBDAS:
            losses[f"subtb_{lambda_}"] = balance.subtb_loss(log_ratio, log_flow, lambda_=lambda_)
        return potential[:, None] - potential[None, :], losses

    arrays = select(oracle, case)
    kernels, mask = oracle_inputs(arrays)
    residuals, losses = results(kernels, *float32(arrays["x"], arrays["log_flow"]), mask)
    np.testing.assert_allclose(np.triu(residuals, 1), np.triu(arrays["residual"], 1), atol=2e-4)
    losses["vargrad_ddof0"] = balance.log_variance_loss(jnp.float32(arrays["log_w"]))
    for name, loss in losses.items():
        np.testing.assert_allclose(loss, arrays[name], rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("case", ["A_pert", "B_pert"])
@pytest.mark.parametrize(
    "name, loss_fn",
    [("subtb0.9", balance.subtb_loss), ("tb", balance.tb_loss), ("db", balance.db_loss)],
)
def test_gradients_match_the_reference_numbers(oracle, case, name, loss_fn):
    arrays = select(oracle, case)
    kernels, mask = oracle_inputs(arrays)
    states, log_flow = float32(arrays["x"], arrays["log_flow"])

    def loss(kernels, log_flow):
        log_ratio = jax.vmap(oracle_log_ratio, in_axes=(0, 0, None))(kernels, states, mask)
        return jnp.mean(jax.vmap(loss_fn)(log_ratio, log_flow))

    gradients, flow_gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(kernels, log_flow)
    for leaf, gradient in {**gradients, "log_flow": flow_gradient}.items():
        expected = arrays[f"grad_{name}_{leaf}"]
        np.testing.assert_allclose(
            gradient, expected, rtol=1e-5, atol=1e-5 * abs(expected).max(), err_msg=leaf
        )


@pytest.mark.parametrize("reward", ["matched", "end"])
@pytest.mark.parametrize(
    "case", ["L_k1", "L_zero_const_a0.9", "L_zero_const_a0.2", "L_zero_moving_a0.9"]
)
def test_lohp_matches_the_reference_numbers(oracle, case, reward):
    arrays = select(oracle, case)
    kernels, mask = oracle_inputs(arrays)
    log_coefficient = jnp.float32(arrays["log_c"])
    settings = {"variance": float(arrays["tau2"]), "compression": int(arrays["k"])}

    @jax.jit
    @jax.vmap
    def results(kernels, states, offline):
        log_ratio = oracle_log_ratio(kernels, states, mask)
        residuals = balance.lohp_residuals(
            log_ratio, states, offline, log_coefficient, **settings, reward=reward
        )
        return residuals, [balance.lohp_loss(residuals, lambda_=lambda_) for lambda_ in LAMBDAS]

    residuals, losses = results(kernels, *float32(arrays["online"], arrays["offline"]))
    expected = np.triu(arrays[f"residual_{reward}"], 1)
    np.testing.assert_allclose(residuals, expected, rtol=1e-5, atol=2e-4)
    if case == "L_k1":
        for lambda_, loss in zip(LAMBDAS, losses, strict=True):
            np.testing.assert_allclose(loss, arrays[f"loss_{reward}_{lambda_}"], rtol=1e-5)


def test_a_reward_of_zero_is_infinitely_out_of_balance():
    """log R = -inf: no NaN, on the way either, nor where the weights of the longest pairs underflow."""
    with jax.debug_nans(True):
        for num_steps in (3, 2000):
            ratio, flow = jnp.full(num_steps, 0.1), jnp.zeros(num_steps + 1).at[-1].set(-jnp.inf)
            for loss in (balance.db_loss, balance.tb_loss, balance.subtb_loss):
                assert loss(ratio, flow) == jnp.inf
        for lambda_ in (1e-6, 1e6):
            assert balance.subtb_loss(ratio[:3], flow[-4:], lambda_=lambda_) == jnp.inf
        assert balance.log_variance_loss(jnp.array([0.5, -jnp.inf, 1.0])) == jnp.inf
        states = jnp.array([[0.0], [1.0], [1e30]])  # the square overflows
        found = balance.lohp_residuals(
            jnp.zeros(2), states, jnp.zeros((3, 1)), jnp.zeros(3), variance=0.5, compression=1
        )
        np.testing.assert_array_equal(found, [[0, 1, np.inf], [0, 0, np.inf], [0, 0, 0]])
        assert balance.lohp_loss(found, lambda_=0.9) == jnp.inf


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_weighs_long_trajectories_right(dtype):
    """600 steps: what float64 finds of the same numbers, where half precision counts to 256 or 2,048."""
    ratio, flow = trajectory(0, 600)
    ratio, flow = (jnp.asarray(x, dtype) for x in (ratio, flow))
    residuals = residual_oracle(np.float64(ratio), np.float64(flow))
    for lambda_ in (0.9, 1.0):
        found = balance.subtb_loss(ratio, flow, lambda_=lambda_)
        gap = np.subtract.outer(np.arange(601), np.arange(601)).T
        weight = np.triu(lambda_ ** np.maximum(gap, 0), 1)
        np.testing.assert_allclose(found, (weight * residuals**2).sum() / weight.sum(), rtol=1e-3)
    ones = jnp.ones((601, 601), dtype)
    np.testing.assert_allclose(balance.lohp_loss(ones, lambda_=0.9), 1.0, rtol=1e-5)
    np.testing.assert_allclose(
        balance.db_loss(ratio, flow), np.mean(np.diag(residuals, 1) ** 2), rtol=1e-4
    )
