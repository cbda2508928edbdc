"""Which policy and which loss each method of the table has, and that its settings make it again."""

import dataclasses
import importlib
import json
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.methods import METHODS, common
from lohp_jax.networks.levels import level_features
from lohp_jax.networks.policy import NetworkConfig
from lohp_jax.policy.config import PAPER_LITERAL, FeedbackConfig, HybridConfig

KEY = jax.random.key(0)
NETWORK = NetworkConfig(trunk="mlp", widths=(8,), embedding=8)
BALANCE = HybridConfig(end_std=0.2, on_policy=0.05)
each_method = pytest.mark.parametrize("name", METHODS)


def make(name, **settings):
    given = {"network": NETWORK, "balance": BALANCE} | settings
    taken = typing.get_type_hints(METHODS[name])
    return METHODS[name](**{k: v for k, v in given.items() if k in taken or k in settings})


@each_method
def test_a_method_goes_by_its_name_in_the_table(name):
    assert make(name).name == name


@each_method
def test_settings_survive_json_and_make_the_method_again(name):
    method = make(name)
    saved = json.loads(json.dumps(method.config))
    network = {"trunk": "mlp", "widths": [8], "embedding": 8, "window": None}
    assert saved["network"] == network
    if "balance" in saved:
        assert saved["balance"]["end_std"] == 0.2
    for sizes in (saved["network"], saved.get("loop", {})):
        sizes |= {"widths": tuple(sizes["widths"])} if sizes else {}
    kinds = {"network": NetworkConfig, "balance": HybridConfig, "loop": FeedbackConfig}
    again = METHODS[name](**{k: kinds[k](**v) if k in kinds else v for k, v in saved.items()})
    assert again.config == method.config


@pytest.fixture
def policies(monkeypatch):
    """The policies that methods make when they are bound."""
    made, make_policy = [], common.make_policy

    def recorded(*args, **options):
        made.append(make_policy(*args, **options))
        return made[-1]

    for module in (common, importlib.import_module("lohp_jax.methods.lohp_feedback")):
        monkeypatch.setattr(module, "make_policy", recorded)
    return made


@each_method
def test_the_policy_of_each_method(space, policies, name):
    make(name).bound(space)
    (policy,) = policies
    assert policy.num_steps == (1 if name.startswith("hypernetwork") else 2)
    on_policy = dataclasses.replace(BALANCE, off_policy=0.0, on_policy=1.0)
    objectives = {"paper_literal": PAPER_LITERAL, "lo_op": on_policy}
    assert policy.config == objectives.get(name, BALANCE)
    assert policy.codec is space.codec


@each_method
def test_each_method_trains_and_walks(space, example, name):
    """Shapes alone: a scalar with named numbers, and states of the codec."""
    method = make(name).bound(space)
    params = jax.eval_shape(method.init, KEY, example)
    loss, info = jax.eval_shape(method.loss, params, example, KEY)
    assert loss.shape == () and all(hasattr(value, "shape") for value in info.values())
    states = jax.eval_shape(method.walk, params, example.context, KEY)
    num_states = {"hypernetwork": 2, "hypernetwork_regression": 2, "weight_diffusion": 2}.get(
        name, 3
    )
    assert states.shape == (num_states, *space.codec.mask.shape)


def test_the_network_of_a_diffusion_is_told_a_noise_level(space, example):
    def parameter_of_the_step(name):
        params = jax.eval_shape(make(name).bound(space).init, KEY, example)
        return {n: p.shape for n, p in params["network"]["step"].items()}

    assert parameter_of_the_step("cloning") == {"embeddings": (2, 8)}
    assert parameter_of_the_step("weight_diffusion") == {
        "w": (len(level_features(0.0)), 8),
        "b": (8,),
    }


