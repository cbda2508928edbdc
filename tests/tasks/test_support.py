import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.networks.classifiers import make_network
from lohp_jax.tasks.support import canonical_order, check_context, class_means, relabel
from lohp_jax.types import TaskFamily

NUM_CLASSES, SHAPE = 3, (2, 2, 1)
LABELS = np.array([2, 0, 1, 0, 2, 0])
IMAGES = np.random.default_rng(0).uniform(size=(len(LABELS), *SHAPE)).astype(np.float32)
CONTEXT = {"images": IMAGES, "labels": LABELS}


def test_class_means_equal_their_definition():
    expected = [
        np.float64(IMAGES[np.equal(LABELS, c)]).mean(axis=0).ravel() for c in range(NUM_CLASSES)
    ]
    np.testing.assert_allclose(class_means(CONTEXT, NUM_CLASSES), expected, rtol=1e-5)


def test_a_label_without_examples_has_a_mean_of_zero():
    means = class_means(CONTEXT | {"labels": np.minimum(LABELS, 1)}, NUM_CLASSES)
    np.testing.assert_array_equal(means[2], np.zeros(4))
    assert np.isfinite(means).all()


def test_without_class_axes_labels_keep_their_order():
    family = TaskFamily(None, None, None, None, None)
    context, rank = canonical_order(family, CONTEXT)
    assert context is CONTEXT and rank is None


def test_relabel_takes_the_weights_of_label_order_c_to_label_c():
    params = {"head": {"w": np.arange(6.0).reshape(2, 3), "b": np.arange(3.0)}, "body": np.ones(3)}
    class_axes = {"head": {"w": 1, "b": 0}, "body": -1}
    order = np.array([2, 0, 1])
    actual = relabel(params, class_axes, order)
    for c in range(NUM_CLASSES):
        np.testing.assert_array_equal(actual["head"]["w"][:, c], params["head"]["w"][:, order[c]])
        assert actual["head"]["b"][c] == params["head"]["b"][order[c]]
    assert actual["body"] is params["body"]
    assert relabel(params, None, order) is params


@pytest.mark.parametrize("name", ["linear", "mlp", "conv"])
def test_a_relabelled_network_answers_the_relabelled_task(name):
    """What was label `order[c]` is called c: right answers stay right, wrong ones wrong."""
    network = make_network(name, SHAPE, NUM_CLASSES)
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), shapes)
    order = np.array([2, 0, 1])
    renamed = np.argsort(order)[LABELS]

    def correct(params, labels):
        return jnp.argmax(network.apply(params, IMAGES), axis=-1) == labels

    before, after = correct(params, LABELS), relabel(params, network.class_axes, order)
    np.testing.assert_array_equal(correct(after, renamed), before)
    assert not (correct(params, renamed) == before).all()


check = functools.partial(check_context, num_classes=NUM_CLASSES, image_shape=SHAPE)


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_a_good_context_passes(convert):
    context = {name: convert(x) for name, x in CONTEXT.items()} | {"optimizer": 0}
    assert check(context) is None


def with_value(value):
    images = IMAGES.copy()
    images[1, 0, 1] = value
    return images


@pytest.mark.parametrize(
    "context, message",
    [
        (IMAGES, r"expected a context \{'images': ..., 'labels': ...\}, got ndarray"),
        ({"images": IMAGES}, r"expected a context .*, got \['images'\]"),
        (CONTEXT | {"images": IMAGES[0]}, r"of shape \[n, 2, 2, 1\], got \[2, 2, 1\]"),
        (CONTEXT | {"images": IMAGES[:, :1]}, r"of shape \[n, 2, 2, 1\], got \[6, 1, 2, 1\]"),
        (CONTEXT | {"labels": LABELS[:4]}, r"expected 6 integer labels, got int64\[4\]"),
        (CONTEXT | {"labels": LABELS[:, None]}, r"expected 6 integer labels, got int64\[6, 1\]"),
        (CONTEXT | {"labels": np.float32(LABELS)}, r"expected 6 integer labels, got float32\[6\]"),
        (CONTEXT | {"images": np.uint8(IMAGES)}, "expected floating-point .*, got uint8"),
        (
            CONTEXT | {"images": with_value(np.nan)},
            r"images in \[0, 1\], got values from nan to nan",
        ),
        (CONTEXT | {"images": with_value(np.inf)}, r"images in \[0, 1\], .* to inf"),
        (CONTEXT | {"images": with_value(255.0)}, r"images in \[0, 1\], .* to 255.0; .* divide"),
        (CONTEXT | {"images": with_value(-1.0)}, r"images in \[0, 1\], got values from -1.0"),
        (CONTEXT | {"labels": np.minimum(LABELS, 1)}, r"missing \[2\], unknown \[\]"),
        (CONTEXT | {"labels": LABELS + 1}, r"every label 0..2 .* missing \[0\], unknown \[3\]"),
        (CONTEXT | {"labels": LABELS - 1}, r"missing \[2\], unknown \[-1\]"),
    ],
)
def test_a_bad_context_says_what_came(context, message):
    with pytest.raises(ValueError, match=f"generate: .*{message}"):
        check(context)
