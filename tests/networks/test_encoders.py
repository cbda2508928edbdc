import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.networks.encoders import SetEncoder

NUM_CLASSES, SHOTS, WIDTH = 3, 2, 8
LABELS = np.repeat(np.arange(NUM_CLASSES), SHOTS)
IMAGES = np.random.default_rng(0).uniform(size=(len(LABELS), 3, 2, 1)).astype(np.float32)
ENCODER = hk.without_apply_rng(
    hk.transform(lambda images, labels: SetEncoder(WIDTH, NUM_CLASSES)(images, labels))
)


@pytest.fixture(scope="module")
def encode():
    """`(images, labels) -> [NUM_CLASSES, WIDTH]` with fixed random weights."""
    params = jax.jit(ENCODER.init)(jax.random.key(0), IMAGES, LABELS)
    return jax.jit(lambda images, labels: ENCODER.apply(params, images, labels))


def test_labels_with_other_examples_have_other_embeddings(encode):
    rows = encode(IMAGES, LABELS)
    assert rows.shape == (NUM_CLASSES, WIDTH) and rows.dtype == jnp.float32
    for c in range(NUM_CLASSES):
        assert np.abs(rows[c] - rows[c - 1]).max() > 1e-2


def test_permuting_the_labels_permutes_the_rows(encode):
    order = np.array([2, 0, 1])  # label c is called order[c]
    np.testing.assert_allclose(
        encode(IMAGES, order[LABELS])[order], encode(IMAGES, LABELS), rtol=1e-5, atol=1e-6
    )


def test_the_order_of_the_examples_does_not_matter(encode):
    order = np.random.default_rng(1).permutation(len(LABELS))
    np.testing.assert_allclose(
        encode(IMAGES[order], LABELS[order]), encode(IMAGES, LABELS), rtol=1e-5, atol=1e-5
    )


def test_seeing_the_examples_of_a_label_twice_changes_nothing(encode):
    twice = np.append(np.arange(len(LABELS)), np.flatnonzero(LABELS == 0))
    np.testing.assert_allclose(
        encode(IMAGES[twice], LABELS[twice]), encode(IMAGES, LABELS), rtol=1e-5, atol=1e-5
    )


def test_every_row_depends_on_the_examples_of_every_label(encode):
    changed = IMAGES.copy()
    changed[0] = 1 - changed[0]
    difference = np.abs(encode(changed, LABELS) - encode(IMAGES, LABELS)).max(axis=1)
    assert (difference > 1e-3).all()


@pytest.mark.parametrize("labels", [np.zeros_like(LABELS), np.minimum(LABELS, 1)])
def test_a_label_without_examples_leaves_everything_finite(labels):
    params = jax.jit(ENCODER.init)(jax.random.key(0), IMAGES, labels)

    def total(params, images):
        return jnp.sum(ENCODER.apply(params, images, labels) ** 2)

    value, grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(params, IMAGES)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_equal_images_leave_the_gradient_finite():
    """Where all labels look alike their contrast is zero, and normalised all the same."""
    images = np.ones_like(IMAGES)
    params = jax.jit(ENCODER.init)(jax.random.key(0), images, LABELS)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(ENCODER.apply(p, images, LABELS) ** 2)))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
