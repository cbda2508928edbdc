"""The spike gate compares an entry with its own past, and with nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax.optimizers.hub import hub, hub_diagnostics
from lohp_jax.optimizers.spike import hub_spike

HAND, LEARNED = optax.sgd(0.1), optax.sgd(3.0)
PARAMS = {"w": np.zeros(3, np.float32)}


def run(gradients, params=PARAMS, **options):
    """Updates at every step."""
    optimizer = hub_spike(HAND, LEARNED, **options)
    state, out = optimizer.init(params), []
    for g in gradients:
        updates, state = jax.jit(optimizer.update)({"w": g}, state, params)
        out.append(np.float64(updates["w"]))
    return np.stack(out), state


def shares(gradients, threshold=3.0, sharpness=2.0, decay=0.999):
    """By the definition, in float64."""
    moment, out = 0.0, []
    for t, g in enumerate(np.float64(gradients), start=1):
        moment = decay * moment + (1 - decay) * g**2
        ratio = np.abs(g) / np.sqrt(moment / (1 - decay**t))
        out.append(ratio**sharpness / (ratio**sharpness + threshold**sharpness))
    return np.stack(out)


@pytest.mark.parametrize(
    "options", [{}, {"threshold": 1.5, "sharpness": 5.0, "decay": 0.9}], ids=["default", "own"]
)
def test_updates_equal_their_definition(options):
    gradients = np.float32(np.random.default_rng(0).normal(size=(20, 3)))
    s = shares(gradients, **options)
    actual, state = run(gradients, **options)
    np.testing.assert_allclose(actual, -(s * 0.1 + (1 - s) * 3.0) * gradients, rtol=2e-4)
    read = hub_diagnostics(state)
    np.testing.assert_allclose(read["mean_weight"]["w"], s[-1].mean(), rtol=1e-3)
    np.testing.assert_allclose(read["max_weight"]["w"], s[-1].max(), rtol=1e-3)


def test_the_share_ignores_the_scale_of_the_loss_and_the_size_of_the_tensor():
    gradients = np.float32(np.random.default_rng(1).normal(size=(10, 3)))
    plain, _ = run(gradients)
    scaled, _ = run(1e4 * gradients)
    np.testing.assert_allclose(scaled / 1e4, plain, rtol=1e-4)
    wide = np.tile(gradients, (1, 50))
    widened, _ = run(wide, {"w": np.zeros(150, np.float32)})
    np.testing.assert_allclose(widened, np.tile(plain, (1, 50)), rtol=1e-5)


def test_a_spike_goes_to_the_hand_designed_optimizer_and_steady_entries_do_not():
    gradients = np.ones((200, 3), np.float32)
    gradients[-1, 0] = 100.0
    updates, _ = run(gradients)
    rates = -updates[-1] / gradients[-1]
    assert rates[0] < 0.1 + 0.06 * 2.9 and np.all(rates[1:] > 0.1 + 0.89 * 2.9)


def test_entries_without_any_gradient_stay_finite():
    updates, state = run(np.zeros((3, 3), np.float32))
    np.testing.assert_array_equal(updates, 0.0)
    assert hub_diagnostics(state)["mean_weight"]["w"] == 0.0


def test_the_mode_of_hub_is_this_function_with_its_defaults():
    gradients = np.float32(np.random.default_rng(2).normal(size=(4, 3)))
    expected, _ = run(gradients)
    optimizer = hub(HAND, LEARNED, mode="spike")
    state = optimizer.init(PARAMS)
    for g, e in zip(gradients, expected, strict=True):
        updates, state = optimizer.update({"w": jnp.asarray(g)}, state, PARAMS)
        np.testing.assert_allclose(updates["w"], e, rtol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"threshold": 0.0}, "threshold must be positive and finite, got 0.0"),
        ({"threshold": float("inf")}, "threshold must be positive and finite, got inf"),
        ({"sharpness": -1.0}, "sharpness must be positive and finite, got -1.0"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        ({"group": "tensors"}, "group must be one of .* did you mean 'tensor'"),
    ],
)
def test_bad_options_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=f"hub_spike: {message}"):
        hub_spike(HAND, LEARNED, **options)
