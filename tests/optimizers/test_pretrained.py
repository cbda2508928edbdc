"""The learned optimizer that ships loads, works out of the box and says what it was made by."""

import hashlib
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.optimizers.celo2 import celo2
from lohp_jax.optimizers.pretrained import (
    PRETRAINED,
    meta_trained_optimizer,
    pretrained,
    pretrained_optimizer,
)
from lohp_jax.optimizers.small import Rate
from lohp_jax.optimizers.theta import check_theta, save_theta

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks" / "pretrained" / "results.json"
PARAMS = {"w": jnp.linspace(-1, 1, 12).reshape(4, 3), "b": jnp.zeros(3)}


def loss_fn(params):
    inputs = jnp.cos(jnp.arange(20.0)).reshape(5, 4)
    return jnp.mean((inputs @ params["w"] + params["b"][None] - 0.5) ** 2)


def train(optimizer, num_steps):
    @jax.jit
    def step(params, state):
        gradients = jax.grad(loss_fn)(params)
        updates, state = optimizer.update(gradients, state, params)
        return jax.tree.map(jnp.add, params, updates), state, updates

    params, state, sizes = PARAMS, optimizer.init(PARAMS), []
    for _ in range(num_steps):
        params, state, updates = step(params, state)
        sizes.append(float(jnp.sqrt(jnp.mean(updates["w"] ** 2))))
    return params, sizes


@pytest.mark.parametrize("name", PRETRAINED)
def test_it_loads_and_trains_out_of_the_box(name):
    theta = pretrained(name)
    check_theta(theta, "celo2")
    assert sum(leaf.size for leaf in jax.tree.leaves(theta)) < 400
    params, sizes = train(pretrained_optimizer(name, 100), 100)
    assert float(loss_fn(params)) < 0.05 * float(loss_fn(PARAMS))
    rate = PRETRAINED[name]
    np.testing.assert_allclose(sizes[0], rate.peak * (100 / 1000) ** rate.exponent, rtol=1e-3)
    np.testing.assert_allclose(sizes[-1], sizes[0] * 0.01**rate.power, rtol=1e-3)


def test_a_learning_rate_of_ones_own_is_the_peak():
    _, sizes = train(pretrained_optimizer("small", 7, learning_rate=0.25), 1)
    np.testing.assert_allclose(sizes[0], 0.25, rtol=1e-3)


def test_the_theta_works_in_celo2():
    params, sizes = train(celo2(pretrained("small"), 0.01, orthogonalise=False), 50)
    np.testing.assert_allclose(sizes, np.full(50, 0.01), rtol=1e-3)
    assert float(loss_fn(params)) < 0.5 * float(loss_fn(PARAMS))


def test_rate_is_that_of_the_results():
    made = json.loads(RESULTS.read_text())["meta_training"]
    rate = PRETRAINED["small"]
    np.testing.assert_allclose(rate, Rate(**made["rate"]), rtol=1e-6)
    assert made["config"]["longest"] == 2000 and made["config"]["shortest"] == 100


@pytest.mark.parametrize("function", [pretrained, lambda name: pretrained_optimizer(name, 10)])
def test_unknown_name(function):
    with pytest.raises(ValueError, match=r"\('small',\), got 'smal'; did you mean 'small'\?"):
        function("smal")


@pytest.mark.parametrize(
    "options, message",
    [
        *(
            ({"num_steps": bad}, f"num_steps must be a positive whole number, got {bad!r}")
            for bad in (0, 0.5, 2.5, True, "100")
        ),
        (
            {"num_steps": 10, "learning_rate": -1.0},
            "learning_rate must be positive and finite, got -1",
        ),
        ({"num_steps": 10, "learning_rate": float("nan")}, "learning_rate must be .*, got nan"),
    ],
)
def test_bad_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        pretrained_optimizer("small", **options)


def test_learning_rates_can_be_mapped_over():
    params, gradients = {"w": jnp.ones((4, 3))}, {"w": jnp.full((4, 3), 0.5)}

    def first_update(rate):
        optimizer = pretrained_optimizer("small", 100, learning_rate=rate)
        return optimizer.update(gradients, optimizer.init(params), params)[0]["w"]

    updates = jax.vmap(first_update)(jnp.array([0.01, 0.03]))
    np.testing.assert_allclose(updates[1], 3 * updates[0], rtol=1e-5)
    assert float(jnp.max(jnp.abs(updates[0]))) > 0


def meta_run(directory, rate):
    """The files of a finished run with the weights that ship."""
    save_theta(directory / "theta.msgpack", pretrained("small"))
    (directory / "results.json").write_text(json.dumps({"rate": rate}))
    return directory


def test_the_optimizer_of_a_run_is_made_of_its_files(tmp_path):
    meta_run(tmp_path, PRETRAINED["small"]._asdict())
    again, _ = train(meta_trained_optimizer(tmp_path, 30), 30)
    chex.assert_trees_all_equal(again, train(pretrained_optimizer("small", 30), 30)[0])
    _, sizes = train(meta_trained_optimizer(tmp_path, 7, learning_rate=0.25), 1)
    np.testing.assert_allclose(sizes, [0.25], rtol=1e-3)


def test_what_is_no_finished_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected results\.json in .*lohp meta-train"):
        meta_trained_optimizer(tmp_path, 10)
    meta_run(tmp_path, {"top": 0.1})
    with pytest.raises(ValueError, match=r"results\.json holds no learning rate"):
        meta_trained_optimizer(tmp_path, 10)
    meta_run(tmp_path, PRETRAINED["small"]._asdict())
    with pytest.raises(ValueError, match="meta_trained_optimizer: num_steps must be a positive"):
        meta_trained_optimizer(tmp_path, 0)
    (tmp_path / "theta.msgpack").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected theta\.msgpack in"):
        meta_trained_optimizer(tmp_path, 10)


def test_the_weights_are_those_of_the_results():
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(pretrained("small")):
        digest.update(np.asarray(leaf, "<f4").tobytes())
    assert digest.hexdigest() == json.loads(RESULTS.read_text())["theta_sha256"]
