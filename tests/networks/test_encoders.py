import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.networks.encoders import Reading, set_encoder

NUM_CLASSES, SHOTS, WIDTH = 3, 2, 8
LABELS = np.repeat(np.arange(NUM_CLASSES), SHOTS)
IMAGES = np.random.default_rng(0).uniform(size=(len(LABELS), 3, 2, 1)).astype(np.float32)


def read_images(context):
    """Labelled images and nothing else."""
    images, labels = context
    nothing = jnp.zeros((len(labels), 0))
    return Reading(images, nothing, jax.nn.one_hot(labels, NUM_CLASSES), jnp.zeros(0))


ENCODER = set_encoder(read_images, WIDTH)


@pytest.fixture(scope="module")
def encode():
    """`(images, labels) -> [NUM_CLASSES, WIDTH]` with fixed random weights."""
    params = jax.jit(ENCODER.init)(jax.random.key(0), (IMAGES, LABELS))
    return jax.jit(lambda *context: ENCODER.apply(params, context))


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
    params = jax.jit(ENCODER.init)(jax.random.key(0), (IMAGES, labels))

    def total(params, images):
        return jnp.sum(ENCODER.apply(params, (images, labels)) ** 2)

    value, grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(params, IMAGES)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_equal_images_leave_the_gradient_finite():
    """Where all labels look alike their contrast is zero, and normalised all the same."""
    images = np.ones_like(IMAGES)
    params = jax.jit(ENCODER.init)(jax.random.key(0), (images, LABELS))
    grads = jax.jit(jax.grad(lambda p: jnp.sum(ENCODER.apply(p, (images, LABELS)) ** 2)))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


# --- sets without labels, and tasks as a whole

POINTS = np.random.default_rng(2).normal(size=(6, 2)).astype(np.float32)
TASK = np.float32([0.5, -1.0, 2.0])


def whole(points, task):
    """One set of points, beside the numbers of the task."""
    return Reading(None, points, jnp.ones((len(points), 1)), task)


@pytest.fixture(scope="module")
def encode_whole():
    """`(points [n, 2], task [3]) -> [1, WIDTH]` with fixed random weights."""
    encoder = set_encoder(lambda context: whole(*context), WIDTH)
    params = jax.jit(encoder.init)(jax.random.key(1), (POINTS, TASK))
    return jax.jit(lambda *context: encoder.apply(params, context))


def test_without_labels_there_is_one_row_for_the_set(encode_whole):
    row = encode_whole(POINTS, TASK)
    assert row.shape == (1, WIDTH)
    order = np.random.default_rng(1).permutation(len(POINTS))
    np.testing.assert_allclose(encode_whole(POINTS[order], TASK), row, rtol=1e-5, atol=1e-5)
    twice = np.concatenate([POINTS, POINTS])
    np.testing.assert_allclose(encode_whole(twice, TASK), row, rtol=1e-5, atol=1e-5)


def test_a_row_depends_on_every_point_and_every_number_of_the_task(encode_whole):
    row = encode_whole(POINTS, TASK)
    for n in range(len(POINTS)):
        moved = POINTS.copy()
        moved[n] += 1
        assert np.abs(encode_whole(moved, TASK) - row).max() > 1e-3
    for n in range(len(TASK)):
        assert np.abs(encode_whole(POINTS, TASK + np.eye(3)[n]) - row).max() > 1e-3


def test_a_task_without_examples_is_read_by_its_numbers():
    encoder = set_encoder(
        lambda task: Reading(None, jnp.zeros((0, 0)), jnp.zeros((0, 1)), task), WIDTH
    )
    params = jax.jit(encoder.init)(jax.random.key(0), TASK)
    rows = [encoder.apply(params, task) for task in (TASK, -TASK)]
    assert rows[0].shape == (1, WIDTH) and np.isfinite(rows[0]).all()
    assert np.abs(rows[0] - rows[1]).max() > 1e-2


@pytest.mark.parametrize(
    "shape, num_inputs, num_convolutions",
    [
        ((12, 12, 1), 144, 0),
        ((12, 13, 1), 6 * 7 * 16, 1),
        ((12, 12, 3), 432, 0),
        ((28, 28, 1), 7 * 7 * 32, 2),
        ((32, 32, 3), 8 * 8 * 32, 2),
    ],
)
def test_images_of_more_than_144_pixels_pass_a_stem(shape, num_inputs, num_convolutions):
    images = jax.ShapeDtypeStruct((len(LABELS), *shape), jnp.float32)
    params = jax.eval_shape(ENCODER.init, jax.random.key(0), (images, LABELS))
    assert params["set/~_describe_set/example/~/linear_0"]["w"].shape == (num_inputs, 2 * WIDTH)
    assert sum("stem" in name for name in params) == num_convolutions


def test_every_pixel_counts_behind_the_stem():
    images = np.random.default_rng(0).uniform(size=(len(LABELS), 14, 14, 1)).astype(np.float32)
    params = jax.jit(ENCODER.init)(jax.random.key(0), (images, LABELS))
    grads = jax.jit(jax.grad(lambda x: jnp.sum(ENCODER.apply(params, (x, LABELS)) ** 2)))(images)
    assert np.isfinite(grads).all() and (np.abs(grads) > 0).all()
