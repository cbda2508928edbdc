import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax.data.images import ImageSet
from lohp_jax.optimizers.hub import block_wise, hub
from lohp_jax.workloads.classification import classification
from lohp_jax.workloads.fine_tuning import fine_tuning, pretrain, transfer_pair

OPTIONS = {"widths": (6,)}


def bright_pixels(num_classes, *, seed, size=4):
    """Classes differ in one bright pixel."""
    rng = np.random.default_rng(seed)
    pool = rng.uniform(0, 0.3, (num_classes, 12, size, size, 1)).astype(np.float32)
    for c, place in enumerate(rng.permutation(16)[:num_classes]):
        pool[c, :, place // 4, place % 4] = 1.0
    return ImageSet(pool[:, :8], pool[:, 8:], f"pixels_{seed}")


SOURCE, TARGET = bright_pixels(3, seed=0), bright_pixels(4, seed=1)


@functools.cache
def start():
    family = classification(SOURCE, batch_size=16, **OPTIONS)
    learn = functools.partial(pretrain, family, num_steps=150, learning_rate=1e-2)
    return jax.jit(learn)(jax.random.key(0))


@functools.cache
def tuning():
    return fine_tuning(SOURCE, TARGET, start(), batch_size=16, **OPTIONS)


def source_scores(params):
    family = classification(SOURCE, **OPTIONS)
    return jax.jit(family.evaluate)(params, family.sample(jax.random.key(0)))


def test_pretraining_equals_a_loop_of_steps():
    family = classification(SOURCE, batch_size=4, **OPTIONS)
    task_key, init_key, loss_key = jax.random.split(jax.random.key(3), 3)
    data, params = family.sample(task_key), jax.jit(family.init)(init_key)
    optimizer = optax.adam(lambda step: 0.01 * (1 + jnp.cos(jnp.pi * step / 3)) / 2)

    @jax.jit
    def step(params, state, key):
        updates, state = optimizer.update(jax.grad(family.loss)(params, data, key), state)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    for key in jax.random.split(loss_key, 3):
        params, state = step(params, state, key)
    learn = functools.partial(pretrain, family, num_steps=3, learning_rate=0.01)
    chex.assert_trees_all_close(jax.jit(learn)(jax.random.key(3)), params, rtol=1e-4, atol=1e-6)


def test_pretraining_learns_the_source():
    assert source_scores(start())["accuracy"] > 0.9


def test_the_start_is_theta_0_under_a_new_head():
    init = jax.jit(tuning().init)
    first, again, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    for params in (first, other):
        body = {name: leaf for name, leaf in params.items() if name != "head"}
        chex.assert_trees_all_equal(body, {n: x for n, x in start().items() if n != "head"})
    assert first["head"]["w"].shape == (6, 4)
    assert (first["head"]["w"] != other["head"]["w"]).all()
    scores = jax.jit(tuning().evaluate)(first, tuning().sample(jax.random.key(0)))
    assert scores["forgetting"] == 0
    assert scores["source_accuracy"] == source_scores(start())["accuracy"]


def test_forgetting_is_what_the_old_head_loses():
    params = tuning().init(jax.random.key(0))
    params = {**params, "conv": jax.tree.map(jnp.negative, params["conv"])}
    data = tuning().sample(jax.random.key(0))
    scores = jax.jit(tuning().evaluate)(params, data)
    with_old_head = source_scores({**params, "head": start()["head"]})["accuracy"]
    assert scores["source_accuracy"] == with_old_head
    lost = source_scores(start())["accuracy"] - with_old_head
    assert lost > 0
    np.testing.assert_allclose(scores["forgetting"], lost, rtol=1e-6)
    target = jax.jit(classification(TARGET, **OPTIONS).evaluate)(params, data)
    chex.assert_trees_all_close({name: scores[name] for name in target}, target, rtol=1e-6)


def test_the_head_is_a_block_of_hub():
    """Where one entry of the gradient towers, the new head takes its hand-designed update (vanilla) and
    the rest the learned one (inverted).
    """
    params = tuning().init(jax.random.key(0))
    grads = jax.tree.map(lambda leaf: jnp.zeros_like(leaf).ravel().at[0].set(100.0), params)
    grads = jax.tree.map(lambda g, leaf: g.reshape(leaf.shape), grads, params)
    mode = block_wise(lambda path: path[0] == "head")
    optimizer = hub(optax.scale(-1.0), optax.scale(-3.0), mode=mode)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    for name, module in updates.items():
        expected = -100.0 if name == "head" else -300.0  # vanilla: hand-designed where g towers
        assert {float(leaf.ravel()[0]) for leaf in jax.tree.leaves(module)} == {expected}


@pytest.mark.slow
def test_adam_over_seeds_learns_the_target_as_it_does_one_by_one():
    family, optimizer = tuning(), optax.adam(1e-2)
    data = family.sample(jax.random.key(0))

    def run(key):
        params = family.init(key)

        def step(carry, step_key):
            value, grads = jax.value_and_grad(family.loss)(carry[0], data, step_key)
            updates, state = optimizer.update(grads, carry[1])
            return (optax.apply_updates(carry[0], updates), state), value

        start = (params, optimizer.init(params))
        (params, _), losses = jax.lax.scan(step, start, jax.random.split(key, 80))
        return losses, family.evaluate(params, data)

    keys = jax.random.split(jax.random.key(0), 2)
    losses, scores = jax.jit(jax.vmap(run))(keys)
    alone, _ = jax.jit(run)(keys[0])
    np.testing.assert_allclose(losses[0, :10], alone[:10], rtol=1e-3)
    assert (losses[:, -5:].mean(axis=1) < 0.6 * np.log(4)).all(), losses
    chex.assert_tree_all_finite(scores)


def test_transfer_by_classes_shares_no_image():
    images = bright_pixels(5, seed=2)
    source, target = transfer_pair(images, "classes")
    np.testing.assert_array_equal(np.concatenate([source.train, target.train]), images.train)
    np.testing.assert_array_equal(np.concatenate([source.query, target.query]), images.query)
    assert len(source.train) == 2 and len(target.query) == 3


@pytest.mark.parametrize(
    "shift, undo",
    [("rotated", lambda x: x.swapaxes(2, 3)[:, :, :, ::-1]), ("inverted", lambda x: 1 - x)],
)
def test_transfer_by_a_transformation_moves_and_renames_every_class(shift, undo):
    images = bright_pixels(4, seed=2)
    source, target = transfer_pair(images, shift, seed=1)
    order = np.random.default_rng(1).permutation(4)
    for pool, before in ((target.train, source.train), (target.query, source.query)):
        np.testing.assert_allclose(undo(pool), before[order], atol=1e-6)
        assert pool.dtype == np.float32 and pool.min() >= 0 and pool.max() <= 1
    assert source is images and target.name == f"pixels_2/{shift}"


def test_transfer_by_noise_depends_on_the_seed():
    images = bright_pixels(4, seed=2)
    _, target = transfer_pair(images, "noisy", seed=1)
    order = np.random.default_rng(1).permutation(4)
    inside = (target.train > 0) & (target.train < 1)
    noise = (target.train - images.train[order])[inside]
    assert 0.1 < noise.std() < 0.3 and target.train.dtype == np.float32
    assert (transfer_pair(images, "noisy", seed=1)[1].train == target.train).all()
    assert (transfer_pair(images, "noisy", seed=2)[1].train != target.train).any()


def test_bad_arguments():
    with pytest.raises(
        ValueError, match=r"shift must be one of .*'rotate'; did you mean 'rotated'"
    ):
        transfer_pair(SOURCE, "rotate")
    with pytest.raises(ValueError, match="expected 4 or more classes, got 3"):
        transfer_pair(SOURCE, "classes")
    with pytest.raises(ValueError, match=r"target images of shape \(4, 4, 1\), .*got \(5, 5, 1\)"):
        fine_tuning(SOURCE, bright_pixels(3, seed=0, size=5), start(), **OPTIONS)
    with pytest.raises(
        ValueError, match=r"theta_0 .* with \['conv'\]\['b'\] of shape \(9,\), got \(6"
    ):
        fine_tuning(SOURCE, TARGET, start(), widths=(9,))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        fine_tuning(SOURCE, TARGET, start(), batch_size=0, **OPTIONS)
