import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from lohp_jax.optimizers import hub, make_optimizer, pretrained_optimizer, sam, with_extra_args
from lohp_jax.tasks import make_family
from lohp_jax.trajectories.rollout import diverged, over_tasks, rollout
from lohp_jax.types import TaskFamily, Trajectory

KEY = jax.random.key(0)
PARAMS = {"w": np.float32([1.0, -2.0, 0.5]), "b": np.float32(0.5)}
TARGET = np.float32([0.3, 0.1, -0.7])


def bowl_loss(params, data, key):
    del key
    return jnp.sum((params["w"] - data) ** 4) + (params["w"][0] - params["b"]) ** 2


def noisy_loss(params, data, key):
    return bowl_loss(params, data, key) + jnp.vdot(params["w"], jax.random.normal(key, (3,)))


def family_of(loss):
    return TaskFamily(sample=None, init=None, loss=loss, evaluate=None, context=None)


BOWL = family_of(bowl_loss)


def loop(optimizer, params, data, num_steps):
    """All states and losses of a plain Python loop of optax steps."""
    states, losses = [params], [bowl_loss(params, data, None)]
    opt_state = optimizer.init(params)
    for _ in range(num_steps):
        gradient = jax.grad(bowl_loss)(params, data, None)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        states.append(params)
        losses.append(bowl_loss(params, data, None))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *states), np.stack(losses)


