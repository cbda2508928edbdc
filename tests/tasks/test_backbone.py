import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.tasks.backbone import Backbone, kept_backbone, train_backbone
from lohp_jax.tasks.pools import DealtPool

SIDE, EACH = 16, 8


def patterns(num_classes=8):
    """A pattern for each class, in half of its images inverted, under noise."""
    rng = np.random.default_rng(0)
    pattern = rng.integers(0, 2, (num_classes, 1, SIDE // 4, SIDE // 4, 1))
    pattern = pattern.repeat(4, 2).repeat(4, 3)
    inverted = rng.integers(0, 2, (num_classes, EACH, 1, 1, 1))
    noise = rng.uniform(size=(num_classes, EACH, SIDE, SIDE, 1))
    return (255 * (0.7 * np.abs(pattern - inverted) + 0.3 * noise)).astype(np.uint8)


POOL = DealtPool(patterns(), 3)
SETTINGS = {"filters": 8, "num_steps": 60, "way": 4, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def trained():
    return train_backbone(POOL, range(6), jax.random.key(0), **SETTINGS)


def prototype_accuracy(backbone, classes):
    """How many examples are nearest to the mean feature of their class, over the last of each."""
    features = backbone.features(POOL.examples[classes])
    means = features[:, :4].mean(axis=1)
    distance = ((features[:, 4:, None] - means) ** 2).sum(-1)
    return np.mean(distance.argmin(-1) == np.arange(len(classes))[:, None])


def test_training_tells_classes_apart_that_it_saw(trained):
    untrained = train_backbone(
        POOL, range(6), jax.random.key(0), **{**SETTINGS, "num_steps": 1, "learning_rate": 1e-9}
    )
    before, after = (prototype_accuracy(b, range(6)) for b in (untrained, trained))
    assert after > 0.9 and after > before + 0.2


def test_training_is_a_function_of_its_key_and_looks_at_no_other_class():
    changed = POOL.examples.copy()
    changed[6:] = 0
    few = {"filters": 2, "num_steps": 2, "way": 3}
    first, again = (
        train_backbone(DealtPool(pixels, 3), range(6), jax.random.key(0), **few).params
        for pixels in (POOL.examples, changed)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_features_have_the_leading_axes_of_the_images(trained):
    features = trained.features(POOL.examples[:2, :3])
    assert features.shape == (2, 3, 8)
    alone = trained.apply(trained.params, POOL.examples[1, 2][None] / jnp.float32(255))
    np.testing.assert_allclose(features[1, 2], alone[0], rtol=1e-4, atol=1e-4)


def test_images_of_another_shape_are_refused(trained):
    with pytest.raises(ValueError, match=r"shape \(16, 16, 1\).*got \(8, 8, 1\); .*image_size=16"):
        trained.features(np.zeros((2, 8, 8, 1), np.float32))


def kept(directory, key=0, **settings):
    few = {"filters": 2, "num_steps": 1, "way": 3} | settings
    return kept_backbone(POOL, range(6), jax.random.key(key), directory, **few)


def test_a_backbone_is_kept_and_read(tmp_path, monkeypatch):
    first = kept(tmp_path / "new")
    monkeypatch.setattr("lohp_jax.tasks.backbone.train_backbone", None)
    again = kept(tmp_path / "new")
    assert isinstance(again, Backbone) and again.image_shape == first.image_shape
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    images = POOL.examples[:1]
    np.testing.assert_array_equal(first.features(images), again.features(images))


@pytest.mark.parametrize("changed, name", [({"key": 1}, "key"), ({"filters": 3}, "filters")])
def test_a_backbone_that_was_made_otherwise_is_refused(tmp_path, changed, name):
    kept(tmp_path)
    with pytest.raises(ValueError, match=f"other arguments: {name} is .*`rm -r {tmp_path}`"):
        kept(tmp_path, **changed)


@pytest.mark.parametrize("damage", ["cut", "text", "lacks"])
def test_a_damaged_backbone_is_refused(tmp_path, damage):
    kept(tmp_path)
    (file,) = tmp_path.iterdir()
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "text":
        file.write_text("weights")
    else:
        with np.load(file) as there:
            arrays = {name: there[name] for name in there.files}
        arrays.pop(next(name for name in arrays if "conv" in name))
        np.savez(file, **arrays)
    with pytest.raises(ValueError, match=r"backbone\.npz is damaged"):
        kept(tmp_path)


@pytest.mark.parametrize(
    "classes, settings, message",
    [
        ([3], {}, "got way=1, shots=1"),
        ([3, 4], {"shots": 6}, "1 to 5 shots.*beside its 3 query ones; got way=2, shots=6"),
        ([3, 4], {"filters": 0}, "make_conv4: filters must be at least 1"),
        ([3, 4], {"num_steps": 0}, "updates must be at least 1, got 0"),
    ],
)
def test_train_backbone_rejects(classes, settings, message):
    with pytest.raises(ValueError, match=message):
        train_backbone(POOL, classes, jax.random.key(0), **settings)
