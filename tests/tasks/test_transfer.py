import jax
import numpy as np
import pytest

from lohp_jax.data import ImageSet
from lohp_jax.tasks import make_family
from lohp_jax.tasks.backbone import Backbone
from lohp_jax.tasks.door import describe_family
from lohp_jax.tasks.transfer import fit_images, transfer_family

SHAPE = (4, 4, 1)


def image_set(name, num_classes, num_train=6, num_query=4, shape=SHAPE):
    """Every image has one value, of its own."""
    seed = sum(map(ord, name))
    values = np.random.default_rng(seed).uniform(size=(num_classes, num_train + num_query))
    pool = np.broadcast_to(values[..., None, None, None], (*values.shape, *shape))
    pool = pool.astype(np.float32)
    return ImageSet(pool[:, :num_train], pool[:, num_train:], name)


def first_pixels(params, images):
    return params["scale"] * images.reshape(len(images), -1)[:, :3]


BACKBONE = Backbone(first_pixels, {"scale": np.float32(10)}, SHAPE)
SOURCE = image_set("source", 7)
TARGETS = image_set("a", 4), image_set("b", 6, num_train=5, num_query=9)


def make(source=SOURCE, targets=TARGETS, backbone=BACKBONE, **options):
    return transfer_family(source, targets, backbone, **{"way": 3, "shots": 2} | options)


def where_from(values, images):
    """(set, class) of each value, and KeyError for one of no given image."""
    known = {
        np.float32(10 * image[0, 0, 0]).tobytes(): (s.name, c)
        for s in images
        for c in range(len(s.train))
        for image in (*s.train[c], *s.query[c])
    }
    return [known[np.float32(v).tobytes()] for v in np.asarray(values)]


@pytest.mark.parametrize("split, sets", [("train", (SOURCE,)), ("held_out", TARGETS)])
def test_tasks_are_of_classes_of_one_set(split, sets):
    family = make()
    seen = set()
    draw = jax.jit(jax.vmap(lambda key: family.context(family.sample(key, split), key)))
    contexts = jax.device_get(draw(jax.random.split(jax.random.key(0), 200)))
    for x, y in zip(contexts["x"], contexts["y"], strict=True):
        np.testing.assert_array_equal(y, [0, 0, 1, 1, 2, 2])
        classes = where_from(x[:, 0], sets)
        assert len({name for name, _ in classes}) == 1
        assert classes[::2] == classes[1::2] and len(set(classes)) == 3
        seen |= set(classes)
    assert seen == {(s.name, c) for s in sets for c in range(len(s.train))}


def test_targets_are_equally_likely_whatever_their_number_of_tasks():
    family = make()
    draw = jax.jit(jax.vmap(lambda key: family.sample(key, "held_out")["classes"]))
    classes = np.asarray(draw(jax.random.split(jax.random.key(0), 1000)))
    assert abs((classes.max(1) < 7 + 4).mean() - 0.5) < 0.07


def test_the_set_with_the_fewest_images_sets_the_number():
    pools = make().sample.__self__.pools
    assert pools.train.shape == (17, 5, 3) and pools.query.shape == (17, 4, 3)


def test_heads_fit_together():
    described = describe_family(make(network="mlp"))
    assert described.context == {"['x']": "float32[6,3]", "['y']": "int32[6]"}
    assert described.params["['linear']['w']"] == "float32[3,16]"


def test_features_are_kept(tmp_path):
    make(cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 6

    def never(params, images):
        raise AssertionError("computed again")

    make(cache=tmp_path, backbone=Backbone(never, BACKBONE.params, SHAPE))


def test_images_are_fitted_when_asked():
    large = image_set("large", 4, shape=(8, 8, 3))
    with pytest.raises(ValueError, match=r"\(4, 4, 1\).*got \(8, 8, 3\) of 'large'; .*fit=True"):
        make(targets=[large])
    family = make(targets=[large], fit=True)
    pools = family.sample.__self__.pools
    np.testing.assert_allclose(pools.query[7:, :, 0], 10 * large.query[..., 0, 0, 0], rtol=1e-5)


def test_fit_images_resizes_and_brings_channels_to_the_same_number():
    images = np.random.default_rng(0).uniform(size=(2, 3, 6, 6, 3)).astype(np.float32)
    np.testing.assert_array_equal(fit_images(images, (6, 6, 3)), images)
    gray = fit_images(images, (6, 6, 1))
    np.testing.assert_allclose(gray[..., 0], images.mean(-1), rtol=1e-6)
    np.testing.assert_array_equal(fit_images(gray, (6, 6, 3)), np.repeat(gray, 3, -1))
    smaller = fit_images(images, (3, 2, 3))
    assert smaller.shape == (2, 3, 3, 2, 3)
    np.testing.assert_allclose(smaller.mean(), images.mean(), atol=0.02)
    with pytest.raises(ValueError, match="1 or 2 channels, got 3"):
        fit_images(images, (6, 6, 2))


def test_the_family_of_the_table_reads_fits_and_keeps(tmp_path, monkeypatch):
    sets = {"tfds:s": image_set("s", 7, 9, 4, (16, 16, 3)), "digits": image_set("digits", 6)}
    monkeypatch.setattr("lohp_jax.tasks.named.image_set", lambda source, **options: sets[source])
    monkeypatch.setattr("lohp_jax.tasks.named.kept_backbone", kept := Kept())
    options = {"data": "tfds:s", "targets": ("digits",), "way": 3, "shots": 2, "filters": 5}
    make_family("transfer", backbone=str(tmp_path), **options)
    assert kept.asked == (range(7), str(tmp_path), {"filters": 5})
    assert len(list(tmp_path.iterdir())) == 4
    with pytest.raises(ValueError, match="targets other than the source, got 's' for both"):
        make_family("transfer", **options | {"targets": ("tfds:s",)})


class Kept:
    """Stands for `kept_backbone`."""

    def __call__(self, pool, classes, key, directory, **settings):
        self.asked = (classes, directory, settings)
        return Backbone(first_pixels, {"scale": np.float32(10)}, pool.example_shape)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"targets": ()}, "expected one target or more, got none"),
        ({"targets": [SOURCE]}, "targets other than the source, got 'source' for both"),
        ({"way": 4}, "more than way=4 classes, got 4 in 'a'"),
        ({"shots": 6}, "image_family: shots must be between 1 and 5"),
        ({"network": "conv"}, r"make_network: .*got \(3,\); use 'linear'"),
    ],
)
def test_transfer_family_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
