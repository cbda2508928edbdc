"""One update is Adam on the plain mean loss (on several devices: test_strategies.py)."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax.methods.lohp import lohp
from lohp_jax.methods.step import (
    Batch,
    TrainState,
    draw_batches,
    example_at,
    make_update,
)
from lohp_jax.networks.policy import NetworkConfig
from lohp_jax.policy.config import HybridConfig
from lohp_jax.tasks import make_family
from lohp_jax.training.engine import scan_updates
from lohp_jax.training.gradient import scheduled_adam
from lohp_jax.trajectories.dataset import Coordinates, Dataset, make_space
from lohp_jax.types import TaskFamily

NETWORK = NetworkConfig(trunk="mlp", widths=(8,), embedding=8)
NUM_STEPS = 20


def noisy_context(data, key):
    return {"x": data["x"] + 0.1 * jax.random.normal(key, (3,))}


FAMILY = TaskFamily(None, None, None, None, noisy_context)


def objective(params, example, key):
    """A loss that depends on the context, the task, the stored tokens and the key."""
    noise = 0.1 * jax.random.normal(key, (3,))
    error = params["w"] * (example.context["x"] + noise) - example.tokens[-1, 0] - example.data["x"]
    scale = 1.0 + example.teacher
    loss = scale * jnp.sum(error**2) + jnp.sum(params["b"] ** 2)
    return loss, {"error": jnp.abs(error), "scale": scale}


@pytest.fixture(scope="module")
def dataset():
    rng = np.random.default_rng(0)
    tokens, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((5, 2, 1, 3), (5, 3)))
    return Dataset(tokens, jnp.arange(5) % 2, {"x": x})


@pytest.fixture
def state():
    params = {"w": jnp.asarray([1.0, -2.0, 0.5]), "b": jnp.asarray([0.3])}
    return TrainState(params, optax.sgd(1.0).init(params), jnp.int32(7))


def batch_of(size, seed=0):
    index_key, key = jax.random.split(jax.random.key(seed))
    return Batch(jax.random.randint(index_key, (size,), 0, 5), jax.random.split(key, size))


def plain_losses(params, batch, dataset):
    """One example at a time, as the definition says."""
    losses, infos = [], []
    for index, key in zip(np.asarray(batch.index), batch.key, strict=True):
        context_key, key = jax.random.split(key)
        data = {"x": dataset.data["x"][index]}
        context = noisy_context(data, context_key)
        tokens, teacher = dataset.tokens[index], dataset.teacher[index]
        noise = 0.1 * jax.random.normal(key, (3,))
        error = params["w"] * (context["x"] + noise) - tokens[-1, 0] - data["x"]
        losses.append((1 + teacher) * jnp.sum(error**2) + jnp.sum(params["b"] ** 2))
        infos.append(jnp.abs(error))
    return jnp.stack(losses), jnp.stack(infos)


@pytest.mark.parametrize("size", [2, 6])
def test_update_follows_the_gradient_of_the_mean_loss(dataset, state, size):
    update = jax.jit(make_update(FAMILY, objective, optax.sgd(1.0)))
    batch = batch_of(size)
    reached, metrics = update(state, batch, dataset)

    def mean_loss(params):
        losses, infos = plain_losses(params, batch, dataset)
        return losses.mean(), infos.mean(axis=0)

    (loss, error), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
    expected = jax.tree.map(lambda p, g: p - g, state.params, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), reached.params, expected)
    norm = np.sqrt(sum(float((np.asarray(g) ** 2).sum()) for g in grads.values()))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)
    np.testing.assert_allclose(metrics["error"], error, rtol=1e-5)
    assert set(metrics) == {"loss", "gradient_norm", "gradient_snr", "error", "scale"}
    assert reached.step == 8


def half_gradient(state, batch, dataset, offset):
    """Of every other example, as one vector."""
    half = Batch(batch.index[offset::2], batch.key[offset::2])
    grads = jax.grad(lambda params: plain_losses(params, half, dataset)[0].mean())(state.params)
    return np.concatenate(jax.tree.leaves(grads))


def test_gradient_snr_is_that_of_two_interleaved_half_batches(dataset, state):
    batch = batch_of(6)
    _, metrics = jax.jit(make_update(FAMILY, objective, optax.sgd(1.0)))(state, batch, dataset)
    first, second = (half_gradient(state, batch, dataset, i) for i in (0, 1))
    signal, noise = np.sqrt(max(first @ second, 0)), np.linalg.norm(first - second) / 2
    np.testing.assert_allclose(metrics["gradient_snr"], signal / noise, rtol=1e-4)


def test_gradient_snr_of_opposed_halves_is_zero():
    def opposed(params, example, key):
        return params["w"] * (1.0 - 2.0 * example.teacher), {}

    dataset = Dataset(jnp.zeros((2, 1, 1, 1)), jnp.arange(2), {"x": jnp.zeros((2, 3))})
    params = {"w": jnp.float32(1)}
    state = TrainState(params, optax.sgd(1.0).init(params), jnp.int32(0))
    batch = Batch(jnp.arange(4) % 2, jax.random.split(jax.random.key(0), 4))
    _, metrics = make_update(FAMILY, opposed, optax.sgd(1.0))(state, batch, dataset)
    assert metrics["gradient_snr"] == 0


def test_update_refuses_an_odd_batch(dataset, state):
    update = make_update(FAMILY, objective, optax.sgd(1.0))
    with pytest.raises(ValueError, match=r"even number of examples on each device, got 3; choose"):
        update(state, batch_of(3), dataset)


def test_scan_is_a_loop_of_updates(dataset, state):
    update = make_update(FAMILY, objective, optax.sgd(0.01))
    batches = draw_batches(jax.random.key(1), dataset, 3, num_steps=4, batch_size=2)
    reached, metrics = scan_updates(update)(state, batches, dataset)
    losses, update = [], jax.jit(update)
    for step in range(4):
        batch = jax.tree.map(lambda leaf, step=step: leaf[step], batches)
        state, info = update(state, batch, dataset)
        losses.append(info["loss"])
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-6)
    np.testing.assert_allclose(reached.params["w"], state.params["w"], rtol=1e-6)
    assert reached.step == 11 and metrics["error"].shape == (4, 3)


def test_a_batch_depends_on_its_step_alone(dataset):
    draw = functools.partial(draw_batches, jax.random.key(2), dataset, batch_size=4)
    draw = jax.jit(draw, static_argnames="num_steps")
    together = draw(0, num_steps=6)
    assert together.index.shape == together.key.shape == (6, 4)
    apart = [draw(first, num_steps=num) for first, num in ((0, 1), (1, 3), (4, 2))]
    for field in range(2):
        pieces = jnp.concatenate([batch[field] for batch in apart])
        assert jnp.array_equal(together[field], pieces)


def test_batches_cover_the_data_set_with_fresh_keys(dataset):
    batches = draw_batches(jax.random.key(3), dataset, 0, num_steps=40, batch_size=4)
    assert set(np.asarray(batches.index).ravel()) == set(range(5))
    keys = jax.random.key_data(batches.key).reshape(160, -1)
    assert len(np.unique(np.asarray(keys), axis=0)) == 160


def test_optimizer_warms_up_decays_and_clips():
    params = {"w": jnp.zeros(1)}
    optimizer = scheduled_adam(20, 0.5, warmup=2)
    state, sizes = optimizer.init(params), []
    for _ in range(20):
        step, state = optimizer.update({"w": jnp.full(1, 1e6)}, state, params)
        sizes.append(-float(step["w"][0]))
    assert sizes[0] == 0 and np.argmax(sizes) == 2  # a tenth of the updates
    np.testing.assert_allclose([sizes[1], sizes[2]], [0.25, 0.5], rtol=1e-4)
    assert np.all(np.diff(sizes[2:]) < 0) and 0.005 < sizes[-1] < 0.01
    clipped = optax.tree.get(state, "mu")["w"]
    assert abs(float(clipped[0])) <= 1.0


def real_problem(network=NETWORK, **settings):
    """The main method on digits; its trajectories are straight lines."""
    family = make_family("digits_5way")
    keys = jax.random.split(jax.random.key(0))
    theta_0 = jax.jit(family.init)(keys[0])
    scale = jax.tree.map(lambda leaf: jnp.float32(1), theta_0)
    coordinates = Coordinates(theta_0, scale, jnp.int32(0))
    space = make_space(family, coordinates, channels=16, num_steps=2, num_teachers=2)
    method = lohp(network=network, **settings).bound(space)
    ends = np.random.default_rng(0).normal(size=(8, *space.codec.mask.shape))
    ends = np.where(space.codec.mask, ends, 0).astype(np.float32)
    tokens = jnp.asarray(np.stack([0 * ends, 0.7 * ends, ends], axis=1))
    data = jax.jit(jax.vmap(family.sample))(jax.random.split(keys[1], 8))
    dataset = Dataset(tokens, jnp.arange(8) % 2, data)
    optimizer = scheduled_adam(NUM_STEPS, 3e-3, warmup=NUM_STEPS // 10)
    update = make_update(family, method.loss, optimizer)

    def init():
        params = method.init(keys[0], example_at(family, dataset, 0, keys[0]))
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    return init, update, dataset


def test_metrics_of_the_main_method():
    init, update, dataset = real_problem()
    state, batch = jax.eval_shape(init), batch_of(4)
    reached, metrics = jax.eval_shape(update, state, batch, dataset)
    scalars = {"loss", "gradient_norm", "gradient_snr", "off_policy", "on_policy"}
    scalars |= {"progress", "cosine"}
    vectors = {"residual_by_length": 2, "log_coefficient": 3, "log_std": 2, "backward_log_std": 2}
    expected = dict.fromkeys(scalars, ()) | {name: (size,) for name, size in vectors.items()}
    assert {name: value.shape for name, value in metrics.items()} == expected
    chex.assert_trees_all_equal_shapes_and_dtypes(reached, state)


@pytest.mark.slow
def test_an_off_policy_objective_alone_trains():
    """XLA on a CPU crashed on the axis of size 1 that a single path made (jaxlib 0.10)."""
    network = NetworkConfig(trunk="unet", widths=(8, 16), embedding=8)
    init, update, dataset = real_problem(network, balance=HybridConfig(on_policy=0.0))
    run = jax.jit(scan_updates(update))
    batches = draw_batches(jax.random.key(3), dataset, 0, num_steps=10, batch_size=8)
    _, metrics = run(jax.jit(init)(), batches, dataset)
    assert metrics["loss"][-1] < metrics["loss"][0]
