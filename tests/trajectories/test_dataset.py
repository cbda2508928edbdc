"""What a method is trained on, against the stored trajectories it comes from."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lohp_jax.methods.setting import (
    family_of,
    make_dataset,
    make_frame,
    make_objective,
    make_policy,
)

from lohp_jax.methods import setting as problem
from lohp_jax.networks.levels import level_features
from lohp_jax.networks.policy import NetworkConfig
from lohp_jax.policy.hybrid import PRESETS, Example
from lohp_jax.runs.config import (
    METHODS,
    FamilyConfig,
    PrepareConfig,
    RunConfig,
    TrainingConfig,
    resolve,
)
from lohp_jax.trajectories.matching import match
from lohp_jax.trajectories.store import create
from lohp_jax.types import Trajectory

CONFIG = resolve(
    RunConfig(
        prepare=PrepareConfig(num_tasks=3, optimizers=("sgd", "adam"), num_steps=4),
        network=NetworkConfig(trunk="mlp", widths=(8,), embedding=8),
        training=TrainingConfig(compression=2),
    )
)


def with_training(**values):
    return dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, **values))


@pytest.fixture(scope="module")
def family():
    return family_of(CONFIG)


@pytest.fixture(scope="module")
def theta_0(family):
    return family.init(jax.random.key(0))


@pytest.fixture(scope="module")
def stored(theta_0):
    """Six trajectories, three of each optimizer, as a store gives them back."""
    rng = np.random.default_rng(0)

    def walk(leaf):
        steps = rng.normal(size=(6, 5, *leaf.shape)).cumsum(axis=1)
        return (np.asarray(leaf) + steps).astype(np.float32)

    return {
        "states": jax.tree.map(walk, theta_0),
        "losses": rng.uniform(size=(6, 5)).astype(np.float32),
        "teacher": np.array([0, 0, 0, 1, 1, 1], np.int32),
        "data": {"task": np.arange(6, dtype=np.int32)},
    }


@pytest.fixture
def store(stored, tmp_path):
    store = create(tmp_path / "store", {})
    for name, rows in (("0", slice(0, 2)), ("1", slice(2, 6))):
        store.write(name, jax.tree.map(lambda leaf, rows=rows: leaf[rows], stored))
    return store


@pytest.fixture
def policy(family, theta_0, store):
    return make_policy(CONFIG, family, make_frame(store, theta_0), "lohp")


def test_unit_of_the_frame_is_how_far_trajectories_went(store, stored, theta_0):
    frame = make_frame(store, theta_0)
    assert frame.theta_0 is theta_0

    def rms(states, start):
        moved = states[:, -1].astype(np.float64) - np.asarray(start)
        return math.sqrt((moved**2).mean())

    expected = jax.tree.map(rms, stored["states"], theta_0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), frame.scale, expected)


@pytest.mark.parametrize("losses, best", [([3, 1, 2, 9, 9, 9], 0), ([3, 1, 9, 2, 2, 2], 1)])
def test_the_optimizer_with_the_lowest_mean_loss_is_imitated(
    stored, theta_0, tmp_path, losses, best
):
    ends = np.float32(losses)
    others = np.broadcast_to(-10 * ends[:, None], (6, 4))
    store = create(tmp_path / "store", {})
    store.write("0", stored | {"losses": np.concatenate([others, ends[:, None]], axis=1)})
    chosen = make_frame(store, theta_0).optimizer
    assert chosen == best and chosen.dtype == jnp.int32


@pytest.mark.parametrize("matching", ["uniform", "arc_length", "loss", "curvature"])
def test_dataset_is_the_encoded_matched_states(store, stored, policy, matching):
    dataset = make_dataset(with_training(matching=matching), store, policy)
    assert dataset.tokens.shape == (6, 3, *policy.codec.mask.shape)
    for row in range(6):
        states, losses = jax.tree.map(lambda x, r=row: x[r], (stored["states"], stored["losses"]))
        indices = match(Trajectory(states, jnp.asarray(losses), None), 3, how=matching)
        for place, index in enumerate(np.asarray(indices)):
            weights = jax.tree.map(lambda leaf, i=index: leaf[i], states)
            expected = policy.codec.encode(weights)
            np.testing.assert_allclose(dataset.tokens[row, place], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(dataset.optimizer, stored["teacher"])
    np.testing.assert_array_equal(dataset.data["task"], np.arange(6))


def test_tokens_are_standardised_ends(store, policy):
    ends = np.asarray(make_dataset(CONFIG, store, policy).tokens[:, -1])[:, policy.codec.mask]
    assert 0.9 < np.sqrt((ends**2).mean()) < 1.1


@pytest.mark.parametrize("method", METHODS)
def test_policy_of_each_method(family, theta_0, store, method):
    policy = make_policy(CONFIG, family, make_frame(store, theta_0), method)
    assert policy.num_steps == (1 if method.startswith("hypernetwork") else 2)
    on_policy = dataclasses.replace(CONFIG.balance, off_policy=0.0, on_policy=1.0)
    objectives = {"paper_literal": PRESETS["paper_literal"], "lo_op": on_policy}
    assert policy.config == objectives.get(method, CONFIG.balance)
    np.testing.assert_array_equal(policy.codec.decode(policy.codec.encode(theta_0))["head"]["w"], 0)


def test_the_network_of_lo_di_is_told_a_noise_level(family, theta_0, store):
    key, frame = jax.random.key(0), make_frame(store, theta_0)
    context = jax.eval_shape(lambda: family.context(family.sample(key), key))

    def parameter_of_the_step(method):
        policy = make_policy(CONFIG, family, frame, method)
        return {
            n: p.shape for n, p in jax.eval_shape(policy.network.init, key, context)["step"].items()
        }

    assert parameter_of_the_step("cloning") == {"embeddings": (2, 8)}
    assert parameter_of_the_step("lo_di") == {"w": (len(level_features(0.0)), 8), "b": (8,)}


@pytest.fixture
def losses(monkeypatch):
    """Each objective replaced by a weight times a draw from its key."""
    weights = {"hybrid_loss": 1.0, "cloning_loss": 10.0, "task_loss": 100.0, "regression_loss": 7.0}
    weights["denoising_loss"] = 3.0

    def replace(name, weight):
        def loss(*arguments):
            *_, params, _, key = arguments
            return weight * params * jax.random.uniform(key), {name: jnp.float32(weight)}

        monkeypatch.setattr(problem, name, loss)

    for name, weight in weights.items():
        replace(name, weight)


def draws(key, count):
    return [float(jax.random.uniform(k)) for k in jax.random.split(key, count)]


@pytest.mark.parametrize(
    "method, settings, weights, names",
    [
        ("lohp", {}, [1], {"hybrid_loss"}),
        ("lohp", {"anchor": 0.5}, [1, 5], {"hybrid_loss", "cloning_loss"}),
        ("lohp_consolidated", {"consolidation": 0.25}, [1, 25], {"hybrid_loss", "task_loss"}),
        ("lohp_consolidated", {"consolidation": 0.0}, [1], {"hybrid_loss"}),
    ],
)
def test_terms_of_a_weighted_objective(losses, family, policy, method, settings, weights, names):
    objective = make_objective(with_training(**settings), family, policy, method)
    key = jax.random.key(4)
    loss, info = objective(jnp.float32(2), Example(None, None, None, None), key)
    expected = 2 * sum(w * u for w, u in zip(weights, draws(key, len(weights)), strict=True))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert set(info) == names


@pytest.mark.parametrize(
    "method, weight, name",
    [
        ("cloning", 10, "cloning_loss"),
        ("hypernetwork", 100, "task_loss"),
        ("hypernetwork_regression", 7, "regression_loss"),
        ("lo_di", 3, "denoising_loss"),
        ("lo_op", 1, "hybrid_loss"),
        ("paper_literal", 1, "hybrid_loss"),
    ],
)
def test_methods_of_one_term(losses, family, policy, method, weight, name):
    key = jax.random.key(5)
    loss, info = make_objective(CONFIG, family, policy, method)(jnp.float32(1), None, key)
    np.testing.assert_allclose(loss, weight * float(jax.random.uniform(key)), rtol=1e-6)
    assert set(info) == {name}


def test_family_follows_the_config_and_is_made_once(family):
    assert family_of(CONFIG) is family
    changed = dataclasses.replace(CONFIG, tasks=FamilyConfig(network="mlp", shots=3))
    other = family_of(changed)
    data = other.sample(jax.random.key(0))
    assert other.context(data, jax.random.key(1))["images"].shape[0] == 15
    assert other.init(jax.random.key(0)).keys() != family.init(jax.random.key(0)).keys()


@pytest.mark.parametrize(
    "tasks, message",
    [
        (FamilyConfig(shots=0), "shots must be between 1 and"),
        (FamilyConfig(batch_size=0), "batch_size must be at least 1, got 0"),
        (FamilyConfig(data="mnist"), "'digits' or 'tfds:NAME', got 'mnist'"),
    ],
)
def test_tasks_that_do_not_exist(tasks, message):
    with pytest.raises(ValueError, match=message):
        family_of(dataclasses.replace(CONFIG, tasks=tasks))