def sam_by_hand(learning_rate, rho=0.05):
    """SAM with its loss known, so that it needs no more than any other optimizer."""

    def update(gradient, state, params):
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))
        climbed = jax.tree.map(lambda p, g: p + rho * g / norm, params, gradient)
        descent = jax.grad(bowl_loss)(climbed, TARGET, None)
        return jax.tree.map(lambda g: -learning_rate * g, descent), state

    return optax.GradientTransformation(lambda params: (), update)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "name, expected",
    [
        ("sgd:0.02", optax.sgd(0.02)),
        ("momentum:0.01", optax.sgd(0.01, momentum=0.9)),
        ("adam:0.1", optax.adam(0.1)),
        ("adamw:0.1", optax.adamw(0.1)),
        ("sam:0.02", sam_by_hand(0.02)),
    ],
)
def test_rollout_equals_a_loop_of_steps(name, expected, transform):
    optimizer = make_optimizer(name)
    run = transform(lambda data: rollout(BOWL, optimizer, data, PARAMS, KEY, num_steps=6))
    trajectory = run(TARGET)
    states, losses = loop(expected, PARAMS, TARGET, num_steps=6)
    chex.assert_trees_all_close(trajectory.states, states, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(trajectory.losses, losses, rtol=1e-4)
    chex.assert_trees_all_equal(jax.tree.map(lambda s: s[0], trajectory.states), PARAMS)
    assert trajectory.losses.shape == (7,)
    assert trajectory.optimizer is None


def test_record_every_keeps_every_nth_state_and_its_loss():
    family = family_of(noisy_loss)
    run = functools.partial(rollout, family, optax.sgd(0.02), TARGET, PARAMS, KEY, num_steps=6)
    whole = run()
    for record_every in (2, 3, 6):
        expected = jax.tree.map(lambda leaf, n=record_every: leaf[::n], whole)
        chex.assert_trees_all_close(run(record_every=record_every), expected, rtol=1e-6)


def test_every_step_has_noise_of_its_own_shared_by_its_loss_and_gradient():
    family = family_of(lambda params, data, key: jnp.vdot(params, jax.random.normal(key, (2,))))
    start = np.float32([1.0, 2.0])
    states, losses, _ = rollout(family, optax.sgd(1.0), None, start, KEY, num_steps=8)
    noise = -np.diff(states, axis=0)
    np.testing.assert_allclose(
        losses[:-1], np.sum(noise * states[:-1], axis=1), rtol=1e-4, atol=1e-6
    )
    assert len({tuple(row) for row in noise.round(3).tolist()}) == 8
    other = rollout(family, optax.sgd(1.0), None, start, jax.random.key(1), num_steps=8)
    assert not np.any(np.isclose(np.diff(other.states, axis=0), -noise))
    again = rollout(family, optax.sgd(1.0), None, start, KEY, num_steps=8)
    np.testing.assert_array_equal(again.states, states)


def test_sam_climbs_on_the_noise_of_its_step():
    """With a linear loss both gradients of a step are its noise, so that SAM steps as SGD does."""
    family = family_of(lambda params, data, key: jnp.vdot(params, jax.random.normal(key, (2,))))
    start = np.float32([1.0, 2.0])
    states = [
        rollout(family, optimizer, None, start, KEY, num_steps=5).states
        for optimizer in (sam(optax.sgd(0.1)), optax.sgd(0.1))
    ]
    np.testing.assert_allclose(*states, rtol=1e-6)


def test_vmap_over_tasks_starts_and_learning_rates_equals_a_loop():
    rng = np.random.default_rng(0)
    data = rng.normal(size=(4, 3)).astype(np.float32)
    starts = jax.tree.map(lambda p: p + np.float32(rng.normal(size=(4, *p.shape))), PARAMS)
    keys = jax.random.split(KEY, 4)
    rates = np.float32([1e-3, 3e-3, 1e-2, 2e-2])

    def run(data, start, key, rate):
        return rollout(family_of(noisy_loss), optax.adam(rate), data, start, key, num_steps=5)

    batch = jax.jit(jax.vmap(run))(data, starts, keys, rates)
    for i in range(4):
        start = jax.tree.map(lambda leaf, i=i: leaf[i], starts)
        expected = run(data[i], start, keys[i], float(rates[i]))
        actual = jax.tree.map(lambda leaf, i=i: leaf[i], batch)
        chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_over_tasks_equals_a_loop_in_one_compilation():
    starts = np.float32([[0.0, 1.0], [2.0, -1.0], [0.5, 0.5]])

    @chex.assert_max_traces(n=2)  # for a CPU and for anything else
    def run(scale, start):
        return {"sum": scale * start.sum(), "start": start}

    scales = np.float32([1.0, 2.0, 3.0])
    together = jax.jit(over_tasks(run))(scales, starts)
    np.testing.assert_allclose(together["sum"], [1.0, 2.0, 3.0])
    np.testing.assert_array_equal(together["start"], starts)


def test_one_compilation_serves_all_tasks_starts_and_learning_rates():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(data, params, key, rate):
        return rollout(BOWL, optax.sgd(rate), data, params, key, num_steps=4)

    ends = [
        run(TARGET * scale, PARAMS, jax.random.key(seed), rate).states["w"][-1]
        for scale, seed, rate in ((1, 0, 0.01), (2, 1, 0.01), (2, 1, 0.02))
    ]
    assert len({tuple(end.tolist()) for end in ends}) == 3


@pytest.mark.parametrize(
    "wrapped, alone",
    [
        (optax.MultiSteps(sam(optax.sgd(0.02)), 1), sam(optax.sgd(0.02))),
        (optax.GradientTransformation(*sam(optax.sgd(0.02))), sam(optax.sgd(0.02))),
        (hub(optax.MultiSteps(sam(optax.sgd(0.02)), 1), optax.sgd(0.1)), None),
    ],
    ids=["multi-steps", "plain-tuple", "arm-of-hub"],
)
def test_what_an_optimizer_takes_reaches_it_whatever_wraps_it(wrapped, alone):
    alone = alone or hub(sam(optax.sgd(0.02)), optax.sgd(0.1))
    actual, expected = (
        rollout(BOWL, optimizer, TARGET, PARAMS, KEY, num_steps=4) for optimizer in (wrapped, alone)
    )
    chex.assert_trees_all_close(actual, expected, rtol=1e-5)


def test_steps_may_be_gathered_around_a_learned_optimizer():
    optimizer = optax.MultiSteps(pretrained_optimizer("small", 2), 2)
    states = rollout(BOWL, optimizer, TARGET, PARAMS, KEY, num_steps=4).states["w"]
    np.testing.assert_array_equal(states[0], states[1])
    np.testing.assert_array_equal(states[2], states[3])
    assert np.all(states[1] != states[2]) and np.all(states[3] != states[4])


def test_an_update_is_offered_only_what_it_names():
    def update(gradient, state, params, value):
        return jax.tree.map(lambda g: -0.01 * value * g, gradient), state

    optimizer = optax.GradientTransformation(lambda params: (), update)
    states, losses, _ = rollout(BOWL, optimizer, TARGET, PARAMS, KEY, num_steps=1)
    gradient = jax.grad(bowl_loss)(PARAMS, TARGET, None)["w"]
    np.testing.assert_allclose(states["w"][1], PARAMS["w"] - 0.01 * losses[0] * gradient, rtol=1e-6)


@pytest.mark.parametrize("make", [optax.sgd, lambda rate: sam(optax.sgd(rate), rho=1e-6)])
def test_complex_parameters_go_downhill(make):
    centre = np.complex64(1 + 2j)
    family = family_of(lambda z, data, key: jnp.sum(jnp.abs(z - centre) ** 2))
    losses = rollout(family, make(0.1), None, np.zeros(1, np.complex64), KEY, num_steps=20).losses
    np.testing.assert_allclose(losses, 5 * 0.64 ** np.arange(21), rtol=1e-3)  # |1 - .2|^2 a step


@pytest.mark.parametrize("wrap", [lambda o: o, optax.chain, sam], ids=["alone", "chain", "sam"])
def test_line_searches_run(wrap):
    family = family_of(lambda x, data, key: jnp.sum(data * (x - 1.0) ** 2))
    run = jax.jit(
        lambda start: rollout(
            family, wrap(optax.lbfgs()), jnp.float32([1.0, 10.0, 100.0]), start, KEY, num_steps=10
        )
    )
    trajectory = run(jnp.zeros(3))
    if wrap is not sam:
        np.testing.assert_allclose(trajectory.states[-1], np.ones(3), atol=1e-4)
    assert trajectory.losses[-1] < 1e-2 * trajectory.losses[0]


A_PART = {"w": True, "b": False}
ALL_PARTS = {"w": "own", "b": "other"}
WRAPPERS = {
    "alone": lambda o: o,
    "chain": lambda o: optax.chain(optax.clip_by_global_norm(1e6), o),
    "masked": lambda o: optax.chain(
        optax.masked(o, A_PART), optax.masked(optax.sgd(0.01), {"w": False, "b": True})
    ),
    "multi_transform": lambda o: optax.multi_transform(
        {"own": o, "other": optax.sgd(0.01)}, ALL_PARTS
    ),
    "multi_steps": lambda o: optax.MultiSteps(o, 1),
    "apply_if_finite": lambda o: optax.apply_if_finite(o, 3),
    "arm_of_hub": lambda o: hub(o, o),
}
OF_OPTAX = {
    "sophia": lambda: optax.contrib.sophia(0.05),
    "lbfgs": optax.lbfgs,
    "polyak": lambda: optax.polyak_sgd(max_learning_rate=0.02),
    "sam": lambda: optax.contrib.sam(
        optax.sgd(0.02),
        optax.chain(optax.contrib.normalize(), optax.sgd(0.01)),
        sync_period=2,
        opaque_mode=True,
    ),
}

SOON = {("sophia", "chain"), ("sophia", "multi_transform"), ("lbfgs", "masked"), ("sam", "chain")}


@pytest.mark.parametrize(
    "name, wrapper",
    [
        pytest.param(n, w, marks=() if (n, w) in SOON else pytest.mark.slow)
        for n in OF_OPTAX
        for w in WRAPPERS
    ],
)
@jax.legacy_prng_key("allow")  # of `optax.contrib.sophia`
def test_what_asks_for_the_loss_works_behind_wrappers_or_says_why_not(name, wrapper):
    optimizer, masks = OF_OPTAX[name](), wrapper in ("masked", "multi_transform")
    if name == "sam":
        inner = optimizer
        optimizer = with_extra_args(inner)
    run = functools.partial(rollout, BOWL, data=TARGET, params=PARAMS, key=KEY, num_steps=5)
    if name == "lbfgs" and masks:
        with pytest.raises(
            ValueError, match=r"needs all parameters, .* by optax.masked .* in front"
        ):
            run(WRAPPERS[wrapper](optimizer))
        return
    trajectory = run(WRAPPERS[wrapper](optimizer))
    assert trajectory.losses[-1] < 0.9 * trajectory.losses[0]
    if not masks:
        alone = run(optimizer)
        chex.assert_trees_all_close(trajectory, alone, rtol=1e-5, atol=1e-6)
    if name == "sam" and wrapper == "chain":
        with pytest.raises(
            TypeError, match=r"takes some of .* wrap it in `lohp_jax.optimizers.with"
        ):
            run(WRAPPERS[wrapper](inner))


def test_a_line_search_within_a_subspace():
    """As the error of a line search within a mask says: what stays is set to zero in front of it."""
    others = optax.masked(optax.set_to_zero(), {"w": False, "b": True})
    trajectory = rollout(
        BOWL, optax.chain(others, optax.lbfgs()), TARGET, PARAMS, KEY, num_steps=10
    )
    np.testing.assert_array_equal(trajectory.states["b"], np.full(11, PARAMS["b"]))
    assert trajectory.losses[-1] < 1e-2 * trajectory.losses[0]


def test_double_precision_is_kept():
    with jax.enable_x64(True):
        params = jax.tree.map(np.float64, PARAMS)
        trajectory = rollout(BOWL, optax.adam(0.1), np.float64(TARGET), params, KEY, num_steps=3)
        assert {leaf.dtype for leaf in jax.tree.leaves(trajectory)} == {np.dtype(np.float64)}


@pytest.mark.parametrize("name", ["sgd", "adam", "sam"])
def test_default_learning_rates_solve_digits(name):
    family = make_family("digits_5way")
    theta_0 = family.init(KEY)

    def run(key):
        data = family.sample(key, "held_out")
        trajectory = rollout(family, make_optimizer(name), data, theta_0, key, num_steps=20)
        end = jax.tree.map(lambda leaf: leaf[-1], trajectory.states)
        return family.evaluate(end, data)["accuracy"], diverged(trajectory)

    accuracy, failed = jax.jit(jax.vmap(run))(jax.random.split(KEY, 4))
    assert not failed.any()
    assert accuracy.mean() > 0.9


@pytest.mark.parametrize(
    "num_steps, record_every, message",
    [
        (0, 1, r"num_steps=0 and record_every=1"),
        (6, 0, r"num_steps=6 and record_every=0; these do: \[1, 2, 3, 6\]"),
        (6, 4, r"num_steps=6 and record_every=4; these do: \[1, 2, 3, 6\]"),
        (6, 12, r"num_steps=6 and record_every=12"),
    ],
)
def test_rollout_rejects(num_steps, record_every, message):
    with pytest.raises(ValueError, match=f"rollout: .*{message}"):
        rollout(
            BOWL,
            optax.sgd(0.1),
            TARGET,
            PARAMS,
            KEY,
            num_steps=num_steps,
            record_every=record_every,
        )


def trajectory_with(states=(0.0, 1.0, 2.0), losses=(3.0, 4.0, 2.0)):
    return Trajectory({"a": jnp.array(states), "b": jnp.zeros((3, 2))}, jnp.array(losses), None)


@pytest.mark.parametrize(
    "trajectory, expected",
    [
        (trajectory_with(), False),
        (trajectory_with(losses=(3.0, 2.0, 3.0)), False),
        (trajectory_with(losses=(3.0, 2.0, 3.1)), True),
        (trajectory_with(losses=(3.0, np.nan, 2.0)), True),
        (trajectory_with(losses=(3.0, np.inf, 2.0)), True),
        (trajectory_with(losses=(np.inf, 3.0, 2.0)), True),
        (trajectory_with(losses=(3.0, 2.0, np.nan)), True),
        (trajectory_with(states=(0.0, np.nan, 2.0)), True),
        (trajectory_with(states=(0.0, 1.0, -np.inf)), True),
    ],
)
def test_diverged_finds_what_is_not_finite_or_grew(trajectory, expected):
    assert diverged(trajectory).shape == ()
    assert diverged(trajectory) == expected


def test_diverged_finds_a_learning_rate_that_is_too_large():
    def run(rate):
        return diverged(rollout(BOWL, optax.sgd(rate), TARGET, PARAMS, KEY, num_steps=5))

    np.testing.assert_array_equal(jax.vmap(run)(np.float32([1e-3, 1e-2, 1.0])), [0, 0, 1])
