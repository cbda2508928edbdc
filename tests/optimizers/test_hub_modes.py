"""What every mode of `hub` must keep, whatever its rule: optax's contract, and a guard that counts."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax.optimizers.hub import hub, hub_diagnostics

MODES = ("vanilla", "invert", "trust", "spike", "online")
modes = pytest.mark.parametrize("mode", MODES)
PARAMS = {"body": {"w": np.ones((4, 2), np.float32)}, "head": {"b": np.full(8, 0.5, np.float32)}}
ADAM, FASTER = optax.adam(0.01), optax.adam(0.03, b1=0.5)


def normal(seed=0, scale=1.0, like=PARAMS):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(0, scale, p.shape), p.dtype), like)


def run(optimizer, num_steps=4, params=PARAMS, transform=jax.jit, gradients=normal, **extra):
    """Parameters after a few steps, and the last state."""
    state, update = optimizer.init(params), transform(optimizer.update)
    for step in range(num_steps):
        value = jnp.float32(1.0 / (1.0 + step))
        updates, state = update(gradients(step, like=params), state, params, value=value, **extra)
        params = optax.apply_updates(params, updates)
    return params, state


@functools.cache
def plain(mode):
    optimizer = hub(ADAM, FASTER, mode=mode)
    return optimizer, jax.jit(optimizer.update)


@functools.cache
def reference(mode):
    optimizer, update = plain(mode)
    return run(optimizer, transform=lambda _: update)[0]


@modes
def test_eager_equals_jit(mode):
    params, _ = run(hub(ADAM, FASTER, mode=mode), 2, transform=lambda f: f)
    expected, _ = run(plain(mode)[0], 2, transform=lambda _: plain(mode)[1])
    chex.assert_trees_all_close(params, expected, rtol=1e-5)


@modes
def test_one_entry_is_between_both_updates(mode):
    """Every mode interpolates, per entry, between the hand-designed and (part of) the learned update."""
    optimizer, update = plain(mode)
    state = optimizer.init(PARAMS)
    for step in range(4):
        gradients = normal(step)
        hand, _ = ADAM.update(gradients, state.hand_designed)
        learned, _ = FASTER.update(gradients, state.learned)
        updates, state = update(gradients, state, PARAMS, value=1.0)
        for u, h, l in zip(*map(jax.tree.leaves, (updates, hand, learned)), strict=True):
            candidates = [h, l, np.zeros_like(h)] if mode == "trust" else [h, l]
            assert np.all(u >= np.min(candidates, axis=0) - 1e-6)
            assert np.all(u <= np.max(candidates, axis=0) + 1e-6)


@modes
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_does_not_overflow(mode, dtype):
    """And ends where single precision does, but for the rounding of the parameters."""
    params = jax.tree.map(lambda p: jnp.asarray(p, dtype), PARAMS)

    def large(step, like):
        rounded = normal(step, 1e4, params)
        return jax.tree.map(lambda g, p: g.astype(p.dtype), rounded, like)

    optimizer = hub(optax.sgd(1e-6), optax.sgd(1e-5), mode=mode)
    after, _ = run(optimizer, 3, params, gradients=large)
    single, _ = run(optimizer, 3, PARAMS, gradients=large)
    chex.assert_trees_all_equal_dtypes(after, params)
    chex.assert_trees_all_close(
        jax.tree.map(jnp.float32, after), single, rtol=4 * float(jnp.finfo(dtype).eps), atol=2e-3
    )


@modes
def test_the_rule_survives_large_gradients(mode):
    """Of size 1e4 in float32, it gives what it gives in float64."""
    large = functools.partial(normal, scale=1e4)
    params, _ = run(hub(ADAM, FASTER, mode=mode), gradients=large)
    with jax.enable_x64(True):
        wide = jax.tree.map(np.float64, PARAMS)
        expected, state = run(hub(ADAM, FASTER, mode=mode), params=wide, gradients=large)
        chex.assert_trees_all_equal_dtypes(state, hub(ADAM, FASTER, mode=mode).init(wide))
    chex.assert_trees_all_close(params, expected, rtol=1e-3)


@modes
def test_squares_that_overflow_leave_an_update_between_both(mode):
    """Of gradients, or updates, of size 1e20: finite, with all that follows from them."""

    @jax.jit
    def update(arms, gradients, state):
        return hub(*map(optax.sgd, arms), mode=mode).update(gradients, state, PARAMS, value=1.0)

    for arms in [(1.0, 2.0), (1e-12, 1.0), (1.0, 1e-12), (1e-24, 1e-22)]:
        state = hub(*map(optax.sgd, arms), mode=mode).init(PARAMS)
        for step, size in enumerate([1.0, 1e20, 1e20, 1.0]):
            gradients = normal(step, scale=size)
            updates, state = update(arms, gradients, state)
            for u, g in zip(*map(jax.tree.leaves, (updates, gradients)), strict=True):
                rates = -np.float64(u) / np.float64(g)
                least = 0.0 if mode == "trust" else min(arms)
                assert rates.min() >= 0.99999 * least and rates.max() <= 1.00001 * max(arms)
        chex.assert_tree_all_finite(state.rules)


@modes
def test_it_stands_in_a_chain_and_behind_a_mask(mode):
    inner = hub(ADAM, FASTER, mode=mode)
    chained, state = run(optax.chain(optax.clip_by_global_norm(1e9), inner))
    chex.assert_trees_all_close(chained, reference(mode), rtol=1e-6)
    assert hub_diagnostics(state)["mean_weight"].keys() == {"body/w", "head/b"}
    params = PARAMS | {"frozen": {"steps": np.int32([3])}}
    mask = {"body": {"w": True}, "head": {"b": True}, "frozen": {"steps": False}}
    masked = optax.masked(inner, mask)
    gradients = {**normal(0), "frozen": {"steps": np.int32([1])}}
    updates, _ = jax.jit(masked.update)(gradients, masked.init(params), params, value=1.0)
    expected, _ = plain(mode)[1](normal(0), inner.init(PARAMS), PARAMS, value=1.0)
    chex.assert_trees_all_close({k: updates[k] for k in expected}, expected, rtol=1e-6)
    assert updates["frozen"]["steps"] == 1


@modes
def test_it_stands_behind_multi_steps(mode):
    """Two micro-steps with the mean gradient equal one step with it."""
    mean = normal(0)
    halves = [jax.tree.map(lambda g, f=f: f * g, mean) for f in (0.5, 1.5)]
    accumulated = optax.MultiSteps(hub(ADAM, FASTER, mode=mode), 2)
    state, step = accumulated.init(PARAMS), jax.jit(accumulated.update)
    for gradients in halves:
        updates, state = step(gradients, state, PARAMS, value=1.0)
    inner, update = plain(mode)
    expected, _ = update(mean, inner.init(PARAMS), PARAMS, value=1.0)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)


@modes
def test_its_learning_rate_can_be_injected(mode):
    @optax.inject_hyperparams
    def with_rate(learning_rate):
        return hub(optax.adam(learning_rate), FASTER, mode=mode)

    params, _ = run(with_rate(0.01))
    chex.assert_trees_all_close(params, reference(mode), rtol=1e-5)


@modes
def test_vmap_over_seeds_equals_a_loop(mode):
    optimizer, update = plain(mode)
    state, together, count = optimizer.init(PARAMS), jax.jit(jax.vmap(optimizer.update)), 2
    params, states = jax.tree.map(lambda x: jnp.stack([x] * count), (PARAMS, state))
    alone = [state] * count
    for step in range(3):
        gradients = [normal(10 * step + seed) for seed in range(count)]
        losses = jnp.float32([1.0 - 0.1 * step, 2.0 + step])
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *gradients)
        updates, states = together(stacked, states, params, value=losses)
        for seed in range(count):
            one, alone[seed] = update(gradients[seed], alone[seed], PARAMS, value=losses[seed])
            its = jax.tree.map(lambda leaf, i=seed: leaf[i], updates)
            chex.assert_trees_all_close(its, one, rtol=1e-5, atol=1e-7)


@modes
def test_no_gradient_and_no_loss_beyond_the_usual_ones_is_asked_for(mode):
    """Both functions reach the arms alone, which here do not call them."""
    seen = []

    def forbidden(*_):
        raise AssertionError("no gradient and no loss beyond the usual ones")

    def spy(updates, state, params=None, **extra):
        seen.append(extra["grad_fn"] is extra["value_fn"] is forbidden)
        return updates, state

    arm = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), spy)
    optimizer, extra = hub(arm, arm, mode=mode), {"grad_fn": forbidden, "value_fn": forbidden}
    state = jax.eval_shape(optimizer.init, PARAMS)
    jax.eval_shape(lambda s: optimizer.update(PARAMS, s, PARAMS, value=1.0, **extra), state)
    assert seen[-2:] == [True, True]


@modes
def test_state_and_parameters_can_be_donated_and_keep_their_types(mode):
    optimizer = hub(ADAM, FASTER, mode=mode)
    params = jax.tree.map(jnp.array, PARAMS)
    state = optimizer.init(params)
    step = jax.jit(optimizer.update, donate_argnums=1)
    structure = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for seed in range(2):
        updates, state = step(normal(seed), state, params, value=1.0)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == structure
    chex.assert_tree_all_finite(updates)


@modes
def test_empty_scalar_and_missing_leaves_pass(mode):
    params = {"e": np.zeros((0, 3), np.float32), "s": np.float32(2.0), "n": None}
    optimizer = hub(ADAM, FASTER, mode=mode)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for _ in range(2):
        updates, state = update(params, state, params, value=1.0)
    assert updates["e"].shape == (0, 3) and updates["n"] is None
    assert np.isfinite(updates["s"]) and updates["s"] < 0
    assert list(hub_diagnostics(state)["mean_weight"]) == ["s"]


@modes
def test_integer_leaves_are_refused_by_init(mode):
    with pytest.raises(
        ValueError, match=r"hub: expected floating-point .* int32 at a; leave it out"
    ):
        hub(ADAM, FASTER, mode=mode).init({"a": np.int32([1])})


# --- what goes wrong at run time


@functools.cache
def guarded(mode):
    optimizer = hub(ADAM, FASTER, mode=mode, guard="finite")
    return optimizer, jax.jit(optimizer.update)


@modes
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("when", [{2}, {0, 1, 2, 3}], ids=["once", "again and again"])
def test_a_gradient_that_is_not_finite_moves_nothing_and_leaves_no_trace(mode, bad, when):
    optimizer, update = guarded(mode)
    params, state = PARAMS, optimizer.init(PARAMS)
    for step in range(5):
        gradients = normal(step)
        if step in when:
            gradients["body"]["w"] = gradients["body"]["w"].at[0, 0].set(bad)
        updates, state = update(gradients, state, params, value=1.0)
        assert np.any(updates["head"]["b"] != 0)
        assert np.any(updates["body"]["w"] != 0) == (step not in when)
        params = optax.apply_updates(params, updates)
    chex.assert_tree_all_finite((params, state))
    assert hub_diagnostics(state)["guard_events"] == len(when)


def failing(rate, when):
    """Adam whose updates of `body/w` are NaN at the steps in `when`, as is its state from then on."""
    adam = optax.adam(rate)

    def update(updates, state, params=None):
        step = optax.tree.get(state, "count")
        updates, state = adam.update(updates, state, params)
        bad = jnp.isin(step, jnp.asarray(when))

        def spoil(tree):
            w = tree["body"]["w"]
            return tree | {"body": {"w": jnp.where(bad, jnp.nan, w)}}

        mu = spoil(optax.tree.get(state, "mu"))
        return spoil(updates), optax.tree.set(state, mu=mu)

    return optax.GradientTransformation(adam.init, update)


@modes
@pytest.mark.parametrize("arm", ["learned", "hand-designed"])
def test_an_optimizer_that_fails_starts_anew(mode, arm):
    """A failed learned update is replaced, a failed hand-designed one moves nothing."""
    broken = failing(0.03, [2])
    arms = (ADAM, broken) if arm == "learned" else (broken, FASTER)
    optimizer = hub(*arms, mode=mode, guard="finite")
    params, state = PARAMS, optimizer.init(PARAMS)
    update = jax.jit(optimizer.update)
    for step in range(4):
        hand, _ = ADAM.update(normal(step), state.hand_designed, params)
        updates, state = update(normal(step), state, params, value=1.0)
        if step == 2:
            expected = hand["body"]["w"] if arm == "learned" else np.zeros((4, 2))
            np.testing.assert_allclose(updates["body"]["w"], expected, rtol=1e-5)
        params = optax.apply_updates(params, updates)
    chex.assert_tree_all_finite((params, state))
    assert hub_diagnostics(state)["guard_events"] == 1


@modes
def test_a_loss_that_is_not_finite_never_reaches_the_parameters(mode):
    """The learned optimizer is one whose update is the loss itself."""

    def by_loss(updates, state, params=None, *, value, **_):
        return jax.tree.map(lambda u: -0.01 * value * u, updates), state

    learned = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), by_loss)
    optimizer = hub(ADAM, learned, mode=mode, guard="finite")
    params, state, losses = PARAMS, optimizer.init(PARAMS), [1.0, np.nan, 0.9, np.inf, np.nan]
    update = jax.jit(optimizer.update)
    for step, loss in enumerate(losses):
        updates, state = update(normal(step), state, params, value=loss)
        params = optax.apply_updates(params, updates)
    chex.assert_tree_all_finite((params, state))
    assert hub_diagnostics(state)["guard_events"] == 2 * 3  # tensors, steps


@pytest.mark.parametrize("mode", ["trust", "spike", "online"])
def test_bounds_of_the_softmax_are_refused_elsewhere(mode):
    message = rf"hub: clip bounds the softmax of .*, got \(0.1, 0.9\) with mode '{mode}'"
    with pytest.raises(ValueError, match=message):
        hub(ADAM, FASTER, mode=mode, clip=(0.1, 0.9))
    by_path = hub(ADAM, FASTER, mode=lambda path: mode, clip=(0.1, 0.9))
    with pytest.raises(ValueError, match=message):
        by_path.init(PARAMS)


def test_trust_needs_the_loss():
    optimizer = hub(ADAM, FASTER, mode="trust")
    with pytest.raises(
        ValueError, match=r"trust.*update needs the loss, got none; pass .*value=loss"
    ):
        optimizer.update(normal(), optimizer.init(PARAMS), PARAMS)


# --- modes by path


@pytest.mark.parametrize("one, other", [("vanilla", "trust"), ("spike", "online")])
def test_every_tensor_can_have_its_own_mode(one, other):
    """And is then moved as if all tensors had it."""
    mixed, state = run(hub(ADAM, FASTER, mode=lambda path: one if path[0] == "body" else other))
    chex.assert_trees_all_close(mixed["body"], reference(one)["body"], rtol=1e-6)
    chex.assert_trees_all_close(mixed["head"], reference(other)["head"], rtol=1e-6)
    read = hub_diagnostics(state)
    assert read["mean_weight"].keys() == {"body/w", "head/b"}
    reading = {"trust": "ratio", "online": "alpha"}[other]
    assert list(read[reading]) == ["head/b"]


@pytest.mark.parametrize("ours", ["trust", "spike", "online"])
def test_our_modes_are_guarded_and_their_neighbours_are_as_published(ours):
    mode = lambda path: ours if path[0] == "body" else "vanilla"  # noqa: E731
    everywhere = optax.stateless(lambda u, _: jax.tree.map(lambda x: x * jnp.nan, u))
    optimizer = hub(ADAM, everywhere, mode=mode)
    updates, state = optimizer.update(normal(), optimizer.init(PARAMS), PARAMS, value=1.0)
    assert np.isfinite(updates["body"]["w"]).all() and np.isnan(updates["head"]["b"]).all()
    assert hub_diagnostics(state)["guard_events"] == 1


def test_names_may_look_like_those_of_rules():
    params = {"w": np.ones(2, np.float32), "w (spike)": np.ones(3, np.float32)}
    mode = lambda path: "spike" if path[0] == "w" else "vanilla"  # noqa: E731
    _, state = run(hub(ADAM, FASTER, mode=mode), 2, params)
    assert hub_diagnostics(state)["mean_weight"].keys() == params.keys()


def test_modes_that_share_the_name_of_a_group_are_told_apart():
    mode = lambda path: "spike" if path[0] == "head" else "online"  # noqa: E731
    params, state = run(hub(ADAM, FASTER, mode=mode, group="global"))
    assert hub_diagnostics(state)["mean_weight"].keys() == {"all", "all (spike)"}
    chex.assert_tree_all_finite(params)


# --- sharded parameters


def sharded_run(mode, sharding=None):
    params = jax.tree.map(jnp.asarray, PARAMS)
    if sharding is not None:
        params = jax.device_put(params, sharding)
    optimizer = hub(ADAM, FASTER, mode=mode)
    state = jax.jit(optimizer.init)(params)
    update = jax.jit(optimizer.update)
    for step in range(4):
        gradients = jax.tree.map(lambda g, p: jax.device_put(g, p.sharding), normal(step), params)
        updates, state = jax.block_until_ready(update(gradients, state, params, value=1.0))
        params = jax.block_until_ready(optax.apply_updates(params, updates))
    moments = (optax.tree.get(arm, "mu") for arm in (state.hand_designed, state.learned))
    split = [
        len(x.devices()) for x in jax.tree.leaves((params, *moments)) if not x.is_fully_replicated
    ]
    return jax.tree.map(np.asarray, params), split


def main():
    """On eight devices, over which the columns of no tensor fit: rows of `w` by 4, `b` by 8."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec
    sharding = {
        "body": {"w": jax.sharding.NamedSharding(mesh, spec("x", "y"))},
        "head": {"b": jax.sharding.NamedSharding(mesh, spec(("x", "y")))},
    }
    out, split = {}, {}
    for mode in MODES:
        params, split[mode] = sharded_run(mode, sharding)
        out[mode] = [np.ravel(leaf).tolist() for leaf in jax.tree.leaves(params)]
    print(json.dumps({"split": split, "params": out}))


@pytest.mark.slow
def test_eight_devices_equal_one():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "NPROC": "16",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parents[2]), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    written = json.loads(done.stdout.splitlines()[-1])
    for mode in MODES:
        assert written["split"][mode] == [8] * 6, mode  # two tensors, and two moments of each
        expected, _ = sharded_run(mode)
        for actual, leaf in zip(written["params"][mode], jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(actual, np.ravel(leaf), rtol=1e-5, atol=1e-7)


if __name__ == "__main__":
    main()
