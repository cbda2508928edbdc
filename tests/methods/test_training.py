"""Training of a method: where it starts, how long it takes, and that it goes on where it was cut off.

The problem is a toy: six numbers, pulled towards those of each example.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lohp_jax.methods.setting import Dataset, Frame

from lohp_jax.methods import training
from lohp_jax.methods.training import initial_state, num_updates, train
from lohp_jax.networks.policy import PolicyNetwork
from lohp_jax.policy.hybrid import HybridConfig, Policy
from lohp_jax.runs.config import PrepareConfig, RunConfig, TrainingConfig, from_json, resolve
from lohp_jax.training import checkpoint
from lohp_jax.types import TaskFamily

CONFIG = resolve(
    RunConfig(
        prepare=PrepareConfig(num_steps=4),
        training=TrainingConfig(
            compression=2, updates=12, batch_size=4, log_every=2, checkpoint_every=4
        ),
    )
)


def with_training(**values):
    return dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, **values))


def sample(key, split="train"):
    return {"x": jax.random.normal(key, (3,))}


def noisy_context(data, key):
    return {"x": data["x"] + 0.1 * jax.random.normal(key, (3,))}


def init_network(key, context):
    return {"w": jax.random.normal(key, (3,)), "b": jnp.zeros(3)}


FAMILY = TaskFamily(sample, None, None, None, noisy_context)
POLICY = Policy(PolicyNetwork(init_network, None, None, None), None, HybridConfig(), 2)
FRAME = Frame({"w": jnp.ones(2)}, {"w": jnp.float32(2)}, jnp.int32(1))
DATASET = Dataset(
    jnp.asarray(np.random.default_rng(0).normal(size=(5, 3, 1, 3)), jnp.float32),
    jnp.arange(5) % 2,
    {"x": jnp.asarray(np.random.default_rng(1).normal(size=(5, 3)), jnp.float32)},
)


def objective(params, example, key):
    noise = 0.1 * jax.random.normal(key, (3,))
    error = params["w"] * example.context["x"] + params["b"] + noise - example.tokens[-1, 0]
    moved = {"progress": jnp.sum(params["b"] ** 2), "cosine": jnp.float32(1.0)}
    return jnp.sum(error**2), {**moved, "error": jnp.abs(error)}


@pytest.fixture(autouse=True)
def toy_objective(monkeypatch):
    monkeypatch.setattr(training, "make_objective", lambda *_: objective)


def run(directory, method="lohp", **options):
    directory.mkdir(exist_ok=True)
    key = jax.random.key(3)
    return train(CONFIG, FAMILY, POLICY, FRAME, DATASET, directory, method, key=key, **options)


def interrupt(progress):
    raise KeyboardInterrupt


def saved(directory):
    state = initial_state(CONFIG, FAMILY, POLICY, "lohp", jax.random.key(0))
    template = {"state": state, "frame": FRAME}
    return checkpoint.restore(directory / "checkpoints" / "lohp", template)[1]


def test_a_run_starts_from_given_params_and_goes_on_where_it_was_cut_off(tmp_path):
    params = {"w": jnp.full(3, 0.5), "b": jnp.ones(3)}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", params=params, on_progress=interrupt)
    np.testing.assert_allclose(saved(tmp_path / "run")["state"].params["b"], 1, atol=0.1)
    whole = run(tmp_path / "whole", params=params)
    chex.assert_trees_all_equal(run(tmp_path / "run", params=params), whole)
    chex.assert_trees_all_equal(saved(tmp_path / "run"), {"state": whole, "frame": FRAME})
    stored = checkpoint.read_config(tmp_path / "run" / "checkpoints" / "lohp")
    assert from_json(stored) == CONFIG


def test_consolidation_takes_half_as_many_updates(tmp_path):
    assert num_updates(CONFIG, "lohp") == 12
    assert num_updates(CONFIG, "lohp_consolidated") == 6
    assert num_updates(with_training(updates=1), "lohp_consolidated") == 1
    assert run(tmp_path / "run", method="lohp_consolidated").step == 6
