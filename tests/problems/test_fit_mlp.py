import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.data import digits
from lohp_jax.data.images import ImageSet
from lohp_jax.problems.fit_mlp import fit_mlp

FAMILY = fit_mlp(num_examples=50, hidden=4)
SIZE = 4 * 64 + 4 + 10 * 4 + 10


def loss_oracle(x, images, labels, penalty):
    """Layer by layer, biases before weights, in float64."""
    x = np.float64(x)
    b1, w1, b2, w2 = np.split(x, np.cumsum([4, 256, 10]))
    hidden = 1 / (1 + np.exp(-(images @ w1.reshape(64, 4) + b1)))
    logits = hidden @ w2.reshape(4, 10) + b2
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return -np.log(shares[np.arange(len(labels)), labels]).mean() + 0.5 * penalty * x @ x


@pytest.fixture(scope="module")
def problem():
    return FAMILY.sample(jax.random.key(0))


def test_the_objective_is_its_definition(problem):
    x = jax.random.normal(jax.random.key(1), (SIZE,))
    images, labels = np.float64(problem["images"]), np.asarray(problem["labels"])
    expected = loss_oracle(x, images, labels, 1e-3)
    np.testing.assert_allclose(FAMILY.objective(x, problem), expected, rtol=1e-5)


def test_the_published_network():
    assert fit_mlp().start(None).shape == (64 * 20 + 20 + 20 * 10 + 10,)


def test_starts_are_after_glorot():
    x = np.asarray(fit_mlp().init(jax.random.key(0)))
    first, second = np.split(x, [20 + 64 * 20])
    limits = np.sqrt(6 / 84), np.sqrt(6 / 30)
    for layer, width, limit in ((first, 20, limits[0]), (second, 10, limits[1])):
        np.testing.assert_array_equal(layer[:width], 0)
        assert 0.95 * limit < np.abs(layer[width:]).max() <= limit
        np.testing.assert_allclose(layer[width:].std(), limit / np.sqrt(3), rtol=0.1)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_problems_are_images_of_their_pool_with_classes_renamed(split):
    problem = jax.device_get(FAMILY.sample(jax.random.key(2), split))
    pool = digits().train if split == "train" else digits().query
    where = {image.tobytes(): c for c, images in enumerate(pool) for image in images}
    classes = np.array([where[image.tobytes()] for image in problem["images"]])
    names = {(c, label) for c, label in zip(classes, problem["labels"], strict=True)}
    assert len(names) == len({c for c, _ in names}) == len({label for _, label in names})
    assert any(c != label for c, label in names)
    assert len({image.tobytes() for image in problem["images"]}) > 45  # drawn without replacement
    FAMILY.check(problem)


@pytest.mark.slow
def test_labels_are_found_near_the_start(problem):
    x = jax.jit(FAMILY.solve)(problem, jax.random.key(0))
    x0 = FAMILY.start(problem)
    slope = jax.grad(FAMILY.objective)(x, problem)
    assert FAMILY.objective(x, problem) < 0.2 * FAMILY.objective(x0, problem)
    assert np.linalg.norm(slope) < 0.05 * np.linalg.norm(jax.grad(FAMILY.objective)(x0, problem))
    centre, scale = FAMILY.frame(problem)
    assert 0.5 < np.sqrt(np.mean(((x - centre) / scale) ** 2)) < 4


def test_features_are_mean_images(problem):
    features = np.asarray(FAMILY.features(problem)).reshape(10, 64)
    images, labels = np.asarray(problem["images"]), np.asarray(problem["labels"])
    pool = digits().train
    expected = (images[labels == 3].mean(0) - pool.mean()) / pool.std()
    np.testing.assert_allclose(features[3], expected, atol=1e-5)
    assert 0.5 < features.std() < 1.5


def test_another_image_set():
    rng = np.random.default_rng(0)
    pools = (rng.random((3, 5, 2, 2, 1), np.float32) for _ in range(2))
    family = fit_mlp(ImageSet(*pools, "random"), hidden=2, num_examples=4)
    problem = family.sample(jax.random.key(0))
    assert problem["images"].shape == (4, 4)
    assert family.start(problem).shape == (4 * 2 + 2 + 2 * 3 + 3,)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"images": np.ones((2, 63))},
            r"images of shape \[N, 64\], N >= 1, got \[2, 63\]; flatten",
        ),
        ({"images": np.full((2, 64), np.nan)}, "finite numbers in images, got 128 NaN"),
        ({"labels": np.ones(3, int)}, r"labels of shape \[2\], got \[3\]"),
        ({"labels": np.array([0, 10])}, "integer labels from 0 to 9, got int64 from 0 to 10"),
        ({"labels": np.array([0.0, 1.0])}, "integer labels from 0 to 9, got float64"),
    ],
)
def test_check_refuses(change, message):
    good = {"images": np.ones((2, 64)), "labels": np.array([0, 9])}
    FAMILY.check(good)
    with pytest.raises(ValueError, match=f"fit_mlp: expected {message}"):
        FAMILY.check(good | change)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"num_examples": 741}, "at most 740 examples, the images of the smaller pool, got 741"),
        ({"penalty": -1.0}, "penalty must be finite and not negative, got -1.0"),
    ],
)
def test_fit_mlp_rejects(options, message):
    with pytest.raises(ValueError, match=f"fit_mlp: .*{message}"):
        fit_mlp(**options)


def test_the_start_is_drawn_with_the_seed():
    assert not jnp.allclose(fit_mlp(seed=1).start(None), fit_mlp().start(None))
