import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from lohp_jax.codec import make_codec
from lohp_jax.networks.policy import Heads, PolicyNetwork
from lohp_jax.policy import balance, gaussian, hybrid, kernels
from lohp_jax.policy.config import PAPER_LITERAL, HybridConfig
from lohp_jax.policy.kernels import Policy
from lohp_jax.types import Example

NUM_STEPS = 3
CODEC = make_codec({"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}, channels=2)
MASK = CODEC.mask  # [4, 2], 7 weights and one number of padding
REAL = np.flatnonzero(MASK)
CERTAIN = HybridConfig(
    condition_dropout=0.0,
    on_policy=0.1,
    start_std=0.1,
    end_std=0.3,
    correlation=0.5,
    log_std_range=1.0,
)
LITERAL = dataclasses.replace(PAPER_LITERAL, condition_dropout=0.0)
KEY = jax.random.key(0)
FORMS = {
    f"{reward}, {backward}, {'per weight' if per_dimension else 'summed'}": dataclasses.replace(
        CERTAIN, reward=reward, backward=backward, per_dimension=per_dimension
    )
    for reward in ("matched", "end")
    for backward in ("bridge", "learned")
    for per_dimension in (True, False)
} | {"paper_literal": LITERAL}


def affine_heads(params, embedding, teacher, step, state):
    """A network small enough for an oracle: head = offset[step] + embedding * gain * state."""
    del teacher
    pairs = zip(params["offset"][:, step], params["gain"], strict=True)
    return Heads(*(offset + embedding * gain * state for offset, gain in pairs))


AFFINE = PolicyNetwork(
    init=lambda key, context: None,
    encode=lambda params, context, keep: keep * context["scale"] + (1 - keep) * params["unknown"],
    heads=affine_heads,
    log_coefficient=lambda params: jnp.append(params["coefficient"], 0.0),
)


def make_policy(config=CERTAIN):
    return Policy(AFFINE, CODEC, config, NUM_STEPS)


def random_params(seed=0, size=0.3):
    rng = np.random.default_rng(seed)
    shapes = {"offset": (4, NUM_STEPS, *MASK.shape), "gain": (4,), "unknown": ()}
    shapes["coefficient"] = (NUM_STEPS,)
    return {name: jnp.float32(rng.normal(0, size, shape)) for name, shape in shapes.items()}


def random_states(seed, size=1.0):
    states = np.random.default_rng(seed).normal(0, size, size=(NUM_STEPS + 1, *MASK.shape))
    return np.where(MASK, states, 0).astype(np.float32)


EXAMPLE = Example(random_states(0), jnp.zeros((), jnp.int32), {"scale": jnp.float32(0.7)}, None)


def exact_params(config=CERTAIN, tokens=EXAMPLE.tokens):
    """The bridge of the tube itself: drift z_{m+1} - a z_m, nothing else."""
    tau = np.geomspace(config.start_std, config.end_std, NUM_STEPS + 1)
    keep = (config.correlation * tau[1:] / tau[:-1])[:, None, None]
    offset = np.zeros((4, NUM_STEPS, *MASK.shape))
    offset[0] = tokens[1:] - keep * tokens[:-1]
    params = jax.tree.map(jnp.zeros_like, random_params())
    return params | {"offset": jnp.asarray(offset, jnp.float32)}


@functools.cache
def loss_of(config):
    """`hybrid_loss(params, example, key)`, compiled once per config."""
    return jax.jit(functools.partial(hybrid.hybrid_loss, make_policy(config)))


def residuals(policy, params, example, states):
    embedding = policy.network.encode(params, example.context, 1.0)
    both = kernels.kernels_along(policy, params, embedding, example, states)
    return hybrid.residuals(policy, params, example, states, *both)


# --- float64 oracle, one weight and one step at a time


def oracle_kernels(config, params, m, i, state, next_state, tokens):
    """Mean and std of P_F(next | state) and P_B(state | next) of weight i at step m."""
    tau = np.geomspace(config.start_std, config.end_std, NUM_STEPS + 1)
    rho, bound = config.correlation, config.log_std_range
    offset = np.float64(params["offset"]).reshape(4, NUM_STEPS, -1)[:, m, i]
    slope = 0.7 * np.float64(params["gain"])
    drift, log_std, _, _ = offset + slope * state
    keep = rho * tau[m + 1] / tau[m] if config.backward == "bridge" else 1.0
    base = tau[m + 1] * np.sqrt(1 - rho**2)
    forward = keep * state + drift, base * np.exp(bound * np.tanh(log_std / bound))
    if config.backward == "bridge":
        mean = tokens[m] + rho * tau[m] / tau[m + 1] * (next_state - tokens[m + 1])
        return forward, (mean, tau[m] * np.sqrt(1 - rho**2))
    _, _, drift, log_std = offset + slope * next_state
    return forward, (next_state + drift, tau[m] * np.exp(bound * np.tanh(log_std / bound)))


def oracle_log_flow(config, coefficient, m, at, state, tokens):
    """log c_m R_at(state) of one weight, without the learned coefficient."""
    tau = np.geomspace(config.start_std, config.end_std, NUM_STEPS + 1)
    if config.reward == "end":
        return coefficient - (state - tokens[at]) ** 2 / (2 * tau[-1] ** 2)
    tube = np.log(tau[-1] / tau[m])
    return coefficient + tube - (state - tokens[m]) ** 2 / (2 * tau[m] ** 2)


def oracle_of_weight(config, params, i, states, tokens, learned):
    """`[N + 1, N + 1]` residuals of weight i; `learned` are its share of the coefficients."""
    ratio = []
    for m in range(NUM_STEPS):
        args = m, i, states[m], states[m + 1], tokens
        forward, backward = oracle_kernels(config, params, *args)
        ratio.append(
            scipy.stats.norm.logpdf(states[m + 1], *forward)
            - scipy.stats.norm.logpdf(states[m], *backward)
        )
    out = np.zeros((NUM_STEPS + 1, NUM_STEPS + 1))
    for m in range(NUM_STEPS + 1):
        for n in range(m + 1, NUM_STEPS + 1):
            start = oracle_log_flow(config, learned[m], m, n, states[m], tokens)
            end = oracle_log_flow(config, learned[n], n, n, states[n], tokens)
            out[m, n] = start + sum(ratio[m:n]) - end
    return out


def oracle(config, params, states, tokens):
    """`[D or 1, N + 1, N + 1]`; a summed residual has the learned coefficients once."""
    states, tokens = (np.float64(x).reshape(NUM_STEPS + 1, -1) for x in (states, tokens))
    learned = np.append(np.float64(params["coefficient"]), 0.0)
    share = learned if config.per_dimension else learned / len(REAL)
    by_weight = np.stack(
        [oracle_of_weight(config, params, i, states[:, i], tokens[:, i], share) for i in REAL]
    )
    return by_weight if config.per_dimension else by_weight.sum(axis=0, keepdims=True)


def oracle_loss(residuals, lambda_, delta):
    """Mean over weights of the λ-weighted mean of Huber's loss, of squares without a threshold."""
    delta = np.inf if delta is None else delta
    losses = []
    for d in residuals:
        num = den = 0.0
        for m in range(NUM_STEPS + 1):
            for n in range(m + 1, NUM_STEPS + 1):
                weight = lambda_ ** (n - m)
                size = abs(d[m, n])
                cost = size**2 if size < delta else delta * (2 * size - delta)
                num, den = num + weight * cost, den + weight
        losses.append(num / den)
    return np.mean(losses)


# --- residuals


@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)
def test_residuals_equal_their_definition(config):
    params, states = random_params(), random_states(1, 0.5)
    expected = oracle(config, params, states, EXAMPLE.tokens)
    actual = jax.jit(functools.partial(residuals, make_policy(config)))(params, EXAMPLE, states)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_paper_literal_sums_the_published_residual_over_the_weights():
    policy, params, states = make_policy(LITERAL), random_params(), random_states(1)
    embedding = policy.network.encode(params, EXAMPLE.context, 1.0)
    forward, backward = kernels.kernels_along(policy, params, embedding, EXAMPLE, states)
    log_ratio = gaussian.log_ratio_per_dimension(states[:-1], states[1:], *forward, *backward)
    expected = balance.lohp_residuals(
        log_ratio[:, MASK].sum(axis=-1),
        states[:, MASK],
        EXAMPLE.tokens[:, MASK],
        policy.network.log_coefficient(params),
        variance=0.5,  # R = exp(-|s - theta|^2)
        compression=1,
        reward="end",
    )
    actual = hybrid.residuals(policy, params, EXAMPLE, states, forward, backward)
    assert actual.shape == (1, NUM_STEPS + 1, NUM_STEPS + 1)
    np.testing.assert_allclose(actual[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("per_dimension", [True, False], ids=["per weight", "summed"])
def test_the_exact_bridge_has_no_residual_anywhere(per_dimension):
    config = dataclasses.replace(CERTAIN, per_dimension=per_dimension)
    policy, params = make_policy(config), exact_params(config)
    for seed in range(1, 4):
        # squares of 10 standard deviations, in float32
        actual = residuals(policy, params, EXAMPLE, random_states(seed))
        np.testing.assert_allclose(actual, 0, atol=2e-3)
    loss, info = loss_of(config)(params, EXAMPLE, KEY)
    assert 0 <= loss < 1e-6
    assert 0 <= info["off_policy"] < 1e-6 and 0 <= info["on_policy"] < 1e-6
    wrong = params | {"offset": params["offset"] + 0.1}
    assert loss_of(config)(wrong, EXAMPLE, KEY)[0] > 1e-3


@pytest.mark.parametrize("config", [CERTAIN, LITERAL], ids=["bridge", "learned"])
def test_a_kernel_sees_only_the_state_it_starts_from(config):
    policy, params = make_policy(config), random_params()
    embedding = policy.network.encode(params, EXAMPLE.context, 1.0)
    along = jax.jit(lambda s: kernels.kernels_along(policy, params, embedding, EXAMPLE, s))
    states = random_states(1)
    forward, backward = along(states)
    for m in range(NUM_STEPS + 1):
        changed = states.copy()
        changed[m] += MASK
        for kernel, before, seeing in zip(
            along(changed), (forward, backward), (m, m - 1), strict=True
        ):
            moved = np.abs(kernel.mean - before.mean).max(axis=(1, 2)) > 0
            np.testing.assert_array_equal(moved, np.arange(NUM_STEPS) == seeing)


@pytest.mark.parametrize("config", [CERTAIN, LITERAL], ids=["bridge", "learned"])
def test_log_stds_stay_within_their_range(config):
    policy = make_policy(config)
    tau = np.geomspace(config.start_std, config.end_std, NUM_STEPS + 1)
    for sign in (-1, 1):
        params = random_params() | {"offset": jnp.full((4, NUM_STEPS, *MASK.shape), sign * 100.0)}
        forward, backward = kernels.kernels_along(policy, params, 0.0, EXAMPLE, EXAMPLE.tokens)
        base = np.log(tau[1:]) + 0.5 * np.log(1 - config.correlation**2)
        extreme = base + sign * config.log_std_range
        np.testing.assert_allclose(
            forward.log_std[:, MASK], extreme[:, None].repeat(7, 1), rtol=1e-5
        )
        if config.backward == "learned":
            extreme = np.log(tau[:-1]) + sign * config.log_std_range
        else:
            extreme = np.log(tau[:-1]) + 0.5 * np.log(1 - config.correlation**2)
        np.testing.assert_allclose(
            backward.log_std[:, MASK], extreme[:, None].repeat(7, 1), rtol=1e-5
        )


# --- the loss


def drawn_states(policy, params, example=EXAMPLE, key=KEY):
    """The states that `hybrid_loss` scores with `key`, off- and on-policy."""
    _, tube_key, roll_key = jax.random.split(key, 3)
    embedding = policy.network.encode(params, example.context, 1.0)
    rolled = kernels.roll_out(policy, params, embedding, example.teacher, roll_key, temperature=1.0)
    return kernels.tube_states(policy, example.tokens, tube_key), rolled


@pytest.mark.parametrize("config", [CERTAIN, LITERAL], ids=["well_posed", "paper_literal"])
def test_the_loss_is_the_weighted_sum_of_its_terms(config):
    config = dataclasses.replace(
        config, off_policy=0.7, on_policy=0.3, coefficient_penalty=0.2, lambda_=0.6
    )
    policy, params = make_policy(config), random_params()
    off, on = (
        oracle_loss(
            oracle(config, params, states, EXAMPLE.tokens), config.lambda_, config.huber_delta
        )
        for states in drawn_states(policy, params)
    )
    penalty = np.mean(np.append(np.float64(params["coefficient"]), 0) ** 2)
    loss, info = loss_of(config)(params, EXAMPLE, KEY)
    np.testing.assert_allclose(info["off_policy"], off, rtol=1e-4)
    np.testing.assert_allclose(info["on_policy"], on, rtol=1e-4)
    np.testing.assert_allclose(loss, 0.7 * off + 0.3 * on + 0.2 * penalty, rtol=1e-4)


def test_the_loss_reports_what_to_watch():
    policy, params = make_policy(), random_params()
    off, on = drawn_states(policy, params)
    _, info = loss_of(CERTAIN)(params, EXAMPLE, KEY)
    expected = oracle(CERTAIN, params, off, EXAMPLE.tokens)
    by_length = [
        np.mean([np.sqrt(np.mean(np.diagonal(d, length) ** 2)) for d in expected])
        for length in range(1, NUM_STEPS + 1)
    ]
    np.testing.assert_allclose(info["residual_by_length"], by_length, rtol=1e-4)
    forward, backward = kernels.kernels_along(policy, params, 0.7, EXAMPLE, off)
    for name, kernel in (("log_std", forward), ("backward_log_std", backward)):
        expected = np.mean(np.float64(kernel.log_std)[:, MASK], axis=1)
        np.testing.assert_allclose(info[name], expected, rtol=1e-5)
    np.testing.assert_array_equal(info["log_coefficient"], [*params["coefficient"], 0])
    for name, value in hybrid.displacement(on, EXAMPLE.tokens).items():
        np.testing.assert_allclose(info[name], value, rtol=1e-5)


def test_without_on_policy_term_there_is_no_roll_out():
    off_only = dataclasses.replace(CERTAIN, on_policy=0.0)
    loss, info = loss_of(off_only)(random_params(), EXAMPLE, KEY)
    assert not {"on_policy", "progress", "cosine"} & info.keys()
    with_it, both = loss_of(CERTAIN)(random_params(), EXAMPLE, KEY)
    np.testing.assert_allclose(info["off_policy"], both["off_policy"], rtol=1e-6)
    np.testing.assert_allclose(with_it - loss, 0.1 * both["on_policy"], rtol=1e-4)


@pytest.mark.parametrize("config", [CERTAIN, LITERAL], ids=["well_posed", "paper_literal"])
def test_no_gradient_reaches_the_offline_states(config):
    def loss_fn(tokens):
        return loss_of(config)(random_params(), EXAMPLE._replace(tokens=tokens), KEY)[0]

    np.testing.assert_array_equal(jax.grad(loss_fn)(EXAMPLE.tokens), 0 * EXAMPLE.tokens)


def test_no_gradient_flows_through_the_states_of_the_policy():
    """The gradient of the on-policy term is that with its states passed in as constants."""
    config = dataclasses.replace(CERTAIN, off_policy=0.0, on_policy=1.0, coefficient_penalty=0.0)
    policy, params = make_policy(config), random_params()

    def loss_on(params, states):
        by_weight = residuals(policy, params, EXAMPLE, states)
        of_weight = functools.partial(
            balance.lohp_loss, lambda_=config.lambda_, huber_delta=config.huber_delta
        )
        return jnp.mean(jax.vmap(of_weight)(by_weight))

    def loss_through(params):
        return loss_on(params, drawn_states(policy, params)[1])

    constant = jax.jit(jax.grad(loss_on))(params, drawn_states(policy, params)[1])
    actual, _ = jax.jit(jax.grad(loss_of(config), has_aux=True))(params, EXAMPLE, KEY)
    through = jax.jit(jax.grad(loss_through))(params)
    for name in params:
        np.testing.assert_allclose(actual[name], constant[name], rtol=1e-4, atol=1e-5)
    assert np.abs(through["offset"][0] - constant["offset"][0]).max() > 0.1


@pytest.mark.parametrize("config", [CERTAIN, LITERAL], ids=["well_posed", "paper_literal"])
def test_padding_never_changes_the_loss(config):
    params = random_params()
    expected, _ = loss_of(config)(params, EXAMPLE, KEY)
    padded = EXAMPLE._replace(tokens=np.where(MASK, EXAMPLE.tokens, 9.0))
    noisy = params | {"offset": jnp.where(MASK, params["offset"], 9.0)}
    for changed in ((params, padded), (noisy, EXAMPLE)):
        actual, info = loss_of(config)(*changed, KEY)
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
        assert np.isfinite(info["residual_by_length"]).all()


def test_vmap_over_examples_equals_a_loop():
    params, keys = random_params(), jax.random.split(KEY, 3)
    examples = [EXAMPLE._replace(tokens=random_states(seed)) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *examples)
    together = jax.vmap(loss_of(CERTAIN), (None, 0, 0))(params, stacked, keys)[0]
    pairs = zip(examples, keys, strict=True)
    alone = [loss_of(CERTAIN)(params, example, key)[0] for example, key in pairs]
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_condition_dropout_replaces_the_context_at_its_rate():
    policy = make_policy(dataclasses.replace(CERTAIN, condition_dropout=0.25))
    params = random_params() | {"unknown": jnp.float32(-1.0)}
    keys = jax.random.split(KEY, 4000)
    embeddings = jax.vmap(lambda k: kernels.embed(policy, params, EXAMPLE.context, k))(keys)
    assert set(np.asarray(embeddings).tolist()) == {-1.0, np.float32(0.7).item()}
    dropped = np.mean(embeddings == -1.0)
    assert abs(dropped - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 4000)


# --- states


def test_tube_states_have_the_widths_of_the_tube():
    policy = make_policy()
    keys = jax.random.split(KEY, 4000)
    states = np.asarray(jax.vmap(lambda k: kernels.tube_states(policy, EXAMPLE.tokens, k))(keys))
    tau = np.geomspace(0.1, 0.3, NUM_STEPS + 1)[:, None].repeat(len(REAL), 1)
    np.testing.assert_allclose(states.std(axis=0)[:, MASK], tau, rtol=0.06)
    error = states.mean(axis=0)[:, MASK] - EXAMPLE.tokens[:, MASK]
    assert np.abs(error / tau).max() < 5 / np.sqrt(4000)
    assert (states[..., ~MASK] == 0).all()


def test_without_perturbation_the_stored_states_themselves_are_scored():
    policy = make_policy(dataclasses.replace(CERTAIN, perturb=False))
    np.testing.assert_array_equal(kernels.tube_states(policy, EXAMPLE.tokens, KEY), EXAMPLE.tokens)


def mean_path(config, params, embedding, num_steps=NUM_STEPS):
    """Repeated means of the forward kernel from theta_0, in float64."""
    tau = np.geomspace(config.start_std, config.end_std, NUM_STEPS + 1)
    state, path = np.zeros(MASK.shape), [np.zeros(MASK.shape)]
    for m in range(num_steps):
        bridge = config.backward == "bridge"
        keep = config.correlation * tau[m + 1] / tau[m] if bridge else 1.0
        drift = (
            np.float64(params["offset"][0, m]) + embedding * np.float64(params["gain"][0]) * state
        )
        state = np.where(MASK, keep * state + drift, 0)
        path.append(state)
    return np.stack(path)


@pytest.mark.parametrize("num_steps", [None, 1, 2])
@pytest.mark.parametrize("config", [CERTAIN, LITERAL], ids=["well_posed", "paper_literal"])
def test_a_cold_roll_out_repeats_the_means(config, num_steps):
    policy, params = make_policy(config), random_params()
    states = kernels.roll_out(policy, params, 0.7, 0, KEY, temperature=0.0, num_steps=num_steps)
    expected = mean_path(config, params, 0.7)[: (num_steps or NUM_STEPS) + 1]
    np.testing.assert_allclose(states, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_roll_outs_have_the_moments_of_the_chain(temperature):
    """For affine means and stds that ignore the state: var <- (a + g)^2 var + std^2."""
    policy, params, num_samples = make_policy(), random_params(), 4000
    params["offset"] = params["offset"].at[1].set(0.2)
    params["gain"] = jnp.float32([0.4, 0, 0, 0])
    keys = jax.random.split(KEY, num_samples)
    roll_out = functools.partial(kernels.roll_out, policy, params, 1.0, 0, temperature=temperature)
    states = np.asarray(jax.vmap(roll_out)(keys))
    tau = np.geomspace(0.1, 0.3, NUM_STEPS + 1)
    std = [temperature * 0.1]
    for m in range(NUM_STEPS):
        noise = temperature * tau[m + 1] * np.sqrt(1 - 0.5**2) * np.exp(np.tanh(0.2))
        std.append(np.hypot((0.5 * tau[m + 1] / tau[m] + 0.4) * std[-1], noise))
    std = np.array(std)[:, None].repeat(len(REAL), 1)
    mean = mean_path(CERTAIN, params, 1.0)[:, MASK]
    np.testing.assert_allclose(states.std(axis=0)[:, MASK], std, rtol=0.06)
    assert np.abs((states.mean(axis=0)[:, MASK] - mean) / std).max() < 5 / np.sqrt(num_samples)
    assert (states[..., ~MASK] == 0).all()


def test_guidance_exaggerates_the_drift_of_the_context():
    policy, params = make_policy(), random_params()
    roll_out = functools.partial(kernels.roll_out, policy, params, 0.7, 0, KEY)
    plain = roll_out(temperature=1.0)
    np.testing.assert_array_equal(
        roll_out(temperature=1.0, unconditional=jnp.float32(0.1), guidance=0.0), plain
    )
    guided = roll_out(temperature=0.0, unconditional=jnp.float32(0.1), guidance=2.0)
    # the heads of `AFFINE` are linear in the embedding: 3 * 0.7 - 2 * 0.1
    np.testing.assert_allclose(guided, mean_path(CERTAIN, params, 1.9), rtol=1e-5, atol=1e-6)


def test_guidance_leaves_the_noise_alone():
    """Where only the log standard deviation depends on the context, guidance changes nothing."""
    policy, params = make_policy(), random_params() | {"gain": jnp.float32([0, 2, 0, 0])}
    roll_out = functools.partial(kernels.roll_out, policy, params, 0.7, 0, KEY, temperature=1.0)
    guided = roll_out(unconditional=jnp.float32(0.1), guidance=2.0)
    np.testing.assert_allclose(guided, roll_out(), rtol=1e-6)


@pytest.mark.parametrize(
    "moved, wanted, progress, cosine",
    [
        ([3.0, 4.0], [3.0, 4.0], 1.0, 1.0),
        ([0.0, 0.0], [3.0, 4.0], 0.0, 0.0),
        ([-3.0, -4.0], [6.0, 8.0], 0.5, -1.0),
        ([4.0, -3.0], [3.0, 4.0], 1.0, 0.0),
        ([5.0, 0.0], [3.0, 4.0], 1.0, 0.6),
    ],
)
def test_displacement_of_known_vectors(moved, wanted, progress, cosine):
    def path(end):
        start = jnp.array([[7.0, -2.0]])
        return jnp.stack([start, start + 99, start + jnp.array([end])])

    actual = hybrid.displacement(path(moved), path(wanted))
    assert actual.keys() == {"progress", "cosine"}
    np.testing.assert_allclose(actual["progress"], progress, rtol=1e-6)
    np.testing.assert_allclose(actual["cosine"], cosine, rtol=1e-6, atol=1e-7)


def test_displacement_is_finite_where_nothing_moves():
    still = jnp.zeros((2, 3, 1))
    assert all(np.isfinite(x) for x in hybrid.displacement(still, still).values())


# --- configuration


def test_presets():
    literal = PAPER_LITERAL
    assert (literal.reward, literal.backward) == ("end", "learned")
    assert not literal.per_dimension and not literal.perturb and literal.huber_delta is None
    assert 2 * literal.end_std**2 == pytest.approx(1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reward": "start"}, r"reward must be one of \('matched', 'end'\), got 'start'"),
        ({"backward": "tube"}, r"backward must be one of \('bridge', 'learned'\), got 'tube'"),
        ({"start_std": 0.0}, "start_std must be positive, got 0.0"),
        ({"end_std": -1.0}, "end_std must be positive, got -1.0"),
        ({"log_std_range": float("nan")}, "log_std_range must be positive, got nan"),
        ({"lambda_": 0.0}, "lambda_ must be positive, got 0.0"),
        ({"huber_delta": 0.0}, "huber_delta must be positive or None, got 0.0"),
        ({"correlation": 1.0}, r"correlation must be in \[0, 1\), got 1.0"),
        ({"condition_dropout": -0.1}, r"condition_dropout must be in \[0, 1\), got -0.1"),
        ({"off_policy": -1.0}, "off_policy must not be negative, got -1.0"),
        ({"on_policy": -1.0}, "on_policy must not be negative, got -1.0"),
        ({"coefficient_penalty": -1.0}, "coefficient_penalty must not be negative, got -1.0"),
        ({"off_policy": 0.0, "on_policy": 0.0}, "off_policy and on_policy must not both be zero"),
    ],
)
def test_a_bad_config_says_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        HybridConfig(**options)
