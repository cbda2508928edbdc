"""The better of two optimizers, by the losses compared."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax.optimizers.lgl2o import lgl2o

CURVATURE = np.float32([1.0, 4.0])
START = {"x": np.float32([3.0, -2.0])}
modes = pytest.mark.parametrize("mode", ["race", "candidate"])


def loss_fn(params):
    return 0.5 * jnp.sum(CURVATURE * params["x"] ** 2)


def constant(value):
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda u: jnp.full_like(u, value), updates)
    )


def train(optimizer, steps, start=START, value_fn=loss_fn):
    """Parameters after every step, the last state, and how many gradients were taken."""
    calls = []

    def grad_fn(params, _):
        calls.append(None)  # once a step, as it is traced
        return jax.grad(loss_fn)(params)

    @jax.jit
    def step(params, state):
        gradients = grad_fn(params, 0)
        updates, state = optimizer.update(
            gradients, state, params, value=loss_fn(params), value_fn=value_fn, grad_fn=grad_fn
        )
        return optax.apply_updates(params, updates), state

    params, state, path = start, optimizer.init(start), [start["x"]]
    for _ in range(steps):
        params, state = step(params, state)
        path.append(params["x"])
    return np.stack(path), state, steps * len(calls)


@modes
@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("bad", [optax.sgd(-0.5), constant(np.nan), constant(np.inf)])
def test_an_ascending_or_broken_optimizer_is_never_followed(mode, num_steps, bad):
    path, state, _ = train(lgl2o(optax.sgd(0.1), bad, mode=mode, num_steps=num_steps), 9)
    alone, _, _ = train(lgl2o(optax.sgd(0.1), constant(0.0), mode=mode), 9)
    np.testing.assert_allclose(path, alone, rtol=1e-6)
    assert state.learned_wins == 0


@modes
def test_the_loss_never_rises_with_descent_as_the_fallback(mode):
    """Gradient descent below 2 / L descends, and the guard only takes what is better still."""
    learned = optax.chain(optax.add_noise(3.0, 0.0, key=0), optax.sgd(0.3))
    path, state, _ = train(lgl2o(optax.sgd(0.4), learned, mode=mode), 30)
    losses = [float(loss_fn({"x": x})) for x in path]
    assert np.all(np.diff(losses) <= 1e-6)
    assert 0 < state.learned_wins < 30


@modes
def test_the_better_optimizer_is_followed(mode):
    path, state, _ = train(lgl2o(optax.sgd(0.01), optax.sgd(0.2), mode=mode), 5)
    expected, _, _ = train(lgl2o(optax.sgd(0.2), constant(0.0), mode=mode), 5)
    np.testing.assert_allclose(path, expected, rtol=1e-5)
    assert state.learned_wins == 5 and state.follows_learned


@modes
def test_a_tie_goes_to_the_fallback(mode):
    _, state, _ = train(lgl2o(optax.sgd(0.1), optax.sgd(0.1), mode=mode), 4)
    assert state.learned_wins == 0


@modes
def test_where_the_fallback_is_not_finite_the_learned_one_takes_over(mode):
    path, state, _ = train(lgl2o(constant(np.nan), optax.sgd(0.1), mode=mode), 1)
    np.testing.assert_allclose(path[1], (1 - 0.1 * CURVATURE) * START["x"], rtol=1e-6)
    assert state.learned_wins == 1


def test_a_race_runs_both_on_their_own_and_is_judged_at_its_end():
    path, _, gradients = train(lgl2o(optax.sgd(0.05), optax.sgd(0.2), mode="race", num_steps=3), 6)
    slow, fast = 1 - 0.05 * CURVATURE, 1 - 0.2 * CURVATURE
    x = START["x"]
    expected = [x, slow * x, slow**2 * x, fast**3 * x]
    expected += [slow * expected[-1], slow**2 * expected[-1], fast**3 * expected[-1]]
    np.testing.assert_allclose(path, expected, rtol=1e-5)
    assert gradients == 2 * 6


def test_a_race_clips_where_both_optimizers_do_and_not_before_them():
    """The clip binds: the gradient at the start has a norm of 8.5."""
    clip = optax.clip_by_global_norm(1.0)
    unclipped, _, _ = train(lgl2o(constant(0.0), optax.sgd(0.2)), 1)
    before, _, _ = train(optax.chain(clip, lgl2o(constant(0.0), optax.sgd(0.2))), 1)
    np.testing.assert_array_equal(before, unclipped)
    inside, _, _ = train(lgl2o(constant(0.0), optax.chain(clip, optax.sgd(0.2))), 1)
    np.testing.assert_allclose(np.linalg.norm(inside[1] - inside[0]), 0.2, rtol=1e-5)


def test_candidates_share_a_gradient_and_are_compared_every_few_steps():
    evaluated = []

    def counted(params):
        jax.debug.callback(lambda: evaluated.append(None))
        return loss_fn(params)

    optimizer = lgl2o(optax.sgd(0.01), optax.sgd(0.2), mode="candidate", num_steps=3)
    path, state, gradients = train(optimizer, 6, value_fn=counted)
    jax.effects_barrier()
    assert gradients == 6 and len(evaluated) == 2 * 2
    assert state.learned_wins == 2
    fast = (1 - 0.2 * CURVATURE)[None] ** np.arange(7)[:, None]
    np.testing.assert_allclose(path, fast * START["x"][None], rtol=1e-5)


@modes
def test_it_runs_under_jit_and_vmap(mode):
    optimizer = lgl2o(optax.sgd(0.1), optax.adam(0.1), mode=mode)
    grad_fn = lambda params, _: jax.grad(loss_fn)(params)  # noqa: E731

    def step(params):
        state = optimizer.init(params)
        updates, _ = optimizer.update(
            grad_fn(params, 0), state, params, value_fn=loss_fn, grad_fn=grad_fn
        )
        return optax.apply_updates(params, updates)

    starts = {"x": np.stack([START["x"], -2 * START["x"]])}
    together = jax.jit(jax.vmap(step))(starts)["x"]
    for i in range(2):
        np.testing.assert_allclose(together[i], step({"x": starts["x"][i]})["x"], rtol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "racing"}, "mode must be one of .*, got 'racing'; did you mean 'race'"),
        ({"num_steps": 0}, "num_steps must be a positive whole number, got 0"),
        ({"num_steps": 2.5}, "num_steps must be a positive whole number, got 2.5"),
    ],
)
def test_bad_options_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=f"lgl2o: {message}"):
        lgl2o(optax.sgd(0.1), optax.sgd(0.1), **options)


@pytest.mark.parametrize(
    "missing, message",
    [
        ("params", "update needs the parameters"),
        ("value_fn", "update needs value_fn"),
        ("grad_fn", "update needs grad_fn"),
    ],
)
def test_what_update_needs_is_named(missing, message):
    optimizer = lgl2o(optax.sgd(0.1), optax.sgd(0.1))
    given = {"params": START, "value_fn": loss_fn, "grad_fn": lambda p, i: p}
    update = functools.partial(optimizer.update, START, optimizer.init(START))
    update(**given)
    with pytest.raises(ValueError, match=f"lgl2o: {message}.*got none"):
        update(**given | {missing: None})


@modes
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_for_the_learned_optimizer_alone_costs_it_a_comparison(
    mode, bad
):
    """Its own gradient in a race, its own memory between candidates."""
    learned = optax.chain(
        optax.scale_by_schedule(lambda step: jnp.where(step == 1, bad, 1.0)), optax.sgd(0.2)
    )
    path, state, _ = train(lgl2o(optax.sgd(0.05), learned, mode=mode), 4)
    slow, fast = 1 - 0.05 * CURVATURE, 1 - 0.2 * CURVATURE
    expected = START["x"] * fast * slow * fast * fast
    np.testing.assert_allclose(path[-1], expected, rtol=1e-5)
    assert state.learned_wins == 3


@modes
@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_moves_nothing_and_leaves_no_trace(mode, num_steps, bad):
    """Neither in parameters nor in moments; only counts go on."""
    optimizer = lgl2o(optax.adam(0.1), optax.adam(0.2, b1=0.5), mode=mode, num_steps=num_steps)
    spoilt = {"x": np.float32([bad, 1.0])}

    @jax.jit
    def step(params, state, spoil):
        def grad_fn(params, _):
            return optax.tree.where(spoil, spoilt, jax.grad(loss_fn)(params))

        updates, state = optimizer.update(
            grad_fn(params, 0), state, params, value_fn=loss_fn, grad_fn=grad_fn
        )
        return optax.apply_updates(params, updates), state

    params, state = START, optimizer.init(START)
    params, state = step(params, state, False)
    there, old = step(params, state, True)
    if num_steps == 1:
        np.testing.assert_allclose(there["x"], params["x"], rtol=1e-6)
    for name in ("hand_designed", "learned"):
        moments = [optax.tree.get(getattr(s, name), "mu") for s in (state, old)]
        np.testing.assert_array_equal(moments[1]["x"], moments[0]["x"])
        assert optax.tree.get(getattr(old, name), "count") == 2
    assert old.failures == 2
    for _ in range(6):
        there, old = step(there, old, False)
    assert loss_fn(there) < loss_fn(params) and old.failures == 2


@modes
def test_between_comparisons_the_other_optimizer_stands_in_for_one_that_fails(mode):
    """In a race it waits where it is."""
    failing = optax.chain(
        optax.scale_by_schedule(lambda step: jnp.where(step == 1, np.nan, 1.0)), optax.sgd(0.2)
    )
    path, state, _ = train(lgl2o(optax.sgd(0.05), failing, mode=mode, num_steps=3), 3)
    slow, fast = 1 - 0.05 * CURVATURE, 1 - 0.2 * CURVATURE
    expected = fast * slow * fast if mode == "candidate" else fast * fast
    np.testing.assert_allclose(path[-1], expected * START["x"], rtol=1e-5)
    assert state.failures == 1 and state.learned_wins == 1


def test_the_number_of_steps_cannot_be_injected():
    injected = optax.inject_hyperparams(lgl2o)(optax.sgd(0.1), optax.sgd(0.1), num_steps=2)
    with pytest.raises(ValueError, match=r"lgl2o: num_steps is static, got an array.*static_args"):
        injected.init(START)


@modes
def test_parameters_and_state_can_be_donated(mode):
    optimizer = lgl2o(optax.sgd(0.05), optax.sgd(0.2), mode=mode)
    grad_fn = lambda params, _: jax.grad(loss_fn)(params)  # noqa: E731

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = optimizer.update(
            grad_fn(params, 0), state, params, value_fn=loss_fn, grad_fn=grad_fn
        )
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.array, START)
    carry = params, optimizer.init(params)
    for _ in range(2):
        carry = step(*carry)
    np.testing.assert_allclose(carry[0]["x"], (1 - 0.2 * CURVATURE) ** 2 * START["x"], rtol=1e-5)


@modes
def test_it_stands_in_a_chain_and_with_injected_numbers(mode):
    @optax.inject_hyperparams
    def with_rate(learning_rate):
        return optax.chain(
            optax.clip_by_global_norm(100.0),
            lgl2o(optax.sgd(learning_rate), optax.sgd(0.01), mode=mode),
        )

    path, _, _ = train(with_rate(0.2), 3)
    expected, _, _ = train(optax.sgd(0.2), 3)
    np.testing.assert_allclose(path, expected, rtol=1e-5)
