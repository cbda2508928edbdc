"""Constant blends and grafts are what their one-line formulas say."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax.optimizers.blends import constant_blend, graft
from lohp_jax.optimizers.hub import hub, hub_diagnostics

PARAMS = {"body": {"w": np.ones((3, 4), np.float32), "b": np.ones(4, np.float32)}}


def normal(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: np.float32(rng.normal(0, scale, p.shape)), PARAMS)


def once(optimizer, gradients, params=PARAMS):
    return optimizer.update(gradients, optimizer.init(params), params)


def flat(tree):
    return np.concatenate([np.ravel(np.float64(leaf)) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_a_constant_blend_is_the_weighted_mean(weight):
    gradients = normal()
    updates, state = once(constant_blend(optax.sgd(0.1), optax.sgd(3.0), weight), gradients)
    rate = weight * 0.1 + (1 - weight) * 3.0
    np.testing.assert_allclose(flat(updates), -rate * flat(gradients), rtol=1e-5)
    weights = hub_diagnostics(state)["mean_weight"]
    np.testing.assert_allclose(list(weights.values()), weight)


@pytest.mark.parametrize(
    "group, sizes", [("tensor", {"w": 12, "b": 4}), ("global", {"w": 16, "b": 16})]
)
def test_a_blend_by_size_is_vanilla_hub_at_equal_gradients(group, sizes):
    gradients = normal()
    blended = constant_blend(optax.sgd(0.1), optax.sgd(3.0), "size", group=group)
    updates, _ = once(blended, gradients)
    for name, size in sizes.items():
        rate = 0.1 / size + 3.0 * (1 - 1 / size)
        np.testing.assert_allclose(
            updates["body"][name], -rate * gradients["body"][name], rtol=1e-5
        )
    equal = jax.tree.map(lambda g: np.full_like(g, 0.7), gradients)
    vanilla = hub(optax.sgd(0.1), optax.sgd(3.0), group=group)
    chex.assert_trees_all_close(once(blended, equal)[0], once(vanilla, equal)[0], rtol=1e-5)


@pytest.mark.parametrize("group", ["tensor", "global"])
def test_a_graft_has_the_norm_of_one_and_the_direction_of_the_other(group):
    gradients = normal()
    sign = optax.chain(optax.scale_by_sign(), optax.scale(-7.0))
    updates, _ = once(graft(optax.sgd(0.1), sign, group=group), gradients)
    parts = [("w",), ("b",)] if group == "tensor" else [("w", "b")]
    for names in parts:
        g = flat({name: gradients["body"][name] for name in names})
        u = flat({name: updates["body"][name] for name in names})
        expected = -np.sign(g) / np.linalg.norm(np.sign(g)) * 0.1 * np.linalg.norm(g)
        np.testing.assert_allclose(u, expected, rtol=1e-5)


def test_a_graft_on_no_direction_moves_nothing():
    updates, _ = once(graft(optax.sgd(0.1), optax.set_to_zero()), normal())
    np.testing.assert_array_equal(flat(updates), 0.0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_graft_of_large_half_precision_updates_does_not_overflow(dtype):
    params = {"w": jnp.ones(4, dtype)}
    gradients = {"w": jnp.array([1e4, -1e4, 1e4, -1e4], dtype)}
    updates, _ = once(graft(optax.sgd(1e-4), optax.sgd(1.0)), gradients, params)
    assert updates["w"].dtype == dtype
    np.testing.assert_allclose(np.float32(updates["w"]), [-1, 1, -1, 1], rtol=1e-2)


@pytest.mark.parametrize("rates", [(1e-30, 1.0), (1.0, 1e-30), (1.0, 2.0)])
def test_a_graft_of_norms_beyond_float32_is_the_update_of_the_one_that_says_how_far(rates):
    gradients = normal(scale=1e20)
    updates, _ = once(graft(*map(optax.sgd, rates)), gradients)
    np.testing.assert_allclose(flat(updates), -rates[0] * flat(gradients), rtol=1e-5)


def test_the_weight_of_a_blend_can_be_injected():
    injected = optax.inject_hyperparams(constant_blend)(
        hand_designed=optax.sgd(0.1), learned=optax.sgd(3.0), weight=lambda step: 1.0 / (1.0 + step)
    )
    gradients, state = normal(), injected.init(PARAMS)
    for weight in (1.0, 0.5):
        updates, state = jax.jit(injected.update)(gradients, state, PARAMS)
        rate = weight * 0.1 + (1 - weight) * 3.0
        np.testing.assert_allclose(flat(updates), -rate * flat(gradients), rtol=1e-5)


@pytest.mark.parametrize(
    "weight, message",
    [
        (1.5, r"weight must be in \[0, 1\], got 1.5"),
        (float("nan"), r"weight must be in \[0, 1\], got nan"),
        ("sise", r"weight must be one of \('size',\), got 'sise'; did you mean 'size'"),
    ],
)
def test_bad_weights_are_refused(weight, message):
    with pytest.raises(ValueError, match=f"constant_blend: {message}"):
        constant_blend(optax.sgd(0.1), optax.sgd(1.0), weight)


def test_an_unknown_group_is_refused():
    with pytest.raises(
        ValueError, match=r"graft: group must be one of .*, got 'tensors'.*'tensor'"
    ):
        graft(optax.sgd(0.1), optax.sgd(1.0), group="tensors")
