"""What methods share, and what a `Method` is refused for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.methods.cloning import cloning_loss
from lohp_jax.methods.common import policy_method, settings, weighted
from lohp_jax.networks.policy import NetworkConfig
from lohp_jax.policy.config import HybridConfig
from lohp_jax.types import MIXED, Example, Method

KEY = jax.random.key(0)
NETWORK = NetworkConfig(trunk="mlp", widths=(8,), embedding=8)


def term(name, size):
    """A loss that draws from its key, and says its name."""

    def loss(params, example, key):
        return size * params * jax.random.uniform(key), {name: jnp.float32(size)}

    return loss


def draws(key, count):
    return [float(jax.random.uniform(k)) for k in jax.random.split(key, count)]


@pytest.mark.parametrize(
    "weights, sizes, names",
    [
        ([1.0, 0.0], [3], {"a"}),
        ([1.0, 0.5], [3, 5], {"a", "b"}),
        ([0.0, 0.25], [2.5], {"b"}),
    ],
)
def test_a_weighted_loss_is_a_sum_with_a_key_for_each_term(weights, sizes, names):
    loss = weighted(list(zip(weights, [term("a", 3.0), term("b", 10.0)], strict=True)))
    value, info = loss(jnp.float32(2), Example(None, None, None, None), KEY)
    expected = 2 * sum(s * u for s, u in zip(sizes, draws(KEY, len(sizes)), strict=True))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert set(info) == names


def test_a_term_of_weight_zero_is_not_computed():
    def refuse(params, example, key):
        raise AssertionError("computed")

    value, _ = weighted([(0.0, refuse), (1.0, term("a", 1.0))])(jnp.float32(1), None, KEY)
    assert np.isfinite(value)


def test_settings_are_values_of_json():
    found = settings(network=NETWORK, anchor=0.5, name="x", none=None)
    assert found == {
        "network": {"trunk": "mlp", "widths": (8,), "embedding": 8, "window": None},
        "anchor": 0.5,
        "name": "x",
        "none": None,
    }


def make(balance=HybridConfig(condition_dropout=0.1), **fields):
    return policy_method(
        "mine",
        lambda policy, space: functools.partial(cloning_loss, policy),
        network=NETWORK,
        balance=balance,
        **fields,
    )


def random_params(method, example, seed=0):
    shapes = jax.eval_shape(method.init, KEY, example)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.float32(rng.normal(0, 0.3, size=p.shape)), shapes)


def test_a_method_of_a_policy_binds_its_three_functions(space):
    first = Method("first", init=len, loss=len, walk=len)
    method = make(starts_from=first, share=0.5, config={"a": 1})
    assert (method.init, method.loss, method.walk) == (None, None, None)
    bound = method.bound(space)
    assert bound.bind is None and bound.bound(space) is bound
    kept = ("name", "starts_from", "share", "config")
    assert all(getattr(bound, name) == getattr(method, name) for name in kept)
    assert bound.starts_from is first and bound.share == 0.5 and bound.config == {"a": 1}


def test_a_bound_method_trains_and_walks(space, example):
    method = make().bound(space)
    params = random_params(method, example)
    loss, info = jax.jit(method.loss)(params, example, KEY)
    assert loss.shape == () and np.isfinite(loss) and info == {}
    states = jax.jit(method.walk)(params, example.context, KEY)
    assert states.shape == (3, *space.codec.mask.shape)
    shorter = functools.partial(method.walk, num_steps=1)
    assert jax.eval_shape(shorter, params, example.context, KEY).shape[0] == 2
    np.testing.assert_array_equal(states[0], np.zeros(space.codec.mask.shape))  # cold: at theta_0


def test_a_walk_imitates_the_teacher_of_its_space(space, example):
    methods = [make().bound(space._replace(teacher=teacher)) for teacher in (0, 1, 1)]
    params = random_params(methods[0], example)
    other, states, again = (m.walk(params, example.context, KEY) for m in methods)
    np.testing.assert_array_equal(states, again)
    assert np.abs(states - other).max() > 1e-3


def test_a_mixed_walk_imitates_a_teacher_that_its_key_draws(space, example):
    each = [make().bound(space._replace(teacher=teacher)) for teacher in range(3)]
    mixed = make().bound(space._replace(teacher=MIXED))
    params, keys = random_params(mixed, example), jax.random.split(KEY, 60)

    def ends(method):
        return jax.vmap(lambda key: method.walk(params, example.context, key)[-1])(keys)

    apart = np.abs(ends(mixed)[None] - np.stack([ends(m) for m in each])).max(axis=(2, 3))
    assert ((apart < 1e-6).sum(axis=0) == 1).all()
    counts = np.bincount(apart.argmin(axis=0), minlength=3)
    assert counts.min() >= 10  # 20 expected, standard deviation 3.7


def test_a_walk_depends_on_its_context_temperature_and_guidance(space, example):
    method = make().bound(space)
    params = random_params(method, example)
    walk = functools.partial(method.walk, params)
    base = walk(example.context, KEY)
    other = {"x": example.context["x"], "y": -example.context["y"]}
    for changed in (
        walk(other, KEY),
        walk(example.context, KEY, temperature=1.0),
        walk(example.context, KEY, guidance=2.0),
    ):
        assert np.abs(changed - base).max() > 1e-3


def test_guidance_needs_training_without_context(space, example):
    method = make(HybridConfig(condition_dropout=0.0)).bound(space)
    params = random_params(method, example)
    with pytest.raises(ValueError, match=r"guidance must be 0, got 1.0: .* condition_dropout > 0"):
        method.walk(params, example.context, KEY, guidance=1.0)


# --- a `Method` itself

WHOLE = {"init": len, "loss": len, "walk": len}


@pytest.mark.parametrize("missing", WHOLE)
def test_a_method_without_one_of_its_functions_is_refused(missing):
    given = {name: f for name, f in WHOLE.items() if name != missing}
    message = f"Method 'mine': expected init, loss and walk, or bind, got no {missing}"
    with pytest.raises(ValueError, match=message):
        Method("mine", **given)


@pytest.mark.parametrize("share", [0.0, -1.0, float("nan")])
def test_a_share_that_is_not_positive_is_refused(share):
    with pytest.raises(ValueError, match=f"Method 'mine': share must be positive, got {share}"):
        Method("mine", **WHOLE, share=share)


def test_a_plain_method_is_bound_already():
    method = Method("mine", **WHOLE)
    assert method.bound(None) is method
    bound = Method("mine", bind=lambda space: dataclasses.replace(method, name=space))
    assert bound.bound("there").name == "there"
