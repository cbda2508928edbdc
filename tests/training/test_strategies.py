"""Twenty updates of every training are the same on one device and on eight, by a mesh and by pmap.

A training is one entry of `TRAININGS`. Several CPU devices need a process of their own (`NPROC=16`
before jax starts, or steps can deadlock): run as a script, this file writes what one entry computed,
in float64, where rounding that optimizers blow up stays far below the tolerance.
"""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax.diffusion.config import DiffusionConfig
from lohp_jax.diffusion.guidance import GuidanceConfig
from lohp_jax.diffusion.training import train_diffusion
from lohp_jax.learned_solvers.lista import train_lista
from lohp_jax.learned_solvers.recurrent import train_learned_solver
from lohp_jax.learned_solvers.regression import train_regression
from lohp_jax.methods import METHODS
from lohp_jax.methods.lohp import lohp
from lohp_jax.methods.training import UpdateConfig, train_method
from lohp_jax.networks.denoiser import DenoiserConfig
from lohp_jax.networks.policy import NetworkConfig
from lohp_jax.optimizers.meta import start_pairs, training_unroll
from lohp_jax.problems.lasso import lasso
from lohp_jax.training.engine import Training, each_step, step_keys, train
from lohp_jax.training.gradient import first_state, make_update, scheduled_adam
from lohp_jax.training.pes import MetaState, make_meta_update
from lohp_jax.trajectories.dataset import (
    Coordinates,
    Dataset,
    make_coordinates,
    make_space,
    make_window_dataset,
)
from lohp_jax.trajectories.store import create
from lohp_jax.types import TaskFamily

NUM_DEVICES, UPDATES, BATCH = 8, 20, 16
STRATEGIES = ("jit", "mesh", "pmap")
SIZES = {"updates": UPDATES, "batch_size": BATCH, "log_every": UPDATES}
MATRIX = np.array([[0.8, -0.3, 0.1, 0.5], [0.6, 0.7, -0.6, 0.1], [0.1, 0.5, 0.8, -0.8]])


def key():
    return jax.random.key(0)


def small_lasso():
    def sample(key, split="train"):
        return {
            "A": jnp.array(MATRIX),
            "b": jax.random.normal(key, (3,)),
            "penalty": jnp.array(0.1),
        }

    return dataclasses.replace(lasso(3, 4), sample=sample)


def small_quadratic():
    """|x - A^T b|² / 2."""

    def solution(problem):
        return problem["A"].T @ problem["b"]

    return dataclasses.replace(
        small_lasso(),
        objective=lambda x, problem: 0.5 * jnp.sum((x - solution(problem)) ** 2),
        solve=lambda problem, key: solution(problem),
        features=lambda problem: problem["b"],
        composite=None,
    )


def denoiser_config(**options):
    network = DenoiserConfig(width=8, depth=1)
    return DiffusionConfig(network=network, **SIZES | {"pool": 32, "ema": 0.9} | options)


def toy(strategy):
    """A loss whose runs go on from update to update, each with a key of its own."""
    optimizer = scheduled_adam(UPDATES, 0.05)

    def start():
        keys = jax.random.split(key(), BATCH)
        return first_state({"w": jnp.ones(3)}, optimizer, {"x": jnp.zeros((BATCH, 3)), "key": keys})

    def loss_fn(params, carry, keys, step):
        own = jax.vmap(lambda key: jax.random.normal(key, (3,)))
        x = 0.5 * carry["x"] + params["w"][None] * own(keys) + 0.1 * own(carry["key"])
        kept = {"x": jax.lax.stop_gradient(x), "key": jnp.where(step % 3 == 0, keys, carry["key"])}
        return jnp.mean((x - 1.0) ** 2), (kept, {})

    draw = each_step(lambda step: step_keys(jax.random.key(1), step, BATCH))
    update = make_update(loss_fn, optimizer)
    state = train(Training("toy", start, update, draw, UPDATES, log_every=10), strategy=strategy)
    return state._replace(carry={**state.carry, "key": jax.random.key_data(state.carry["key"])})


def diffusion(strategy):
    """With a warm start, on the pool, with gates that learn from gradients at probes."""
    guidance = GuidanceConfig(("parameters", "smoothed_gradient"), combination="learned", probes=2)
    config = denoiser_config(guidance=guidance, warm_start=True)
    return train_diffusion(small_quadratic(), config, key(), strategy=strategy).params


def regression(strategy):
    """On new problems in every update."""
    config = denoiser_config(pool=0)
    return train_regression(small_quadratic(), config, key(), strategy=strategy).params


def learned_solver(strategy):
    """Runs of two windows each."""
    options = {**SIZES, "num_steps": 4, "window": 2, "starts": "frame", "strategy": strategy}
    return train_learned_solver(small_lasso(), "l2o_pa", key(), **options)


def lista(strategy):
    return train_lista(small_lasso(), key(), num_layers=3, **SIZES, strategy=strategy).params


def regression_task(size):
    """Task: a vector to find."""

    def loss(params, data, key):
        return jnp.mean((params["w"] - data + 0.1 * jax.random.normal(key, (size,))) ** 2)

    return TaskFamily(
        sample=lambda key, split="train": jax.random.normal(key, (size,)),
        init=lambda key: {"w": jax.random.normal(key, (size,))},
        loss=loss,
        evaluate=lambda params, data: {"loss": jnp.mean((params["w"] - data) ** 2)},
        context=lambda data, key: (),
    )


