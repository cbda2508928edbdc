import jax
import numpy as np
import pytest

from lohp_jax.baselines import ridge as ridge_module
from lohp_jax.baselines.ridge import ridge
from lohp_jax.codec import make_codec
from lohp_jax.generation import generate
from lohp_jax.tasks.support import ImageSupport, SetSupport, relabel
from lohp_jax.types import TaskFamily

NUM_CLASSES, SHAPE, NUM_TASKS = 2, (2, 1, 1), 30
SUPPORT = ImageSupport(NUM_CLASSES, SHAPE)
FAMILY = TaskFamily(*(None,) * 5, name="tiny", num_classes=NUM_CLASSES, support=SUPPORT)
CODEC = make_codec({"w": np.zeros((2, 2), np.float32), "b": np.zeros(2, np.float32)}, channels=4)
KEY = jax.random.key(0)


def contexts(seed=0, num_tasks=NUM_TASKS):
    rng = np.random.default_rng(seed)
    labels = np.tile([0, 1, 1], (num_tasks, 1))
    return {
        "x": rng.uniform(size=(*labels.shape, *SHAPE)).astype(np.float32),
        "y": labels,
    }


def features(contexts, support=SUPPORT):
    """`[R, labels * pixels]`, or as many as there are, in float64."""
    means = jax.vmap(lambda c: support.describe(c).reshape(-1))(contexts)
    return np.asarray(means, np.float64)


def tokens_of(flat):
    return np.float32(flat).reshape(-1, *CODEC.mask.shape)


def predictions(generator, contexts):
    """`[R, length, channels]` tokens of what the generator returns."""

    def one(context):
        return CODEC.encode(jax.tree.map(lambda leaf: leaf[0], generate(generator, context, KEY)))

    return jax.vmap(one)(contexts)


def linear_targets(x, noise=0.0):
    rng = np.random.default_rng(1)
    size = CODEC.mask.size
    targets = x @ rng.normal(size=(x.shape[1], size)) + rng.normal(size=size)
    return np.where(CODEC.mask.ravel(), targets + noise * rng.normal(size=targets.shape), 0)


def solution(x, y, alpha):
    """Normal equations of a penalised slope and a free offset."""
    centred = x - x.mean(axis=0)
    slope = np.linalg.solve(
        centred.T @ centred + alpha * np.eye(x.shape[1]), centred.T @ (y - y.mean(axis=0))
    )
    return lambda new: (new - x.mean(axis=0)) @ slope + y.mean(axis=0)


def test_the_weights_solve_the_normal_equations_of_the_best_alpha():
    x = features(contexts())
    y = linear_targets(x, noise=1.0)
    left_out = {}
    for alpha in np.logspace(-3, 4, 15):
        rest = [np.delete(np.arange(NUM_TASKS), r) for r in range(NUM_TASKS)]
        errors = [y[r] - solution(x[i], y[i], alpha)(x[r]) for r, i in enumerate(rest)]
        left_out[alpha] = np.mean(np.square(errors))
    best = min(left_out, key=left_out.get)
    assert min(left_out) < best < max(left_out)
    new = contexts(seed=2)
    actual = predictions(ridge(FAMILY, CODEC, contexts(), tokens_of(y)), new)
    expected = tokens_of(solution(x, y, best)(features(new)))
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)


def test_a_linear_relation_is_recovered(monkeypatch):
    monkeypatch.setattr(ridge_module, "_ALPHAS", np.array([1e-6]))
    x = features(contexts())
    generator = ridge(FAMILY, CODEC, contexts(), tokens_of(linear_targets(x)))
    new = contexts(seed=2)
    expected = tokens_of(linear_targets(features(new)))
    np.testing.assert_allclose(predictions(generator, new), expected, rtol=1e-3, atol=1e-3)


def test_samples_agree_and_have_the_structure_of_the_weights():
    generator = ridge(FAMILY, CODEC, contexts(), tokens_of(linear_targets(features(contexts()))))
    one = jax.tree.map(lambda leaf: leaf[0], contexts())
    weights = generate(generator, one, KEY, num_samples=3, temperature=1.0)
    assert jax.tree.map(np.shape, weights) == {"w": (3, 2, 2), "b": (3, 2)}
    for leaf in jax.tree.leaves(weights):
        np.testing.assert_array_equal(leaf, np.stack([leaf[0]] * 3))


def test_a_bad_context_is_refused():
    generator = ridge(FAMILY, CODEC, contexts(), tokens_of(linear_targets(features(contexts()))))
    one = jax.tree.map(lambda leaf: leaf[0], contexts())
    with pytest.raises(ValueError, match=r"missing \[0\]"):
        generate(generator, one | {"y": np.ones(3, int)}, KEY)
    with pytest.raises(ValueError, match="finite numbers in x, got 6 NaN"):
        generate(generator, one | {"x": one["x"] * np.nan}, KEY)


def test_of_tasks_without_labels_the_description_is_regressed_on(monkeypatch):
    monkeypatch.setattr(ridge_module, "_ALPHAS", np.array([1e-6]))
    rng = np.random.default_rng(3)
    x = rng.uniform(-2, 2, size=(200, 5, 1)).astype(np.float32)
    points = {"x": x, "y": np.sin(x + rng.uniform(0, 3, size=(200, 1, 1))).astype(np.float32)}
    support = SetSupport(jax.tree.map(lambda leaf: leaf[0], points)).measured_on(points)
    family = TaskFamily(*(None,) * 5, name="sines", support=support)
    targets = linear_targets(features(points, support))
    train, new = (
        jax.tree.map(lambda leaf, s=s: leaf[s], points) for s in (slice(160), slice(160, 200))
    )
    generator = ridge(family, CODEC, train, tokens_of(targets[:160]))
    expected = tokens_of(targets[160:])
    np.testing.assert_allclose(predictions(generator, new), expected, rtol=1e-2, atol=1e-2)


def test_permuting_the_labels_permutes_the_class_axes():
    axes = {"w": 1, "b": 0}
    named = TaskFamily(*(None,) * 5, num_classes=NUM_CLASSES, class_axes=axes, support=SUPPORT)
    x = features(contexts())
    generator = ridge(named, CODEC, contexts(), tokens_of(linear_targets(x)))
    one = jax.tree.map(lambda leaf: leaf[0], contexts())
    before = jax.tree.map(lambda leaf: leaf[0], generate(generator, one, KEY))
    swapped = generate(generator, one | {"y": 1 - one["y"]}, KEY)
    after = relabel(jax.tree.map(lambda leaf: leaf[0], swapped), axes, np.array([1, 0]))
    for name in axes:
        np.testing.assert_allclose(after[name], before[name], rtol=1e-5)
        assert np.abs(after[name] - swapped[name][0]).max() > 1e-2
