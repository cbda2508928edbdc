"""The online mix moves its share against the slope of the next loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax.optimizers.hub import hub, hub_diagnostics
from lohp_jax.optimizers.online import hub_online

PARAMS = {"w": np.ones(4, np.float32), "b": np.ones(2, np.float32)}
SIGN = optax.chain(optax.scale_by_sign(), optax.scale(-0.3))


def gradients(seed):
    rng = np.random.default_rng(seed)
    return {name: np.float32(rng.normal(size=p.shape)) for name, p in PARAMS.items()}


def oracle(num_steps, parts, alpha=0.5, rate=0.1, bounds=(0.0, 1.0)):
    """Updates at every step, in float64, for tensors that share an alpha."""
    out, alphas, last = [], dict.fromkeys(parts, alpha), None
    for step in range(num_steps):
        g = jax.tree.map(np.float64, gradients(step))
        hand = {k: -0.1 * g[k] for k in g}
        learned = {k: -0.3 * np.sign(g[k]) for k in g}
        for part in parts:
            if last is not None:
                a, b = (np.concatenate([tree[k] for k in part]) for tree in (g, last))
                cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
                alphas[part] = np.clip(alphas[part] - rate * cosine, *bounds)
        by_tensor = {k: alphas[part] for part in parts for k in part}
        out.append({k: by_tensor[k] * hand[k] + (1 - by_tensor[k]) * learned[k] for k in g})
        last = {k: hand[k] - learned[k] for k in g}
    return out, alphas


@pytest.mark.parametrize(
    "options, parts",
    [
        ({}, [("w",), ("b",)]),
        ({"group": "global", "rate": 2.0, "bounds": (0.1, 0.8)}, [("w", "b")]),
    ],
    ids=["default", "own"],
)
def test_updates_equal_their_definition(options, parts):
    optimizer = hub_online(optax.sgd(0.1), SIGN, **options)
    numbers = {name: value for name, value in options.items() if name != "group"}
    expected, alphas = oracle(6, parts, **numbers)
    state = optimizer.init(PARAMS)
    for step in range(6):
        updates, state = jax.jit(optimizer.update)(gradients(step), state, PARAMS)
        for name in PARAMS:
            np.testing.assert_allclose(updates[name], expected[step][name], rtol=1e-4, atol=1e-6)
    read = hub_diagnostics(state)["alpha"]
    np.testing.assert_allclose(sorted(read.values()), sorted(alphas.values()), rtol=1e-4)


@pytest.mark.parametrize("learned, end", [(optax.sgd(-0.1), 1.0), (optax.sgd(0.3), 0.0)])
def test_the_share_goes_to_the_optimizer_that_descends_faster(learned, end):
    """On a quadratic, against one that ascends and one that goes further the right way."""
    optimizer = hub_online(optax.sgd(0.1), learned, group="global")
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(15):
        updates, state = optimizer.update(params, state, params)  # the gradient of |p|^2 / 2
        params = optax.apply_updates(params, updates)
    assert hub_diagnostics(state)["alpha"]["all"] == end


def test_half_precision_keeps_small_differences():
    params = {"w": jnp.ones(4, jnp.float16)}
    optimizer = hub_online(optax.sgd(1e-3), optax.sgd(-1e-3))
    state = optimizer.init(params)
    for _ in range(8):
        updates, state = optimizer.update({"w": jnp.full(4, 1e-2, jnp.float16)}, state, params)
    assert updates["w"].dtype == jnp.float16 and hub_diagnostics(state)["alpha"]["w"] == 1.0


def test_the_mode_of_hub_is_this_function_with_its_defaults():
    ours, theirs = hub(optax.sgd(0.1), SIGN, mode="online"), hub_online(optax.sgd(0.1), SIGN)
    state, other = ours.init(PARAMS), theirs.init(PARAMS)
    for step in range(3):
        updates, state = ours.update(gradients(step), state, PARAMS)
        expected, other = theirs.update(gradients(step), other, PARAMS)
        np.testing.assert_array_equal(updates["w"], expected["w"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"alpha": 1.5}, r"alpha must be in bounds \(0.0, 1.0\), got 1.5"),
        ({"alpha": 0.9, "bounds": (0, 0.5)}, r"alpha must be in bounds \(0, 0.5\), got 0.9"),
        ({"rate": 0.0}, "rate must be positive and finite, got 0.0"),
        ({"rate": float("inf")}, "rate must be positive and finite, got inf"),
        ({"bounds": (0.6, 0.4)}, r"bounds must be .* 0 <= low <= high <= 1, got \(0.6, 0.4\)"),
        ({"group": "all"}, "group must be one of"),
    ],
)
def test_bad_options_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=f"hub_online: {message}"):
        hub_online(optax.sgd(0.1), SIGN, **options)
