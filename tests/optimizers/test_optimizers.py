import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax.optimizers import OPTIMIZERS, make_optimizer

PARAMS = {"w": np.float32([1.0, -2.0]), "b": np.float32(0.5)}


def loss_fn(params):
    return jnp.sum(params["w"] ** 4) + (params["b"] - 1.0) ** 2


def run(optimizer, num_steps=3, **extra):
    """Weights after a few steps."""
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(num_steps):
        updates, state = optimizer.update(jax.grad(loss_fn)(params), state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize(
    "name, expected",
    [
        ("sgd", optax.sgd(0.5)),
        ("sgd:0.01", optax.sgd(0.01)),
        ("momentum:1e-2", optax.sgd(0.01, momentum=0.9)),
        ("adam", optax.adam(0.05)),
        ("adam:0.2", optax.adam(0.2)),
        ("adamw:0.2", optax.adamw(0.2)),
    ],
)
def test_a_name_stands_for_an_optimizer_of_optax(name, expected):
    chex.assert_trees_all_close(run(make_optimizer(name)), run(expected), rtol=1e-6)


def test_a_learning_rate_of_sam_is_that_of_its_descent():
    updates = run(
        make_optimizer("sam:0.01"), num_steps=1, grad_fn=lambda params, _: jax.grad(loss_fn)(params)
    )
    gradient = jax.tree.map(np.float64, jax.grad(loss_fn)(PARAMS))
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(gradient)))
    climbed = jax.tree.map(lambda p, g: p + 0.05 * g / norm, PARAMS, gradient)
    expected = jax.tree.map(lambda p, g: p - 0.01 * g, PARAMS, jax.grad(loss_fn)(climbed))
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_what_learned_ones_ask_for(name):
    extra = {"value": 1.0, "value_fn": loss_fn, "grad_fn": lambda p, _: jax.grad(loss_fn)(p)}
    assert loss_fn(run(make_optimizer(f"{name}:0.01"), **extra)) < loss_fn(PARAMS)


@pytest.mark.parametrize(
    "name, nearest", [("adma", "adam"), ("SGD", "sgd"), ("", ""), ("sma", "sam")]
)
def test_an_unknown_name_is_answered_with_the_nearest(name, nearest):
    with pytest.raises(
        ValueError, match=f"make_optimizer: .*got '{name}'; did you mean '{nearest}"
    ):
        make_optimizer(name)


@pytest.mark.parametrize("rate", ["", "0", "-0.1", "nan", "inf", "fast", "0.1:0.2"])
def test_a_learning_rate_must_be_positive_and_finite(rate):
    message = f"positive learning rate after the colon, got 'adam:{rate}'; write e.g. 'adam:0.05'"
    with pytest.raises(ValueError, match=message):
        make_optimizer(f"adam:{rate}")
