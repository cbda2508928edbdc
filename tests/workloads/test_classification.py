import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax.data.images import ImageSet
from lohp_jax.networks.classifiers import make_classifier
from lohp_jax.workloads.classification import classification, labelled, score

NUM_CLASSES = 3
TINY = {"cnn": {"widths": (6,)}, "vit": {"patch_size": 2, "depth": 1, "width": 8, "num_heads": 2}}


def stripes(num_train=8, num_query=4):
    """Classes differ in the row that is bright; 4 x 4 images with noise."""
    rng = np.random.default_rng(0)
    pool = rng.uniform(0, 0.3, (NUM_CLASSES, num_train + num_query, 4, 4, 1))
    for c in range(NUM_CLASSES):
        pool[c, :, c] += 0.7
    pool = pool.astype(np.float32)
    return ImageSet(pool[:, :num_train], pool[:, num_train:], "stripes")


@functools.cache
def tiny_family(name):
    return classification(stripes(), name, batch_size=16, **TINY[name])


def train(family, key, *, num_steps=40):
    params, data, optimizer = family.init(key), family.sample(key), optax.adam(1e-2)

    def step(carry, step_key):
        value, grads = jax.value_and_grad(family.loss)(carry[0], data, step_key)
        updates, state = optimizer.update(grads, carry[1])
        return (optax.apply_updates(carry[0], updates), state), value

    keys = jax.random.split(key, num_steps)
    (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    return params, losses


@pytest.mark.parametrize("name", ["cnn", pytest.param("vit", marks=pytest.mark.slow)])
def test_adam_learns_from_every_start_as_it_does_one_by_one(name):
    family = tiny_family(name)
    keys = jax.random.split(jax.random.key(0), 2)
    params, losses = jax.jit(jax.vmap(functools.partial(train, family)))(keys)
    alone_params, alone = jax.jit(functools.partial(train, family))(keys[1])
    np.testing.assert_allclose(losses[1, :10], alone[:10], rtol=1e-3)
    np.testing.assert_allclose(losses[:, 0], np.log(NUM_CLASSES), atol=0.1)  # the head starts small
    assert (losses[:, -5:].mean(axis=1) < 0.5 * np.log(NUM_CLASSES)).all(), losses
    scores = jax.jit(family.evaluate)(alone_params, family.sample(keys[0]))
    assert scores["accuracy"] > 0.9
    chex.assert_tree_all_finite((params, scores))
    assert not np.array_equal(losses[0], losses[1])


def test_the_loss_is_over_a_batch_of_the_training_pool():
    family, images = tiny_family("cnn"), stripes()
    net = make_classifier("cnn", (4, 4, 1), NUM_CLASSES, **TINY["cnn"])
    params = family.init(jax.random.key(0))
    params["head"]["b"] = jnp.arange(3.0)
    pool = images.train.reshape(-1, 4, 4, 1)
    logits = np.float64(net.apply(params, pool))
    labels = np.repeat(np.arange(NUM_CLASSES), 8)
    each = np.log(np.exp(logits).sum(1)) - logits[np.arange(24), labels]
    loss = jax.jit(jax.vmap(family.loss, (None, None, 0)))
    data = family.sample(jax.random.key(2))
    losses = loss(params, data, jax.random.split(jax.random.key(1), 400))
    assert abs(losses.mean() - each.mean()) < 4 * each.std() / np.sqrt(400 * 16)
    np.testing.assert_allclose(losses.std(), each.std() / 4, rtol=0.2)  # 16 images of each batch


def test_evaluate_is_over_the_query_pool_alone():
    images, family = stripes(), tiny_family("cnn")
    params, data = family.init(jax.random.key(0)), family.sample(jax.random.key(0))
    np.testing.assert_array_equal(data["query"][0], images.query.reshape(-1, 4, 4, 1))
    np.testing.assert_array_equal(data["query"][1], np.repeat(np.arange(NUM_CLASSES), 4))
    blind = {**data, "train": jax.tree.map(jnp.zeros_like, data["train"])}
    evaluate = jax.jit(family.evaluate)
    chex.assert_trees_all_equal(evaluate(params, data), evaluate(params, blind))


def test_scores_of_a_pool_larger_than_a_chunk_equal_the_definition():
    images = stripes(1, 100)
    net = make_classifier("cnn", (4, 4, 1), NUM_CLASSES, widths=(6,))
    params = net.init(jax.random.key(0))
    logits = np.float64(net.apply(params, images.query.reshape(-1, 4, 4, 1)))
    labels = np.repeat(np.arange(NUM_CLASSES), 100)
    scores = jax.jit(functools.partial(score, net))(params, labelled(images.query))
    assert scores["accuracy"] == np.float32((logits.argmax(1) == labels).mean())
    cross_entropy = np.log(np.exp(logits).sum(1)) - logits[np.arange(300), labels]
    np.testing.assert_allclose(scores["loss"], cross_entropy.mean(), rtol=1e-5)


def test_bad_arguments():
    with pytest.raises(
        ValueError, match="classification_cnn: batch_size must be at least 1, got 0"
    ):
        classification(stripes(), batch_size=0)
    with pytest.raises(ValueError, match=r"split must be one of .*, got 'test'"):
        tiny_family("cnn").sample(jax.random.key(0), "test")
