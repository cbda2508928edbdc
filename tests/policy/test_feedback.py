"""What a closed loop observes, whom it follows, and how familiarity is measured."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.networks.feedback import Known, Observation, blank_observation, make_rule
from lohp_jax.networks.policy import Heads, NetworkConfig
from lohp_jax.policy.config import FeedbackConfig, HybridConfig
from lohp_jax.policy.feedback import (
    NUM_KNOWN,
    Turn,
    close_loop,
    condition_loss,
    draw_turn,
    familiarity,
    follow,
    rule_loss,
    trust_in,
)
from lohp_jax.policy.kernels import forward_kernel, make_policy, roll_out, unit_start
from lohp_jax.trajectories.dataset import Coordinates, make_space
from lohp_jax.types import TaskFamily, View
from lohp_jax.windows import cut_tokens, make_windows

KEY = jax.random.key(0)
SCALE = {"bias": 0.5, "weight": 2.0}
CONTEXT = {"target": jnp.array([1.0, -1.0, 3.0])}
NETWORK = NetworkConfig("mlp", (8,), embedding=8)
TEACHER, STEP = jnp.int32(0), jnp.int32(1)


def context_loss(params, context):
    weights = jnp.append(params["weight"], params["bias"])
    return jnp.sum((weights - context["target"]) ** 2)


FAMILY = TaskFamily(
    sample=lambda key, split="train": {"target": jax.random.normal(key, (3,))},
    init=lambda key: {"bias": jnp.ones(()), "weight": jax.random.normal(key, (2,))},
    loss=lambda params, data, key: context_loss(params, data),
    evaluate=lambda params, data: {"objective": context_loss(params, data), "loss": 0.0},
    context=lambda data, key: data,
    name="bowls",
    context_loss=context_loss,
)


def make_loop(config=FeedbackConfig(), family=FAMILY, network=NETWORK, channels=4):
    theta_0 = {"bias": jnp.float32(0.25), "weight": jnp.array([0.5, -0.5])}
    coordinates = Coordinates(theta_0, jax.tree.map(jnp.float32, SCALE), jnp.int32(0))
    space = make_space(family, coordinates, channels=channels, num_steps=2, num_teachers=1)
    return close_loop(make_policy(space, network, HybridConfig()), space, config), space


@functools.cache
def made():
    """A loop with random weights, its space, and a state."""
    loop, space = make_loop()
    params = loop.policy.network.init(KEY, CONTEXT)
    params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(KEY, p.shape), params)
    noise = jax.random.normal(jax.random.key(1), space.codec.mask.shape)
    return loop, space, params, jnp.where(space.codec.mask, noise, 0.0)


def test_the_gradient_is_that_of_the_context_loss_by_the_tokens():
    loop, space, _, state = made()
    params = space.codec.decode(state)
    seen = loop.observe(CONTEXT, state)
    bias, weight = 2 * (params["bias"] - 3), 2 * (params["weight"] - CONTEXT["target"][:2])
    expected = np.append(weight * SCALE["weight"], bias * SCALE["bias"])  # the chain rule
    rms = np.sqrt(np.mean(expected**2))
    decoded = space.codec.decode(seen.gradient)  # each leaf by its scale, from theta_0
    actual = [
        *((decoded["weight"] - space.theta_0["weight"]) / SCALE["weight"]),
        (decoded["bias"] - space.theta_0["bias"]) / SCALE["bias"],
    ]
    np.testing.assert_allclose(actual, expected / rms, rtol=1e-5)
    np.testing.assert_allclose(seen.log_rms, np.log(rms), rtol=1e-5)
    np.testing.assert_allclose(seen.log_loss, np.log(context_loss(params, CONTEXT)), rtol=1e-5)
    z, g = state[space.codec.mask], seen.gradient[space.codec.mask]
    squares, products, sizes = np.mean(z**2), np.mean(z * g), np.mean(np.abs(g))
    means = [np.log1p(squares), products / np.sqrt(1 + squares), sizes]
    np.testing.assert_allclose(seen.means, means, rtol=1e-5)
    assert seen.usable == 1 and (seen.gradient[~space.codec.mask] == 0).all()


def test_no_common_number_grows_faster_than_the_state():
    """A rule that is fed a square of the state doubles the exponent of its state at every step."""
    loop, _, _, state = made()
    for far in (1e3, 1e6, 1e9):
        seen = loop.observe(CONTEXT, far * state)
        common = jnp.stack([*seen.means, seen.log_rms, seen.log_loss])
        assert seen.usable == 1 and (jnp.abs(common) < 100).all()


def test_nothing_is_differentiated_through_an_observation():
    loop, _, _, state = made()
    grads = jax.jacobian(lambda state: loop.observe(CONTEXT, state))(state)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


def test_a_loop_that_sees_the_loss_alone_asks_for_no_gradient():
    @jax.custom_vjp
    def undifferentiable(params, context):
        return context_loss(params, context)

    def refuse(*_):
        raise AssertionError("differentiated")

    undifferentiable.defvjp(refuse, refuse)
    family = dataclasses.replace(FAMILY, context_loss=undifferentiable)
    loop, space = make_loop(FeedbackConfig(sees="loss"), family)
    _, _, _, state = made()
    seen = loop.observe(CONTEXT, state)
    assert (seen.gradient == 0).all() and seen.log_rms == 0 and seen.usable == 1
    loss = context_loss(space.codec.decode(state), CONTEXT)
    np.testing.assert_allclose(seen.log_loss, np.log(loss), rtol=1e-5)
    with pytest.raises(AssertionError, match="differentiated"):
        make_loop(FeedbackConfig(), family)[0].observe(CONTEXT, state)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, 1e30], ids=["nan", "inf", "overflow"])
def test_where_loss_or_gradient_are_not_finite_the_condition_is_followed(bad):
    loop, _, params, state = made()
    context = {"target": CONTEXT["target"].at[0].set(bad)}
    seen = loop.observe(context, state)
    assert seen.usable == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(seen))
    network = loop.policy.network
    embedding = loop.open.network.encode(params, CONTEXT, 1.0)
    looking = network.encode(params, CONTEXT, Turn(0.0, 1.0))._replace(context=context)
    alone = loop.open.network.heads(params, embedding, TEACHER, STEP, state)
    for actual, expected in zip(
        network.heads(params, looking, TEACHER, STEP, state), alone, strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_both_halves_are_added_as_far_as_they_are_followed():
    condition, rule = (Heads(*jnp.arange(4.0) + shift) for shift in (1.0, 10.0))
    both = follow(Turn(0.5, 1.0), jnp.float32(1), condition, rule)
    np.testing.assert_allclose(both, 0.5 * np.arange(1, 5) + np.arange(10, 14))


def test_the_heads_are_the_sum_of_condition_and_rule():
    loop, space, params, state = made()
    encode = functools.partial(loop.policy.network.encode, params, CONTEXT)

    def heads(*turn):
        looking = encode(Turn(*turn))
        return loop.policy.network.heads(params, looking, TEACHER, STEP, state)

    both, condition = heads(1.0, 1.0), heads(1.0, 0.0)
    looking = loop.blind.network.encode(params, CONTEXT, Turn(1.0, 1.0))
    rule = loop.blind.network.heads(params, looking, TEACHER, STEP, state)  # told of the condition
    for total, c, r in zip(both, condition, rule, strict=True):
        np.testing.assert_allclose(total, c + r, rtol=1e-5, atol=1e-6)
        assert np.abs(r[space.codec.mask]).min() > 0 and np.abs(c[space.codec.mask]).min() > 0


def test_the_rule_is_the_same_for_every_weight():
    """Swapping all that is seen of two weights of a layer swaps what is done with them."""
    loop, space, _, state = made()
    start = unit_start(space)
    rule = make_rule(widths=(6,), num_steps=2, forgotten=0.5)
    known = Known(jnp.asarray(space.codec.features[:, :-1]), jnp.ones_like(start))
    seen, trust = loop.observe(CONTEXT, state), jnp.float32(0.3)
    params = rule.init(KEY, seen, known, trust, STEP, state)
    params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(KEY, p.shape), params)
    assert max(p.size for p in jax.tree.leaves(params)) < 100  # none grows with the weights
    row = int(np.flatnonzero(space.codec.mask.sum(axis=1) == 2)[0])

    def swap(x):
        return x.at[row, :2].set(x[row, :2][::-1])

    heads = rule.apply(params, seen, known, trust, STEP, state)
    swapped_seen = seen._replace(gradient=swap(seen.gradient))
    swapped = rule.apply(params, swapped_seen, known, trust, STEP, swap(state))
    for actual, expected in zip(swapped, heads, strict=True):
        np.testing.assert_allclose(actual, swap(expected), rtol=1e-5, atol=1e-6)
    assert heads.drift[row, 0] != heads.drift[row, 1]


def test_the_untrained_rule_goes_down_from_where_it_is():
    """Alone, the mean of the next state is the state and a step along the negative gradient."""
    loop, _, _, state = made()
    params = loop.policy.network.init(KEY, CONTEXT)
    seen, mask = loop.observe(CONTEXT, state), loop.policy.codec.mask
    looking = loop.blind.network.encode(params, CONTEXT, Turn(0.0, 1.0))
    heads = loop.blind.network.heads(params, looking, TEACHER, STEP, state)
    mean = forward_kernel(loop.blind, heads, STEP, state).mean
    np.testing.assert_allclose(mean[mask], (state - 0.3 * seen.gradient)[mask], rtol=1e-5)
    assert all((head == 0).all() for head in heads[1:])
    looking = looking._replace(turn=Turn(1.0, 1.0))  # beside the condition it is a step alone
    beside = loop.blind.network.heads(params, looking, TEACHER, STEP, state)
    np.testing.assert_allclose(beside.drift, -0.3 * seen.gradient, rtol=1e-5)


def test_examples_of_training_take_turns():
    config = FeedbackConfig(condition_alone=0.2)
    turns = jax.vmap(functools.partial(draw_turn, config))(jax.random.split(KEY, 4000))
    np.testing.assert_allclose(np.mean(turns.rule == 0), 0.2, atol=0.03)
    assert (turns.condition == 1).all()


def test_the_policy_of_the_rule_alone_never_reads_the_condition():
    loop, _, params, state = made()
    without = {"rule": params["rule"]}
    looking = loop.blind.network.encode(without, CONTEXT, loop.blind.keep(KEY))
    alone = loop.blind.network.heads(without, looking, TEACHER, STEP, state)
    looking = loop.policy.network.encode(params, CONTEXT, Turn(0.0, 1.0))
    both = loop.policy.network.heads(params, looking, TEACHER, STEP, state)
    for actual, expected in zip(alone, both, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@functools.cache
def made_of_windows():
    """The same of two windows of two tokens, of which the last is padding."""
    loop, space = make_loop(network=NetworkConfig(widths=(8, 8), window=2), channels=1)
    params = loop.policy.network.init(KEY, CONTEXT)
    params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(KEY, p.shape), params)
    states = jax.random.normal(jax.random.key(1), (3, *space.codec.mask.shape))
    windows = make_windows(space.codec, 2)
    starts = cut_tokens(windows, unit_start(space))
    views = [View(jnp.int32(i), starts[i]) for i in range(windows.count)]
    return loop, space, params, states, windows, views


@pytest.mark.parametrize("half", ["policy", "open", "blind"])
def test_heads_along_windows_are_those_along_the_whole(half):
    loop, _, params, states, windows, views = made_of_windows()
    policy, turn = getattr(loop, half), Turn(0.7, 1.0)
    keep = 1.0 if half == "open" else turn
    seen = policy.network.encode(params, CONTEXT, keep)
    whole = policy.network.heads(params, seen, TEACHER, STEP, states[1])
    pieces = cut_tokens(windows, states[1])
    for view, piece in zip(views, pieces, strict=True):
        window = getattr(loop.at_window(view, states), half)
        seen = window.network.encode(params, CONTEXT, keep)
        own = window.network.heads(params, seen, TEACHER, STEP, piece)
        mask = window.codec.mask
        for actual, expected in zip(own, whole, strict=True):
            expected = cut_tokens(windows, expected)[view.index]
            assert np.abs(expected[mask]).min() > 0
            np.testing.assert_allclose(actual[mask], expected[mask], rtol=1e-5, atol=1e-6)


def test_a_window_is_looked_at_where_it_is_and_the_others_where_they_are_stored():
    loop, _, params, states, windows, views = made_of_windows()
    moved = cut_tokens(windows, states[1])[0] + 1.0
    seen = loop.policy.network.encode(params, CONTEXT, Turn(0.0, 1.0))
    own = loop.at_window(views[0], states).blind.network.heads(params, seen, TEACHER, STEP, moved)
    whole = states[1].at[:2].add(1.0)
    expected = loop.blind.network.heads(params, seen, TEACHER, STEP, whole)
    for actual, all_of_them in zip(own, expected, strict=True):
        np.testing.assert_allclose(actual, all_of_them[:2], rtol=1e-5, atol=1e-6)
    elsewhere = loop.at_window(views[0], states + 1.0).blind.network
    assert (elsewhere.heads(params, seen, TEACHER, STEP, moved).drift != own.drift).any()


def test_nothing_that_is_learned_grows_with_the_weights_but_a_vector_of_each_token():
    loop, *_ = made_of_windows()
    params = jax.eval_shape(loop.policy.network.init, KEY, CONTEXT)
    assert sum(3 in leaf.shape for leaf in jax.tree.leaves(params["network"])) == 1
    rule = made()[0].policy.network.init(KEY, CONTEXT)["rule"]
    shapes = jax.tree.map(jnp.shape, rule)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, params["rule"])


def test_familiarity_is_a_conformal_p_value():
    known = jnp.arange(1.0, 100.0)  # 99 of them
    for loss, expected in ((0.5, 1.0), (99.0, 0.02), (99.5, 0.01), (50.0, 0.51)):
        np.testing.assert_allclose(familiarity(known, jnp.float32(loss)), expected, rtol=1e-6)
    assert familiarity(known, jnp.nan) == familiarity(known, jnp.inf) == np.float32(0.01)
    draws = jax.random.normal(KEY, (2, 999))
    values = jax.vmap(functools.partial(familiarity, draws[0]))(draws[1])
    for level in (0.1, 0.5, 0.9):  # on tasks like those known it is uniform
        np.testing.assert_allclose(np.mean(values <= level), level, atol=0.05)


def test_trust_grows_from_nothing_beyond_all_known_losses_to_all_at_the_level():
    config = FeedbackConfig(level=0.05)
    known = {"condition": jnp.arange(1.0, 100.0), "rule": jnp.full(99, 0.1)}
    trusts = [
        float(trust_in(config, known, loss)) for loss in (99.5, 97.5, 95.5, 50.0, 0.5, np.inf)
    ]
    np.testing.assert_allclose(trusts, [0, 0.5, 1, 1, 1, 0], atol=1e-6)
    no_way = FeedbackConfig(sees="loss", level=0.05)  # to go without the condition
    assert trust_in(no_way, known, jnp.float32(99.5)) == 1


def test_the_condition_is_trusted_at_least_where_the_rule_alone_does_no_better():
    known = {"condition": jnp.zeros(100), "rule": jnp.arange(100.0)}  # all unfamiliar
    trusts = [float(trust_in(FeedbackConfig(), known, loss)) for loss in (1.0, 75.0, 99.5, np.inf)]
    np.testing.assert_allclose(trusts, [0.99, 0.25, 0, 0], atol=1e-6)


def test_the_condition_loss_is_that_of_the_open_loop():
    loop, space, params, _ = made()
    embedding = loop.open.network.encode(params, CONTEXT, 1.0)
    states = roll_out(loop.open, params, embedding, TEACHER, KEY, temperature=0.0)
    expected = context_loss(space.codec.decode(states[-1]), CONTEXT)
    actual = condition_loss(loop, space, params, CONTEXT, TEACHER)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_the_rule_loss_is_that_of_a_walk_that_never_reads_the_condition():
    loop, space, params, _ = made()
    looking = loop.policy.network.encode(params, CONTEXT, Turn(0.0, 1.0))
    states = roll_out(loop.policy, params, looking, TEACHER, KEY, temperature=0.0)
    expected = context_loss(space.codec.decode(states[-1]), CONTEXT)
    actual = rule_loss(loop, space, params, CONTEXT, TEACHER)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    other = params | {"network": jax.tree.map(lambda p: p + 1, params["network"])}
    assert rule_loss(loop, space, other, CONTEXT, TEACHER) == actual


def test_before_any_loss_is_known_every_task_is_familiar():
    loop, _, _, _ = made()
    known = loop.policy.network.init(KEY, CONTEXT)["known"]
    assert {half: losses.shape for half, losses in known.items()} == dict.fromkeys(
        ("condition", "rule"), (NUM_KNOWN,)
    )
    assert trust_in(FeedbackConfig(), known, jnp.float32(1e9)) == 1
    assert familiarity(known["condition"], jnp.float32(1e9)) == 1


def test_a_family_without_a_context_loss_is_refused():
    with pytest.raises(
        ValueError, match=r"the family 'bowls' has no context_loss.*give TaskFamily"
    ):
        make_loop(family=dataclasses.replace(FAMILY, context_loss=None))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sees": "gradients"}, "sees must be one of .*did you mean 'gradient'"),
        ({"objective": "cloning"}, "objective must be one of .*got 'cloning'"),
        ({"widths": ()}, "widths must be positive and at least one"),
        ({"rule_alone": 0.0}, r"rule_alone must be positive, got 0\.0"),
        ({"condition_alone": 1.0}, "condition_alone must lie between 0 and 1"),
        ({"level": 0.0}, r"level must be in \(0, 1\]"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FeedbackConfig(**settings)


def test_an_observation_of_zeros_has_the_shape_of_one():
    loop, space, _, state = made()
    blank, seen = blank_observation(*space.codec.mask.shape), loop.observe(CONTEXT, state)
    assert isinstance(blank, Observation)
    assert jax.tree.map(np.shape, blank) == jax.tree.map(np.shape, seen)
