import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.baselines.retrieval import nearest_task, task_distance
from lohp_jax.generation import generate
from lohp_jax.tasks.support import ImageSupport, SetSupport, relabel
from lohp_jax.types import TaskFamily

SHAPE, NUM_TASKS, SHOTS = (2, 2, 1), 4, 2
CLASS_AXES = {"body": -1, "head": {"b": 0, "w": 1}}
KEY = jax.random.key(0)


def family_of(num_classes):
    support, unused = ImageSupport(num_classes, SHAPE), (None,) * 5
    family = TaskFamily(*unused, name="tiny", num_classes=num_classes, class_axes=CLASS_AXES)
    return dataclasses.replace(family, support=support)


def stored(num_classes, seed=0):
    """Contexts and weights of `NUM_TASKS` tasks, leading axis R."""
    rng = np.random.default_rng(seed)
    labels = np.tile(np.repeat(np.arange(num_classes), SHOTS), (NUM_TASKS, 1))
    images = rng.uniform(size=(*labels.shape, *SHAPE)).astype(np.float32)
    sizes = {"body": (2,), "head": {"b": (num_classes,), "w": (2, num_classes)}}
    weights = jax.tree.map(
        lambda size: jnp.float32(rng.normal(size=(NUM_TASKS, *size))),
        sizes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    return {"x": images, "y": labels}, weights


def row(tree, r):
    """Entry `r` of every leaf."""
    return jax.tree.map(lambda leaf: leaf[r], tree)


def oracle(contexts, weights, context, orders):
    """Tries every task under every renaming."""

    def means(x, y):
        by_label = [x[y == c] for c in np.unique(y)]
        return np.stack([np.float64(x).mean(axis=0).ravel() for x in by_label])

    query, best = means(**context), (np.inf,)
    for r in range(NUM_TASKS):
        one = means(contexts["x"][r], contexts["y"][r])
        for order in orders:
            distance = sum(np.sum((query[c] - one[d]) ** 2) for c, d in enumerate(order))
            best = min(best, (distance, r, order))
    _, task, order = best
    return relabel(row(weights, task), CLASS_AXES, np.array(order))


@pytest.mark.parametrize("num_classes", [1, 2, 3, 4])
def test_the_weights_are_those_of_the_nearest_task_under_the_best_renaming(num_classes):
    contexts, weights = stored(num_classes)
    generator = nearest_task(family_of(num_classes), contexts, weights)
    orders = list(itertools.permutations(range(num_classes)))
    for seed in range(1, 5):
        context = row(stored(num_classes, seed)[0], 0)
        expected = oracle(contexts, weights, context, orders)
        actual = generate(generator, context, KEY, num_samples=2)
        for sample in range(2):
            chex.assert_trees_all_equal(row(actual, sample), expected)


def test_a_stored_task_finds_itself_under_any_names():
    contexts, weights = stored(3)
    generator = nearest_task(family_of(3), contexts, weights)
    for task, order in itertools.product(range(NUM_TASKS), itertools.permutations(range(3))):
        context = row(contexts, task)
        renamed = context | {"y": np.argsort(order)[context["y"]]}
        expected = relabel(row(weights, task), CLASS_AXES, np.array(order))
        chex.assert_trees_all_equal(row(generate(generator, renamed, KEY), 0), expected)


def test_many_labels_keep_the_order_given():
    """7! renamings are too many."""
    contexts, weights = stored(7)
    context = row(stored(7, seed=1)[0], 0)
    expected = oracle(contexts, weights, context, [tuple(range(7))])
    actual = generate(nearest_task(family_of(7), contexts, weights), context, KEY)
    chex.assert_trees_all_equal(row(actual, 0), expected)


def test_vmap_over_contexts_equals_a_loop():
    contexts, weights = stored(3)
    generator = nearest_task(family_of(3), contexts, weights)
    several, _ = stored(3, seed=5)
    keys = jax.random.split(KEY, NUM_TASKS)
    together = jax.vmap(lambda c, k: generate(generator, c, k))(several, keys)
    for r in range(NUM_TASKS):
        chex.assert_trees_all_equal(row(together, r), generate(generator, row(several, r), keys[r]))


def test_a_bad_context_is_refused():
    contexts, weights = stored(3)
    context = row(contexts, 0)
    generator = nearest_task(family_of(3), contexts, weights)
    with pytest.raises(ValueError, match=r"missing \[2\]"):
        generate(generator, context | {"y": np.minimum(context["y"], 1)}, KEY)
    with pytest.raises(ValueError, match=r"of shape \[n, 2, 2, 1\], got \[6, 1, 2, 1\]"):
        generate(generator, context | {"x": context["x"][:, :1]}, KEY)


def points(seed=0):
    """Regressions without labels, leading axis R, and weights that tell them apart."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-3, 3, size=(NUM_TASKS, 64, 1)).astype(np.float32)
    slopes = np.float32([-3, 0, 3, 6])
    return {"x": x, "y": slopes[:, None, None] * x}, {"w": slopes}


def read_points(**fields):
    contexts, _ = points()
    support = SetSupport(row(contexts, 0)).measured_on(contexts)
    return TaskFamily(*(None,) * 5, name="lines", support=support, **fields)


def test_of_tasks_without_labels_the_nearest_is_copied_as_it_is():
    """Other inputs of the same functions, in any order, find the weights of their function."""
    contexts, weights = points()
    generator = nearest_task(read_points(), contexts, weights)
    others, _ = points(seed=1)
    for task in range(NUM_TASKS):
        for context in (row(contexts, task), row(others, task)):
            backwards = {name: leaf[::-1] for name, leaf in context.items()}
            found = generate(generator, backwards, KEY)
            np.testing.assert_array_equal(found["w"], weights["w"][task : task + 1])


def test_class_axes_stay_where_a_context_says_nothing_of_the_labels():
    contexts, _ = points()
    _, weights = stored(3)
    family = read_points(num_classes=3, class_axes=CLASS_AXES)
    found = generate(nearest_task(family, contexts, weights), row(contexts, 2), KEY)
    chex.assert_trees_all_equal(row(found, 0), row(weights, 2))


def test_a_bad_regression_is_refused():
    contexts, weights = points()
    generator = nearest_task(read_points(), contexts, weights)
    one = row(contexts, 0)
    with pytest.raises(ValueError, match=r"as many examples in y as in x, .* got 3 and 64"):
        generate(generator, one | {"y": one["y"][:3]}, KEY)


def test_the_distance_of_tasks_is_that_under_the_best_renaming():
    """A stored task under other names is at distance 0, another is as far as its means are."""
    family, (contexts, _) = family_of(3), stored(3)
    renamed = row(contexts, 2)
    renamed = renamed | {"y": np.array([2, 0, 1])[renamed["y"]]}
    moved = row(contexts, 1)
    moved = moved | {"x": moved["x"] + np.float32(0.01)}
    queries = jax.tree.map(lambda *leaves: jnp.stack(leaves), renamed, moved)
    distances = task_distance(family, contexts, queries)
    np.testing.assert_allclose(distances, [0.0, 0.01], atol=1e-6)
