"""The loop of the issue: a clipped HUB of AdamW and a learned optimizer trains models of Haiku and flax.

The learned optimizer is a narrow VeLO from a file of random numbers. Its updates have no meaning; so
that the loss must fall, the output that scales them (`step_size`) is set to a small constant, which
makes HUB's blend AdamW plus a disturbance two orders smaller. The models have no biases, as the update
compiles for every shape of a tensor.
"""

import pathlib

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from lohp_jax import celo, hub, load_theta, velo
from lohp_jax.optimizers import hub_diagnostics, save_theta

CELO = pathlib.Path(__file__).parents[2].parent / "shared" / "oracles" / "celo_theta.state"
X = np.float32(np.random.default_rng(0).normal(size=(64, 3)))
Y = np.sin(X @ np.float32([[1.0], [-2.0], [0.5]]))


@pytest.fixture
def path(tmp_path, random_theta, narrow):
    theta = random_theta("velo", 1, scale=0.15, hidden=8, bank=4)
    theta["rnn_params"]["step_size"]["w"][:] = 0.0
    theta["rnn_params"]["step_size"]["b"][:] = 0.01
    save_theta(tmp_path / "velo.msgpack", theta)
    return tmp_path / "velo.msgpack"


def make_optimizer(path, mode="invert", learning_rate=1e-2):
    learned = velo(load_theta(path), num_steps=10_000)
    return optax.chain(
        optax.clip_by_global_norm(1.0), hub(optax.adamw(learning_rate), learned, mode=mode)
    )


def train(loss_fn, params, optimizer, num_steps=60):
    """Losses at every step, and the last state."""

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(gradients, state, params, value=value)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for _ in range(num_steps):
        params, state, value = step(params, state)
        losses.append(float(value))
    return losses, state


def haiku_model():
    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([16, 1], with_bias=False)(x)))
    return network.init(jax.random.key(0), X), network.apply


def linen_model():
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.relu(linen.Dense(16, use_bias=False)(x))
            return linen.Dense(1, use_bias=False)(x)

    return Model().init(jax.random.key(0), X), Model().apply


def nnx_model():
    first, second = (
        nnx.Linear(n, m, use_bias=False, rngs=nnx.Rngs(seed))
        for seed, (n, m) in enumerate([(3, 16), (16, 1)])
    )
    model = nnx.Sequential(first, nnx.relu, second)
    graph, params = nnx.split(model, nnx.Param)
    return params, lambda params, x: nnx.merge(graph, params)(x)


@pytest.mark.parametrize(
    "model",
    [linen_model, *(pytest.param(m, marks=pytest.mark.slow) for m in (haiku_model, nnx_model))],
)
def test_the_loss_of_a_users_model_falls(model, path):
    params, apply = model()

    def loss_fn(params):
        return jnp.mean((apply(params, X) - Y) ** 2)

    losses, state = train(loss_fn, params, make_optimizer(path))
    assert np.isfinite(losses).all() and losses[-1] < 0.7 * losses[0]
    weights = list(hub_diagnostics(state)["mean_weight"].values())
    expected = [1 - 1 / p.size for p in jax.tree.leaves(params)]  # in every tensor
    np.testing.assert_allclose(sorted(weights), sorted(expected), rtol=1e-5, atol=1e-6)


def test_parameters_differ_from_those_of_adamw_by_what_the_learned_optimizer_adds(path):
    """Of which "invert" takes 1 / K on the whole."""
    params, apply = haiku_model()
    gradients = jax.grad(lambda params: jnp.mean((apply(params, X) - Y) ** 2))(params)
    adamw, learned = optax.adamw(1e-2), velo(load_theta(path), num_steps=10_000)
    optimizer = hub(adamw, learned, mode="invert")

    @jax.jit
    def updates_of_all(gradients):
        return [
            each.update(gradients, each.init(params), params, value=1.0)[0]
            for each in map(optax.with_extra_args_support, (optimizer, adamw, learned))
        ]

    updates, hand, theirs = updates_of_all(gradients)
    for g, u, h, t in zip(*map(jax.tree.leaves, (gradients, updates, hand, theirs)), strict=True):
        share = np.exp(np.abs(np.float64(g))) / np.exp(np.abs(np.float64(g))).sum()
        added = share * (np.float64(t) - h)
        np.testing.assert_allclose(u - h, added, rtol=1e-3, atol=1e-7)
        assert np.abs(added).max() > 1e-5


def test_steps_beyond_those_planned_stay_finite(path):
    params, apply = haiku_model()
    optimizer = hub(optax.adamw(1e-2), velo(load_theta(path), num_steps=10), mode="invert")

    def loss_fn(params):
        return jnp.mean((apply(params, X) - Y) ** 2)

    losses, _ = train(loss_fn, params, optimizer, num_steps=40)
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


@pytest.mark.skipif(not CELO.exists(), reason=f"the weights of Celo are not here ({CELO})")
def test_with_the_published_weights_of_celo_it_ends_below_the_hand_designed_optimizer():
    params, apply = haiku_model()

    def loss_fn(params):
        return jnp.mean((apply(params, X) - Y) ** 2)

    hand = optax.adamw(1e-2)
    learned = celo(load_theta(CELO), num_steps=60)
    guarded, _ = train(loss_fn, params, hub(hand, learned, mode="trust"))
    alone, _ = train(loss_fn, params, optax.with_extra_args_support(hand))
    assert guarded[-1] < alone[-1]
