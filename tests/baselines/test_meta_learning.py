import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.neighbors import NearestCentroid

from lohp_jax.baselines.heads import linear_head
from lohp_jax.baselines.meta_learning import (
    descend,
    descent_from,
    prototypes,
    train_maml,
    train_prototypes,
    train_reptile,
)
from lohp_jax.evaluation import scores
from lohp_jax.generation import generate
from lohp_jax.tasks import make_family
from lohp_jax.tasks.support import relabel
from lohp_jax.types import TaskFamily

TARGET = jnp.array([1.0, -2.0])


def bowl(params, target):
    """Half the squared distance: descent at rate r leaves (1 - r)^k of the way."""
    return jnp.sum((params - target) ** 2) / 2


def bowls(sample):
    return TaskFamily(
        sample=sample,
        init=lambda key: jnp.array([4.0, 4.0]),
        loss=lambda params, data, key: bowl(params, data),
        evaluate=lambda params, data: dict.fromkeys(("objective", "loss"), bowl(params, data)),
        context=lambda data, key: data,
        context_loss=bowl,
    )


ONE = bowls(lambda key, split="train": TARGET)


@pytest.mark.parametrize("first_order", [False, True])
def test_the_gradient_through_descent(first_order):
    """Of the loss after k steps: (1 - r)^2k (p - t), or, of the first order, (1 - r)^k (p - t)."""
    start, rate, num_steps = jnp.array([4.0, 4.0]), 0.1, 3

    def after(params):
        adapt = functools.partial(descend, ONE, rate=rate, num_steps=num_steps)
        return bowl(adapt(params, TARGET, first_order=first_order), TARGET)

    shrunk = (1 - rate) ** num_steps
    np.testing.assert_allclose(
        descend(ONE, start, TARGET, rate=rate, num_steps=num_steps),
        TARGET + shrunk * (start - TARGET),
        rtol=1e-6,
    )
    expected = shrunk * (1 if first_order else shrunk) * (start - TARGET)
    np.testing.assert_allclose(jax.grad(after)(start), expected, rtol=1e-5)


def test_reptile_goes_towards_the_ends():
    """All the way to where two steps lead, then half of the way."""
    start = jax.jit(
        lambda key: train_reptile(ONE, key, updates=2, inner_rate=0.5, inner_steps=2, num_tasks=3)
    )(jax.random.key(0))
    away = ONE.init(None) - TARGET
    first = 0.25 * away
    second = first + 0.5 * (0.25 * first - first)
    np.testing.assert_allclose(start, TARGET + second, rtol=1e-6)


def test_maml_finds_the_start_between_two_tasks():
    """From the middle one step leads nearest to both; the loss at hand is `query_loss`."""
    two = bowls(lambda key, split="train": jnp.where(jax.random.bernoulli(key), 1.0, -1.0) * TARGET)
    settings = {"updates": 400, "inner_rate": 0.5, "outer_rate": 0.1, "num_tasks": 16}
    train = functools.partial(train_maml, two, **settings)
    np.testing.assert_allclose(jax.jit(train)(jax.random.key(0)), 0.0, atol=0.1)
    start = jax.jit(functools.partial(train, first_order=True))(jax.random.key(0))
    np.testing.assert_allclose(start, 0.0, atol=0.1)

    def off(params, data, key):
        return bowl(params, data + 5.0)

    start = jax.jit(functools.partial(train, query_loss=off))(jax.random.key(0))
    np.testing.assert_allclose(start, 10.0, atol=0.3)  # half of the way is left after the step


def test_the_generator_descends_and_counts():
    generator = descent_from(ONE, jnp.array([4.0, 4.0]), rate=0.1, num_steps=3)
    made = generate(generator, TARGET, jax.random.key(0))
    expected = descend(ONE, jnp.array([4.0, 4.0]), TARGET, rate=0.1, num_steps=3)
    np.testing.assert_allclose(made[0], expected, rtol=1e-6)
    assert generator.gradients == 3


@pytest.fixture(scope="module")
def digits():
    return make_family("digits_5way", network="mlp", shots=5)


@pytest.fixture(scope="module")
def tasks(digits):
    return scores.draw_tasks(digits, jax.random.key(5), 64, "held_out")


def accuracy(family, generator, tasks):
    made = scores.make_producer(scores.from_generator(generator)).many(tasks.contexts, tasks.keys)
    return scores.scores(family, made, tasks.data).mean()


def test_a_learned_start_is_better_than_a_random_one(digits, tasks):
    """After as many gradients; labels under other names give the same weights under these names."""
    train = functools.partial(train_maml, digits, updates=150, inner_rate=0.1, outer_rate=3e-3)
    start = jax.jit(train)(jax.random.key(0))
    learned, random = (
        descent_from(digits, params, rate=0.1, num_steps=1)
        for params in (start, digits.init(jax.random.key(0)))
    )
    assert accuracy(digits, learned, tasks) > accuracy(digits, random, tasks) + 0.2
    context = jax.tree.map(lambda leaf: leaf[0], tasks.contexts)
    order = jnp.array([3, 0, 4, 1, 2])
    made, renamed = (
        jax.tree.map(lambda leaf: leaf[0], generate(learned, c, jax.random.key(0)))
        for c in (context, context | {"y": order[context["y"]]})
    )
    chex.assert_trees_all_close(
        relabel(renamed, digits.class_axes, order), made, rtol=1e-4, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore:.*within_class_std_dev_")
def test_prototypes_of_pixels_are_the_nearest_class_means(digits):
    family = make_family("digits_5way", shots=5)  # a linear network
    head = linear_head(family)
    params = train_prototypes(family, head, jax.random.key(0), updates=10)
    generator = prototypes(family, head, params)
    task = jax.tree.map(
        lambda leaf: leaf[0], scores.draw_tasks(family, jax.random.key(1), 1, "held_out")
    )
    made = jax.tree.map(lambda leaf: leaf[0], generate(generator, task.contexts, jax.random.key(0)))
    query = family.context(task.data, jax.random.key(9))
    x, new = (np.asarray(c["x"]).reshape(len(c["x"]), -1) for c in (task.contexts, query))
    oracle = NearestCentroid().fit(x, np.asarray(task.contexts["y"])).predict(new)
    logits = new @ np.asarray(made["head"]["w"]) + np.asarray(made["head"]["b"])
    np.testing.assert_array_equal(logits.argmax(axis=1), oracle)
    assert generator.gradients == 0 and generator.forward_passes == 1


def test_a_learned_embedding_is_better_than_a_random_one(digits, tasks):
    head = linear_head(digits)
    train = functools.partial(train_prototypes, digits, head, updates=150, outer_rate=3e-3)
    params = jax.jit(train)(jax.random.key(0))
    learned, random = (
        prototypes(digits, head, p) for p in (params, digits.init(jax.random.key(0)))
    )
    assert accuracy(digits, learned, tasks) > accuracy(digits, random, tasks) + 0.03


def test_training_sees_training_tasks_alone(digits):
    seen = []

    def sample(key, split="train"):
        seen.append(split)
        return digits.sample(key, split)

    family = dataclasses.replace(digits, sample=sample)
    settings = {"updates": 1, "inner_rate": 0.1, "num_tasks": 2}
    for train in (train_maml, train_reptile):
        jax.eval_shape(functools.partial(train, family, **settings), jax.random.key(0))
    assert set(seen) == {"train"}