@pytest.fixture
def losses(monkeypatch):
    """Each objective replaced by a weight times a draw from its key."""

    def replace(name, weight, *modules):
        def loss(*arguments):
            *_, params, _, key = arguments
            return weight * params * jax.random.uniform(key), {name: jnp.float32(weight)}

        for module in modules:  # their names in the package are those of functions
            module = importlib.import_module(f"lohp_jax.methods.{module}")
            monkeypatch.setattr(module, name, loss)

    replace("hybrid_loss", 1.0, "lohp")
    replace("cloning_loss", 10.0, "lohp", "cloning")
    replace("task_loss", 100.0, "lohp", "hypernetwork")
    replace("regression_loss", 7.0, "hypernetwork")
    replace("denoising_loss", 3.0, "weight_diffusion")


def draws(key, count):
    return [float(jax.random.uniform(k)) for k in jax.random.split(key, count)]


@pytest.mark.parametrize(
    "name, settings, weights, names",
    [
        ("lohp", {}, [1], {"hybrid_loss"}),
        ("lohp", {"anchor": 0.5}, [1, 5], {"hybrid_loss", "cloning_loss"}),
        ("lohp_consolidated", {"consolidation": 0.25}, [1, 25], {"hybrid_loss", "task_loss"}),
        ("lohp_consolidated", {"consolidation": 0.0}, [1], {"hybrid_loss"}),
    ],
)
def test_terms_of_a_weighted_objective(losses, space, name, settings, weights, names):
    method, key = make(name, **settings).bound(space), jax.random.key(4)
    loss, info = method.loss(jnp.float32(2), None, key)
    expected = 2 * sum(w * u for w, u in zip(weights, draws(key, len(weights)), strict=True))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert set(info) == names


@pytest.mark.parametrize(
    "name, weight, loss_name",
    [
        ("cloning", 10, "cloning_loss"),
        ("hypernetwork", 100, "task_loss"),
        ("hypernetwork_regression", 7, "regression_loss"),
        ("weight_diffusion", 3, "denoising_loss"),
        ("paper_literal", 1, "hybrid_loss"),
    ],
)
def test_methods_of_one_term(losses, space, name, weight, loss_name):
    key = jax.random.key(5)
    loss, info = make(name).bound(space).loss(jnp.float32(1), None, key)
    np.testing.assert_allclose(loss, weight * float(jax.random.uniform(key)), rtol=1e-6)
    assert set(info) == {loss_name}


def test_consolidation_starts_from_lohp_and_takes_half_of_the_updates():
    method = make("lohp_consolidated", anchor=0.5, consolidation=2.0)
    assert method.share == 0.5
    assert method.starts_from.name == "lohp" and method.starts_from.share == 1.0
    assert method.starts_from.config == make("lohp", anchor=0.5).config
    others = [make(name) for name in METHODS if name != "lohp_consolidated"]
    assert all(m.starts_from is None and m.share == 1.0 for m in others)


def test_lo_op_knows_of_a_trajectory_its_two_ends_only(space, example):
    method = make("lo_op").bound(space)
    params = jax.tree.map(
        lambda p: p + 0.1 * jax.random.normal(KEY, p.shape), method.init(KEY, example)
    )
    loss = jax.jit(lambda tokens: method.loss(params, example._replace(tokens=tokens), KEY)[0])
    expected = loss(example.tokens)
    np.testing.assert_allclose(loss(example.tokens.at[1].set(7.0)), expected, rtol=1e-6)
    assert abs(loss(example.tokens.at[-1].add(1.0)) - expected) > 1e-3


def test_lo_op_on_a_straight_trajectory_is_balance_on_its_own_states(space, example):
    on_policy = dataclasses.replace(BALANCE, off_policy=0.0, on_policy=1.0)
    of_lohp, method = (make("lohp", balance=on_policy).bound(space), make("lo_op").bound(space))
    params = method.init(KEY, example)
    (own,) = jax.random.split(KEY, 1)  # of the one term of `lohp`
    expected = of_lohp.loss(params, example, KEY)[0]
    np.testing.assert_allclose(method.loss(params, example, own)[0], expected, rtol=1e-5)
