import numpy as np
import pytest
from sklearn.datasets import load_digits

from lohp_jax.data.digits import digits
from lohp_jax.data.images import by_class


def test_digits_are_two_float32_pools_in_the_unit_interval():
    images = digits()
    assert images.train.shape == (10, 100, 8, 8, 1)
    assert images.query.shape == (10, 74, 8, 8, 1)
    assert images.name == "digits"
    for pool in images[:2]:
        assert pool.dtype == np.float32
        assert pool.min() == 0.0
        assert pool.max() == 1.0


def test_every_digit_is_a_source_image_of_its_class_and_used_once():
    source = load_digits()
    unused = [{} for _ in range(10)]  # class -> pixels -> how often they occur
    for image, label in zip(source.images, source.target, strict=True):
        pixels = np.uint8(image).tobytes()
        unused[label][pixels] = unused[label].get(pixels, 0) + 1
    for pool in digits()[:2]:
        for label in range(10):
            for image in pool[label]:
                pixels = np.uint8(16 * np.float64(image[:, :, 0])).tobytes()
                assert unused[label][pixels] > 0
                unused[label][pixels] -= 1


def test_digits_come_out_the_same_each_time():
    first, second = digits(), digits.__wrapped__()  # the second without the cache
    np.testing.assert_array_equal(first.train, second.train)
    np.testing.assert_array_equal(first.query, second.query)


def test_by_class_keeps_the_first_of_each_class_in_order():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([2, 5, 9], [4, 6, 5]))
    images = rng.normal(size=(15, 3, 2, 1))
    actual = by_class(images, labels, num_per_class=4)
    assert actual.shape == (3, 4, 3, 2, 1)
    for row, label in zip(actual, [2, 5, 9], strict=True):
        expected = [image for image, l in zip(images, labels, strict=True) if l == label][:4]
        np.testing.assert_array_equal(row, expected)


def test_by_class_names_the_class_with_too_few_images():
    labels = np.array([0, 0, 0, 7, 7])
    with pytest.raises(ValueError, match="at least 3 images of every class, got 2 of class 7"):
        by_class(np.zeros((5, 1, 1, 1)), labels, num_per_class=3)
