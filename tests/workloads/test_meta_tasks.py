"""Families for meta-training: disjoint splits, and tasks that can be learned and told apart."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax.networks.mlp import apply_mlp
from lohp_jax.runs.meta_training import MetaConfig
from lohp_jax.workloads.meta_tasks import (
    META_FAMILIES,
    meta_family,
    synthetic_family,
)

KEY = jax.random.key(0)
FAMILIES = {
    kind: functools.partial(synthetic_family, kind, kind) for kind in ("prototypes", "teacher")
}
OPTIONS = {"widths": (6,), "activation": jnp.tanh, "num_classes": 3}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param](**OPTIONS)


def test_data_follow_the_seed_and_the_split(family):
    data = family.sample(KEY)
    chex.assert_shape(data["images"], (512, 64))
    chex.assert_shape(data["query_images"], (128, 64))
    assert data["labels"].shape == (512,) and data["query_labels"].shape == (128,)
    assert set(np.asarray(data["labels"]).tolist()) == {0, 1, 2}
    chex.assert_trees_all_equal(data, family.sample(KEY, "train"))
    for other in (family.sample(jax.random.key(1)), family.sample(KEY, "held_out")):
        nearest = np.abs(other["images"][:, None] - data["images"][None]).max(axis=2).min()
        assert nearest > 0.1  # no image of the one is among those of the other
    assert 0.3 < float(data["images"].std()) < 1.5


def test_labels_of_query_and_training_follow_the_same_rule(family):
    """A linear classifier fitted to the training images does better than chance on the others."""
    data = family.sample(KEY)
    targets = jax.nn.one_hot(data["labels"], 3)
    images = jnp.pad(data["images"], ((0, 0), (0, 1)), constant_values=1.0)
    query = jnp.pad(data["query_images"], ((0, 0), (0, 1)), constant_values=1.0)
    weights = np.linalg.lstsq(np.asarray(images), np.asarray(targets), rcond=None)[0]
    assert np.mean(np.argmax(query @ weights, axis=1) == data["query_labels"]) > 0.5


def test_loss_and_evaluation_are_cross_entropies(family):
    data, params = jax.jit(lambda key: (family.sample(key), family.init(key)))(KEY)
    logits = np.asarray(
        jax.jit(apply_mlp, static_argnums=2)(params, data["query_images"], jnp.tanh)
    )
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = -log_p[np.arange(128), data["query_labels"]].mean()
    evaluate, loss = jax.jit(family.evaluate), jax.jit(jax.vmap(family.loss, (None, None, 0)))
    scores = evaluate(params, data)
    np.testing.assert_allclose(scores["loss"], expected, rtol=1e-5)
    hits = np.argmax(logits, axis=1) == data["query_labels"]
    np.testing.assert_allclose(scores["accuracy"], hits.mean())
    blind = {**data, "query_images": data["images"], "query_labels": data["labels"]}
    all_images = float(evaluate(params, blind)["loss"])
    losses = loss(params, data, jax.random.split(KEY, 400))
    assert len(set(losses.tolist())) > 1
    np.testing.assert_allclose(losses.mean(), all_images, rtol=0.02)


def test_training_helps(family):
    data, params = jax.jit(lambda key: (family.sample(key), family.init(key)))(KEY)
    evaluate = jax.jit(family.evaluate)
    before = float(evaluate(params, data)["loss"])

    def step(params, key):
        gradients = jax.grad(family.loss)(params, data, key)
        return optax.tree.add_scale(params, -0.1, gradients), None

    params, _ = jax.jit(lambda p: jax.lax.scan(step, p, jax.random.split(KEY, 100)))(params)
    assert float(evaluate(params, data)["loss"]) < 0.9 * before


@pytest.mark.parametrize("name", META_FAMILIES)
def test_every_family_builds_and_has_both_splits(name):
    family = meta_family(name)

    @jax.jit
    def build(key):
        tasks = [family.sample(key, split) for split in ("train", "held_out")]
        params = family.init(key)
        return tasks, [family.loss(params, data, key) for data in tasks]

    tasks, losses = build(KEY)
    pairs = zip(*map(jax.tree.leaves, tasks), strict=True)
    assert not all(np.array_equal(*pair) for pair in pairs)
    assert np.isfinite(losses).all()


def test_digits_hold_out_classes():
    family = meta_family("digits_mlp")
    keys = jax.random.split(KEY, 200)
    classes = {
        split: np.asarray(jax.vmap(lambda k, s=split: family.sample(k, s)["classes"])(keys))
        for split in ("train", "held_out")
    }
    seen = set(classes["train"].ravel().tolist())
    assert len(seen) == 7
    new = [len(set(row.tolist()) - seen) for row in classes["held_out"]]
    assert set(new) == {3}


def test_meta_training_sees_classifiers_alone():
    """Liquid networks, SIREN and lane keeping are for tests; all here classify small images."""
    assert set(MetaConfig().families) < set(META_FAMILIES)
    for name in META_FAMILIES:
        family = meta_family(name)
        scores = jax.eval_shape(lambda k, f=family: f.evaluate(f.init(k), f.sample(k)), KEY)
        assert family.num_classes > 1 and "objective" not in scores


def test_unknown_names():
    with pytest.raises(ValueError, match=r"got 'digits_cnv'; did you mean 'digits_conv'\?"):
        meta_family("digits_cnv")
    family = FAMILIES["teacher"](**OPTIONS)
    with pytest.raises(ValueError, match=r"must be one of .*'held_out'.*, got 'test'"):
        family.sample(KEY, "test")