def pes(strategy):
    """Of two kinds of tasks, with unrolls that end and start anew."""
    unrolls = [
        training_unroll(
            regression_task(size),
            lambda meta, num_steps: optax.adam(jnp.exp(meta["log_rate"]), b1=meta["decay"]),
            truncation=2,
            lengths=(2, 8),
            scale_range=2.0,
            query_weight=0.4,
        )
        for size in (2, 3)
    ]
    optimizer, meta = optax.adam(0.05), {"log_rate": jnp.array(-3.0), "decay": jnp.array(0.5)}

    def start():
        pairs = tuple(start_pairs(unroll, meta, key(), NUM_DEVICES) for unroll in unrolls)
        return MetaState(meta, optimizer.init(meta), pairs, jnp.zeros((), jnp.int32))

    draw = each_step(lambda step: step_keys(jax.random.key(1), step, NUM_DEVICES))
    update = make_meta_update(unrolls, optimizer, sigma=0.02)
    state = train(Training("pes", start, update, draw, UPDATES, log_every=10), strategy=strategy)
    return state.meta, [pairs.states for pairs in state.pairs]


def lines():
    """Task: y = slope x, of which a context shows two points, by three weights."""

    def context(data, key):
        x = jax.random.normal(key, (2, 1))
        return {"x": x, "y": data["slope"] * x}

    def loss(params, data, key):
        x = jax.random.normal(key, (4,))
        return jnp.mean((params["w"].sum() * x - data["slope"] * x) ** 2)

    return TaskFamily(
        sample=lambda key, split="train": {"slope": jax.random.normal(key)},
        init=lambda key: {"w": jax.random.normal(key, (3,))},
        loss=loss,
        evaluate=lambda params, data: {"objective": loss(params, data, key()), "loss": 0.0},
        context=context,
        context_loss=lambda params, context: jnp.mean(
            (params["w"].sum() * context["x"] - context["y"]) ** 2
        ),
    )


def method(name, strategy):
    """A method of Lo-Hp, on eight made-up trajectories of two teachers."""
    family, theta_0 = lines(), {"w": jnp.array([0.1, -0.2, 0.3])}
    coordinates = Coordinates(theta_0, {"w": jnp.ones(())}, jnp.int32(0))
    space = make_space(family, coordinates, channels=2, num_steps=2, num_teachers=2)
    shape = (8, space.num_steps + 1, *space.codec.mask.shape)
    tokens = jnp.where(space.codec.mask, jax.random.normal(key(), shape), 0.0)
    tasks = jax.vmap(family.sample)(jax.random.split(key(), 8))
    network = NetworkConfig(trunk="unet", widths=(4, 4), embedding=4)
    return train_method(
        METHODS[name](network=network),
        space,
        Dataset(tokens, jnp.arange(8) % 2, tasks),
        UpdateConfig(UPDATES, BATCH, log_every=UPDATES),
        key(),
        strategy=strategy,
    )


def windows(strategy, feedback="none"):
    """The main method on windows of two tokens, read from a store."""
    family, theta_0 = lines(), {"w": jnp.array([0.1, -0.2, 0.3]), "v": jnp.ones((4, 2))}
    rng, store = np.random.default_rng(0), create(None, {})
    states = {name: rng.normal(size=(8, 3, *leaf.shape)) for name, leaf in theta_0.items()}
    tasks = jax.vmap(family.sample)(jax.random.split(key(), 8))
    losses, teacher = rng.uniform(size=(8, 3)), np.arange(8) % 2
    store.write("0", {"states": states, "losses": losses, "teacher": teacher, "data": tasks})
    space = make_space(
        family, make_coordinates(store, theta_0), channels=2, num_steps=2, num_teachers=2
    )
    return train_method(
        lohp(network=NetworkConfig(widths=(4, 4), embedding=4, window=2), feedback=feedback),
        space,
        make_window_dataset(store, space.codec, 3),
        UpdateConfig(UPDATES, BATCH, log_every=UPDATES),
        key(),
        strategy=strategy,
    )


TRAININGS = {f.__name__: f for f in (toy, diffusion, regression, learned_solver, lista, pes)}
TRAININGS |= {name: functools.partial(method, name) for name in METHODS}
TRAININGS["windows"] = windows
TRAININGS["windows_with_feedback"] = functools.partial(windows, feedback="gradient")
QUICK = ("toy",)


def write_leaves(path, name):
    """Every leaf of what a training returns, by strategy and path."""
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    jax.config.update("jax_enable_x64", True)
    arrays = {}
    for strategy in STRATEGIES:
        for place, leaf in jax.tree.leaves_with_path(TRAININGS[name](strategy)):
            arrays[f"{strategy}{jax.tree_util.keystr(place)}"] = np.asarray(leaf)
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in TRAININGS]
)
def test_eight_devices_equal_one_after_twenty_updates(tmp_path, name):
    root = str(pathlib.Path(__file__).parents[2])
    environment = os.environ | {"NPROC": "16", "JAX_PLATFORMS": "cpu", "PYTHONPATH": root}
    script = [sys.executable, __file__, str(tmp_path / "leaves.npz"), name]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "leaves.npz", allow_pickle=False) as file:
        arrays = dict(file)
    places = [place.removeprefix("jit") for place in arrays if place.startswith("jit")]
    assert len(arrays) == len(STRATEGIES) * len(places) > 0
    for place in places:
        one = arrays[f"jit{place}"]
        for strategy in STRATEGIES[1:]:
            np.testing.assert_allclose(
                arrays[strategy + place], one, rtol=1e-5, atol=3e-7, err_msg=strategy + place
            )


if __name__ == "__main__":
    write_leaves(pathlib.Path(sys.argv[1]), sys.argv[2])
