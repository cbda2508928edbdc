"""A learned optimizer that diverges goes back to where all was well."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax.optimizers.pull import decay
from lohp_jax.optimizers.reinit import increase_steps, min_loss_reinit

START = {"x": np.float32([4.0, -3.0])}
GRADIENTS = {"x": np.float32([1.0, 1.0])}


class Planned(NamedTuple):
    step: jax.Array


def planned(num_steps):
    """Moves by 1 / num_steps a step; beyond `num_steps` steps its updates are NaN."""

    def update(updates, state, params=None, *, value, **_):
        del params, value
        size = jnp.where(state.step < num_steps, 1.0 / num_steps, jnp.nan)
        return jax.tree.map(lambda u: -size * u, updates), Planned(state.step + 1)

    return optax.GradientTransformationExtraArgs(
        lambda _: Planned(jnp.zeros((), jnp.int32)), update
    )


def run(optimizer, losses, params=START, gradients=GRADIENTS):
    """Parameters after every step, and the last state."""
    state, path = optimizer.init(params), [params["x"]]
    update = jax.jit(optimizer.update)
    for loss in losses:
        updates, state = update(gradients, state, params, value=loss)
        params = optax.apply_updates(params, updates)
        path.append(params["x"])
    return np.stack(path), state


def test_increase_steps_continues_from_the_final_state_of_a_run_that_has_finished():
    """Two steps of 1/2 from step counter 0; then, believing in four, of 1/4 from 2; of 1/8 from 4."""
    path, state = run(increase_steps(planned, 2), [1.0] * 6)
    moves = np.cumsum([0, 1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 8, 1 / 8], dtype=np.float32)
    np.testing.assert_allclose(path, START["x"][None] - moves[:, None], rtol=1e-6)
    assert state.restarts == 2 and state.returning == 0
    assert state.learned.inner.step == state.learned.step == 6


def test_increase_steps_continues_from_the_last_finite_state_of_a_run_that_diverges():
    """After 1/4 at step counter 1 a loss that is none: back by that step, then 1/8 from counter 0."""
    path, state = run(increase_steps(planned, 4), [3.0, 2.0, np.nan, 3.0, 2.0])
    moves = np.float32([0, 1 / 4, 1 / 2, 1 / 4, 3 / 8, 1 / 2])
    np.testing.assert_allclose(path, START["x"][None] - moves[:, None], rtol=1e-6)
    assert state.restarts == 1 and state.learned.inner.step == state.learned.step == 3


def test_increase_steps_stays_at_the_last_horizon():
    """A run of one step, one of two; there the planned optimizer is NaN beyond its steps."""
    path, state = run(increase_steps(planned, 1, max_restarts=1), [1.0] * 8)
    assert state.restarts > 1
    # 1, finished; from there 1/2; NaN, back by one; and so on
    moves = np.float32([0, 1, 1.5, 1, 1.5, 1, 1.5, 1, 1.5])
    np.testing.assert_allclose(path, START["x"][None] - moves[:, None], rtol=1e-6)


def test_a_horizon_beyond_int32_is_no_end():
    _, state = run(increase_steps(lambda _: planned(9), 2**30, factor=4), [1.0] * 3)
    assert state.restarts == 0


def test_min_loss_reinit_continues_from_parameters_and_state_of_the_least_loss():
    """The least loss is seen with step counter 1, after a step of 1/100."""
    losses = [3.0, 1.0, 2.0, np.nan]
    path, state = run(min_loss_reinit(planned(100)), losses)
    np.testing.assert_allclose(path[4], path[1], rtol=1e-6)
    assert state.restarts == 1 and state.kept_loss == 1.0 and state.learned.step == 1
    path, state = run(min_loss_reinit(planned(100)), [*losses, 1.5, 1.4])
    np.testing.assert_allclose(path[6], path[1] - 0.02, rtol=1e-6)
    assert state.learned.step == 3 and state.kept[1].step == 1
    np.testing.assert_allclose(state.kept[0]["x"], path[1], rtol=1e-6)


def test_min_loss_reinit_keeps_the_momentum_of_the_least_loss():
    """Momenta after gradients of 1 are 1, 1.5, 1.75; the loss is least before the second update."""
    optimizer = min_loss_reinit(optax.sgd(1.0, momentum=0.5))
    path, state = run(optimizer, [3.0, 1.0, 2.0, np.nan, 2.0])
    np.testing.assert_allclose(path[5], path[1] - 1.5, rtol=1e-6)
    assert state.restarts == 1


def test_from_the_same_state_a_deterministic_optimizer_diverges_again():
    """`planned(3)` is NaN at its fourth step, whatever was before; the least loss is at its second."""
    losses = [3.0, 1.0, 2.0, 2.0, 1.0, 2.0, 2.0, 1.0]
    path, state = run(min_loss_reinit(planned(3)), losses)
    assert state.restarts == 2
    np.testing.assert_allclose(path[4:7], path[1:4], rtol=1e-6)
    np.testing.assert_allclose(path[7:9], path[1:3], rtol=1e-6)


@pytest.mark.parametrize("bad", ["loss", "gradient", "update"])
def test_whatever_is_not_finite_counts_as_divergence(bad):
    optimizer = min_loss_reinit(planned(1 if bad == "update" else 9))
    state = optimizer.init(START)
    updates, state = optimizer.update(GRADIENTS, state, START, value=1.0)
    params = optax.apply_updates(START, updates)
    gradients = {"x": np.float32([np.inf, 1.0])} if bad == "gradient" else GRADIENTS
    value = np.inf if bad == "loss" else 2.0
    updates, state = optimizer.update(gradients, state, params, value=value)
    np.testing.assert_allclose(optax.apply_updates(params, updates)["x"], START["x"], rtol=1e-6)
    assert state.restarts == 1


def test_the_way_back_from_afar_ends_where_it_should():
    """1e30 + (4 - 1e30) is 0 in float32: one step is not enough."""
    learned = optax.stateless(lambda u, _: jax.tree.map(lambda x: jnp.full_like(x, 1e30), u))
    path, state = run(min_loss_reinit(learned), [1.0, np.inf, 2.0])
    np.testing.assert_array_equal(path[1], np.float32(1e30))
    np.testing.assert_array_equal(path[3], START["x"])
    assert state.restarts == 1


def test_what_stands_behind_it_cannot_keep_it_from_going_on():
    """Decay after the way home ends a thousandth beside it, again and again."""
    optimizer = optax.chain(min_loss_reinit(optax.sgd(0.1)), decay(1e-3))
    path, state = run(optimizer, [1.0, np.nan, *[2.0] * 6])
    assert state[0].restarts == 1 and state[0].returning == 0
    np.testing.assert_allclose(path[-1], 0.999 * path[-2] - 0.1, rtol=1e-5)


@pytest.mark.parametrize(
    "make", [min_loss_reinit, lambda learned: increase_steps(lambda _: learned, 9)]
)
def test_a_finite_update_that_takes_parameters_beyond_float32_is_divergence(make):
    largest = float(np.finfo(np.float32).max)
    learned = optax.stateless(lambda u, _: jax.tree.map(lambda x: jnp.full_like(x, largest), u))
    params = {"x": np.float32([largest, 1.0])}
    path, state = run(make(learned), [1.0, 1.0], params)
    np.testing.assert_array_equal(path, np.broadcast_to(params["x"], path.shape))
    assert state.restarts == 2


def test_many_bad_losses_leave_the_parameters_where_they_were():
    for optimizer in (increase_steps(planned, 5), min_loss_reinit(planned(5))):
        path, _ = run(optimizer, [np.nan] * 4)
        np.testing.assert_array_equal(path, np.broadcast_to(START["x"], path.shape))


@pytest.mark.parametrize("optimizer", [increase_steps(planned, 9), min_loss_reinit(planned(9))])
def test_parameters_and_state_can_be_donated(optimizer):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, loss):
        updates, state = optimizer.update(GRADIENTS, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.array, START)
    carry = params, optimizer.init(params)
    for loss in (1.0, 2.0, np.nan):
        carry = step(*carry, loss)
    assert np.isfinite(carry[0]["x"]).all()


def test_a_restart_under_vmap_touches_only_its_own_run():
    optimizer = min_loss_reinit(planned(100))

    def two(losses):
        state, params = optimizer.init(START), START
        for loss in losses:
            updates, state = optimizer.update(GRADIENTS, state, params, value=loss)
            params = optax.apply_updates(params, updates)
        return params["x"]

    losses = np.float32([[1.0, 2.0], [1.0, np.nan]])
    together = jax.vmap(two)(losses)
    np.testing.assert_allclose(together[0], START["x"] - 0.02, rtol=1e-6)
    np.testing.assert_allclose(together[1], START["x"], rtol=1e-6)


@pytest.mark.parametrize("options", [{"factor": 1}, {"max_restarts": -1}])
def test_bad_options_are_refused_at_once(options):
    with pytest.raises(ValueError, match="expected factor >= 2 and max_restarts >= 0, got factor"):
        increase_steps(planned, 10, **options)


@pytest.mark.parametrize(
    "optimizer, name",
    [(increase_steps(planned, 3), "increase_steps"), (min_loss_reinit(planned(3)), "min_loss")],
)
def test_what_update_needs_is_named(optimizer, name):
    state = optimizer.init(START)
    with pytest.raises(ValueError, match=f"{name}.*: update needs value=loss, got None"):
        optimizer.update(GRADIENTS, state, START)
    with pytest.raises(ValueError, match=f"{name}.*: update needs the parameters, got None"):
        optimizer.update(GRADIENTS, state, value=1.0)
