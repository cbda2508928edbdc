"""The trust region is what its docstring says, and keeps what it promises on problems that tempt it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax.optimizers.hub import hub, hub_diagnostics
from lohp_jax.optimizers.trust import TrustSettings, _follow_loss, hub_trust, trust_mixer

PARAMS = {"w": np.ones(4, np.float32), "b": np.ones(2, np.float32)}
SIGN = optax.chain(optax.scale_by_sign(), optax.scale(-0.5))
FIXED = {"fall_back": False, "grow": 1.0, "shrink": 1.0, "bounds": (2.0, 2.0)}


def gradients(seed):
    """With a common part, so that steps agree in part."""
    rng = np.random.default_rng(seed)
    return {name: np.float32(0.5 + rng.normal(size=p.shape)) for name, p in PARAMS.items()}


def follow(optimizer, losses, gradients=gradients, params=PARAMS):
    """Updates of every step, and the states after it."""
    state, update, updates, states = optimizer.init(params), jax.jit(optimizer.update), [], []
    for step, loss in enumerate(losses):
        u, state = update(gradients(step), state, params, value=loss)
        updates.append(u)
        states.append(state)
    return updates, states


# --- the definition, in float64, one tensor


def score(numbers):
    """Of a history, the oldest first: its sum in units of its root mean square, with memory 0.95."""
    weights = 0.95 ** np.arange(len(numbers))[::-1]
    square = np.sum(weights * np.square(numbers))
    return np.sum(weights * numbers) / np.sqrt(square) if square > 0 else 0.0


def trust_oracle(losses, ratio=2.0, bounds=(1.0, 20.0), grow=1.1, shrink=0.5, optimism=0.0):
    """Updates and ratios of `w` alone: -0.1 g and -0.5 sign(g)."""
    updates, ratios, evidence, fresh, changes, mean = [], [], [], [], [], None
    hand = capped = previous = used = 0.0
    start = ratio
    for step, loss in enumerate(losses):
        g = np.float64(gradients(step)["w"])
        if step:
            size = np.linalg.norm(g) * (np.linalg.norm(hand) + np.linalg.norm(capped))
            fresh.append(g @ (capped - hand) / size)
            evidence.append((g + optimism * previous) @ (capped - hand) / size)
        changes.append(0.0 if mean is None else loss - mean)
        weights = 0.95 ** np.arange(step)[::-1]
        usual = np.sqrt(np.sum(weights * np.square(changes[:-1])) / max(np.sum(weights), 1e-9))
        failed = step > 5 and changes[-1] > 5 * usual
        failed |= score(changes) > 2.5
        assert not (failed and step < len(losses) - 1), "the oracle forgets nothing"
        mean = loss if mean is None else 0.9 * mean + 0.1 * loss
        trust = 1 / (1 + np.exp(3 * ((0.0 if failed else score(evidence)) + 1)))
        if trust < 0.5:
            ratio = np.clip(start, ratio / 1.02, ratio * 1.02)
        elif score(fresh) > 1:
            ratio = 0.9 * min(ratio, used)
        elif score(changes) < -1 and score(fresh) < -1 and used > ratio and not failed:
            ratio *= grow
        ratio = np.clip(ratio * (shrink if failed else 1.0), *bounds)
        hand, learned = -0.1 * g, -0.5 * np.sign(g)
        used = np.linalg.norm(learned) / np.linalg.norm(hand)
        capped = learned * min(1.0, ratio / used)
        updates.append(trust * capped + (1 - trust) * hand)
        ratios.append(ratio)
        previous = g
    return updates, ratios


@pytest.mark.parametrize(
    "losses",
    [
        np.linspace(2.0, 1.0, 12),
        1.0 + 0.1 * np.sin(np.arange(12.0)),
        np.append(np.linspace(2.0, 1.5, 9), 5.0),
    ],
    ids=["falling", "noisy", "jump"],
)
@pytest.mark.parametrize(
    "options", [{}, {"ratio": 1.5, "grow": 1.5, "shrink": 0.2, "optimism": 1.0}]
)
def test_updates_equal_their_definition(losses, options):
    updates, states = follow(hub_trust(optax.sgd(0.1), SIGN, **options), losses)
    expected, ratios = trust_oracle(losses, **options)
    for u, state, e, rho in zip(updates, states, expected, ratios, strict=True):
        np.testing.assert_allclose(u["w"], e, rtol=2e-4, atol=1e-6)
        np.testing.assert_allclose(hub_diagnostics(state)["ratio"]["w"], rho, rtol=1e-4)


@pytest.mark.parametrize("group", ["tensor", "global"])
@pytest.mark.parametrize("size", [0.5, 50.0])
def test_the_plain_trust_region_caps_the_norm(group, size):
    """U = U_L min(1, rho |U_H| / |U_L|), to the letter."""
    learned = optax.chain(optax.scale_by_sign(), optax.scale(-size))
    ((updates,), _) = follow(hub_trust(optax.sgd(1.0), learned, group=group, **FIXED), [1.0])
    g = jax.tree.map(np.float64, gradients(0))
    for names in [("w",), ("b",)] if group == "tensor" else [("w", "b")]:
        hand = np.concatenate([g[name] for name in names])
        full = -size * np.sign(hand)
        expected = full * min(1.0, 2.0 * np.linalg.norm(hand) / np.linalg.norm(full))
        actual = np.concatenate([updates[name] for name in names])
        np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_rho_moves_with_the_loss_alone_if_so_told():
    optimizer = hub_trust(optax.sgd(0.1), SIGN, fall_back=False, ratio=2.0, bounds=(0.1, 4.0))
    losses = np.concatenate([np.linspace(9.0, 1.0, 40), [50.0, 1.0, np.nan]])
    _, states = follow(optimizer, losses)
    ratios = np.stack([state.rules["trust"].ratio["w"] for state in states])
    assert ratios[39] == 4.0 and np.all(np.diff(ratios[:40]) >= 0)
    np.testing.assert_allclose(ratios[40] / ratios[39], 0.5)
    np.testing.assert_allclose(ratios[42] / ratios[41], 0.5)
    assert states[-1].rules["trust"].failures == 2


# --- what the loss tells


def test_noise_is_no_failure_and_a_rise_is():
    rng = np.random.default_rng(0)
    noise = 1.0 + 0.3 * rng.normal(size=300)
    optimizer = hub_trust(optax.sgd(0.1), SIGN)
    _, states = follow(optimizer, noise)
    assert states[-1].rules["trust"].failures <= 3  # of 300
    _, states = follow(optimizer, np.concatenate([noise[:50], noise[:20] + np.arange(20.0)]))
    assert states[-1].rules["trust"].failures > states[49].rules["trust"].failures


def test_the_loss_is_watched_again_some_time_after_one_whose_square_overflows():
    losses = np.append(np.ones(1802), 100.0)
    losses[1] = 1e20
    start = trust_mixer(TrustSettings()).init({}).loss
    end, failed = jax.jit(
        lambda: jax.lax.scan(lambda s, v: ((s := _follow_loss(s, v)), s.failed), start, losses)
    )()
    assert failed[-1] and np.isfinite(end.trend.square)


def test_after_a_failure_trust_is_earned_anew():
    steady = {"w": np.float32([1.0, 2.0, 3.0, 4.0]), "b": np.float32([1.0, 2.0])}
    losses = np.concatenate([np.linspace(2.0, 1.0, 15), [100.0], np.linspace(1.0, 0.1, 60)])
    _, states = follow(hub_trust(optax.sgd(0.1), SIGN), losses, lambda step: steady)
    share = [float(state.mean_weight["w"]) for state in states]
    assert share[0] > 0.9 and share[14] < 0.1 and share[15] > 0.9 and share[-1] < 0.1


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_nothing_depends_on_the_scale_of_the_loss(scale):
    hand = optax.chain(optax.scale_by_sign(), optax.scale(-0.1))
    learned = optax.chain(optax.normalize_by_update_norm(eps=1e-30), optax.scale(-0.5))
    losses = 1.0 + 0.2 * np.random.default_rng(1).normal(size=12)
    plain, _ = follow(hub_trust(hand, learned), losses)
    scaled, _ = follow(
        hub_trust(hand, learned),
        scale * losses,
        lambda step: jax.tree.map(lambda g: np.float32(scale) * g, gradients(step)),
    )
    chex.assert_trees_all_close(scaled, plain, rtol=1e-3)


# --- what it is for


CURVATURE = np.float32(np.logspace(-1.5, 0, 20))


def train(optimizer, noise, num_steps=250, seeds=4):
    """Final losses of runs on a quadratic whose gradients have noise of their own curvature."""

    def loss_fn(params):
        return 0.5 * jnp.sum(CURVATURE * params["x"] ** 2)

    def one(key):
        params = {"x": 3.0 * jax.random.normal(key, (20,))}

        def step(carry, index):
            params, state = carry
            e = (
                noise
                * jnp.sqrt(CURVATURE)
                * jax.random.normal(jax.random.fold_in(key, index), (20,))
            )
            value, g = jax.value_and_grad(lambda p: loss_fn(p) + jnp.dot(e, p["x"]))(params)
            updates, state = optimizer.update(g, state, params, value=value)
            return (optax.apply_updates(params, updates), state), None

        carry, _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(num_steps))
        return loss_fn(carry[0])

    optimizer = optax.with_extra_args_support(optimizer)
    return np.asarray(jax.jit(jax.vmap(one))(jax.vmap(jax.random.key)(jnp.arange(seeds))))


HAND = optax.adam(0.03)


@functools.cache
def by_hand(noise):
    return train(HAND, noise)


def exploding():
    return optax.chain(optax.adam(0.03), optax.scale_by_schedule(lambda step: 1.05**step))


def turning():
    """Good for 125 steps, then ascending."""
    sign = optax.scale_by_schedule(lambda step: jnp.where(step < 125, 2.0, -2.0))
    return optax.chain(optax.adam(0.03), sign)


def turning_nan():
    return optax.chain(
        optax.adam(0.06), optax.scale_by_schedule(lambda step: jnp.where(step < 50, 1.0, jnp.nan))
    )


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize(
    "learned",
    [optax.adam(-0.03), optax.adam(0.003), optax.set_to_zero(), optax.sgd(-1.0)],
    ids=["ascends", "ten times too small", "stands still", "ascends faster and faster"],
)
def test_a_learned_optimizer_without_any_use_does_no_harm_in_any_run(learned, noise):
    assert np.all(train(hub_trust(HAND, learned), noise) < 1.05 * by_hand(noise) + 1e-4)


@pytest.mark.parametrize("learned", [exploding(), turning(), turning_nan()], ids=range(3))
def test_what_fails_later_leaves_every_run_better_than_by_hand(learned):
    assert np.all(train(hub_trust(HAND, learned), 0.5) < 1.05 * by_hand(0.5))


def test_a_learned_optimizer_that_does_well_is_followed():
    """More than three times the learning rate, decayed to none."""
    learned = optax.adam(optax.cosine_decay_schedule(0.1, 250))
    guarded, alone = train(hub_trust(HAND, learned), 0.5), train(learned, 0.5)
    assert np.mean(alone) < 0.1 * np.mean(by_hand(0.5))
    assert np.mean(guarded) < 0.2 * np.mean(by_hand(0.5))


def test_the_two_together_can_do_better_than_either():
    """One too slow, the other too fast at the end."""
    learned = optax.adam(optax.linear_schedule(0.06, 0.006, 250))
    both = train(hub_trust(HAND, learned), 0.5)
    assert np.all(both < 0.8 * train(learned, 0.5)) and np.all(both < 0.8 * by_hand(0.5))


def test_the_mode_of_hub_is_this_function_with_its_defaults():
    losses = np.linspace(2.0, 1.0, 5)
    expected, _ = follow(hub_trust(optax.sgd(0.1), SIGN), losses)
    actual, _ = follow(hub(optax.sgd(0.1), SIGN, mode="trust"), losses)
    chex.assert_trees_all_equal(actual, expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ratio": 0.0}, "ratio must be positive and finite, got 0.0"),
        ({"ratio": 0.5}, r"ratio must be in bounds \(1.0, 20.0\), got 0.5"),
        ({"caution": float("nan")}, "caution must be finite, got nan"),
        ({"bounds": (3.0, 1.0)}, r"bounds must be .* 0 < low <= high, got \(3.0, 1.0\)"),
        ({"bounds": (1.0, float("inf"))}, "bounds must be .* got"),
        ({"grow": 0.9}, "grow must be at least 1 and finite, got 0.9"),
        ({"grow": float("inf")}, "grow must be at least 1 and finite, got inf"),
        ({"shrink": 1.5}, r"shrink must be in \[0, 1\], got 1.5"),
        ({"shrink": 0.0}, "shrink must be positive and finite, got 0.0"),
        ({"optimism": -1.0}, r"optimism must be in \[0, 1\], got -1.0"),
        ({"group": "tensors"}, "group must be one of .* did you mean 'tensor'"),
    ],
)
def test_bad_options_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=f"hub_trust: {message}"):
        hub_trust(optax.sgd(0.1), SIGN, **options)


def test_a_missing_loss_is_named():
    optimizer = hub_trust(optax.sgd(0.1), SIGN)
    with pytest.raises(
        ValueError, match=r"hub_trust .*: update needs the loss, got none; pass it as"
    ):
        optimizer.update(gradients(0), optimizer.init(PARAMS), PARAMS)
