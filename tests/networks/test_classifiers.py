import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from lohp_jax.networks import classifiers as networks
from lohp_jax.networks.classifiers import (
    NETWORKS,
    make_classifier,
    make_conv4,
    make_conv4_body,
    make_network,
)

SHAPE, NUM_CLASSES = (5, 6, 2), 3
SHAPES = dict.fromkeys(NETWORKS, SHAPE) | {"conv4": (16, 18, 1)}


def network_and_weights(name):
    """A network with random weights, zeros replaced, and images; all from fixed seeds."""
    network = make_network(name, SHAPES[name], NUM_CLASSES)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
        jax.eval_shape(network.init, jax.random.key(0)),
    )
    return network, params, rng.normal(size=(4, *SHAPES[name])).astype(np.float32)


def linear_oracle(params, images):
    return images.reshape(len(images), -1) @ params["head"]["w"] + params["head"]["b"]


def mlp_oracle(params, images):
    hidden = images.reshape(len(images), -1) @ params["linear"]["w"] + params["linear"]["b"]
    return np.maximum(hidden, 0) @ params["head"]["w"] + params["head"]["b"]


def conv_oracle(params, images):
    for layer in (params["conv2_d"], params["conv2_d_1"]):
        images = np.stack([_max_pool(_convolve(image, **layer)) for image in images])
    return linear_oracle(params, images)


def _convolve(image, w, b):
    out = np.zeros((*image.shape[:2], w.shape[3])) + b
    for i, o in np.ndindex(w.shape[2:]):
        out[..., o] += scipy.signal.correlate2d(image[..., i], w[..., i, o], mode="same")
    return np.maximum(out, 0)


def _max_pool(image):
    rows, columns = (range(0, side, 2) for side in image.shape[:2])
    return np.array([[image[r : r + 2, c : c + 2].max((0, 1)) for c in columns] for r in rows])


@pytest.mark.parametrize(
    "name, oracle", [("linear", linear_oracle), ("mlp", mlp_oracle), ("conv", conv_oracle)]
)
def test_logits_equal_the_definition(name, oracle):
    network, params, images = network_and_weights(name)
    expected = oracle(jax.tree.map(np.float64, params), np.float64(images))
    logits = jax.jit(network.apply)(params, images)
    assert logits.shape == (4, NUM_CLASSES)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_permuting_the_class_axes_permutes_the_logits(name):
    network, params, images = network_and_weights(name)
    order = np.array([2, 0, 1])
    permuted = jax.tree.map(
        lambda leaf, axis: leaf if axis < 0 else np.take(leaf, order, axis),
        params,
        network.class_axes,
    )
    np.testing.assert_allclose(
        network.apply(permuted, images), network.apply(params, images)[:, order], rtol=1e-5
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_vmap_over_weights_equals_a_loop(name):
    network, params, images = network_and_weights(name)
    several = jax.tree.map(lambda leaf: np.stack([leaf, 2 * leaf, -leaf]), params)
    logits = jax.jit(jax.vmap(network.apply, (0, None)))(several, images)
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], several)
        np.testing.assert_allclose(logits[i], network.apply(one, images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_class_axes_are_those_of_the_head(name):
    class_axes = make_network(name, SHAPES[name], NUM_CLASSES).class_axes
    assert class_axes["head"] == {"w": 1, "b": 0}
    assert all(axis == -1 for axis in jax.tree.leaves({**class_axes, "head": {}}))


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_init_depends_on_the_key_except_for_a_linear_head(name):
    network = make_network(name, SHAPE, NUM_CLASSES)
    first, again, other = (jax.jit(network.init)(jax.random.key(seed)) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    same = all(jax.tree.leaves(jax.tree.map(jnp.array_equal, first, other)))
    assert same == (name == "linear")
    if name == "linear":
        assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(first))


def test_the_mlp_on_digits_has_1074_weights():
    network = make_network("mlp", (8, 8, 1), 2)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 1074


def test_make_network_names_the_nearest():
    with pytest.raises(ValueError, match=r"make_network: .*got 'cnov'; did you mean 'conv'"):
        make_network("cnov", SHAPE, NUM_CLASSES)


def conv4_oracle(params, images):
    for suffix in ("", "_1", "_2", "_3"):
        norm = params[f"layer_norm{suffix}"]
        images = np.stack([_block(i, params[f"conv{suffix}"], **norm) for i in images])
    return linear_oracle(params, images)


def _block(image, conv, scale, offset):
    """Convolution, normalisation of the whole image, rectifier; pooling drops an odd row or column."""
    w, b = conv["w"], conv["b"]
    out = np.zeros((*image.shape[:2], w.shape[3])) + b
    for i, o in np.ndindex(w.shape[2:]):
        out[..., o] += scipy.signal.correlate2d(image[..., i], w[..., i, o], mode="same")
    out = np.maximum((out - out.mean()) / np.sqrt(out.var() + 1e-5) * scale + offset, 0)
    height, width = (side // 2 * 2 for side in out.shape[:2])
    return _max_pool(out[:height, :width])


def test_conv4_equals_its_definition_and_its_body_has_the_same_weights():
    shape, filters = SHAPES["conv4"], 3
    network = make_conv4(shape, NUM_CLASSES, filters=filters)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
        jax.eval_shape(network.init, jax.random.key(0)),
    )
    images = rng.normal(size=(3, *shape)).astype(np.float32)
    expected = conv4_oracle(jax.tree.map(np.float64, params), np.float64(images))
    logits = jax.jit(network.apply)(params, images)
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)
    head = params.pop("head")
    features = make_conv4_body(shape, filters=filters).apply(params, images)
    assert features.shape == (3, filters)
    np.testing.assert_allclose(features @ head["w"] + head["b"][None], logits, rtol=1e-4, atol=1e-4)


def test_conv4_classifies_an_image_alone_as_in_any_company():
    network, params, images = network_and_weights("conv4")
    together = network.apply(params, images)
    alone = jnp.concatenate([network.apply(params, image[None]) for image in images])
    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-3)


def test_conv4_has_64_filters_as_in_the_papers():
    shapes = jax.eval_shape(make_network("conv4", (28, 28, 1), 5).init, jax.random.key(0))
    convolutions = 64 * (9 * 1 + 1) + 3 * 64 * (9 * 64 + 1)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == convolutions + 8 * 64 + 65 * 5


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: make_network("conv4", (8, 8, 1), 5), r"make_conv4: .*16 pixels.*got \(8, 8, 1\)"),
        (lambda: make_network("conv4", (64,), 5), r"make_conv4: .*got \(64,\); .*'linear'"),
        (lambda: make_network("conv", (64,), 5), r"make_network: .*got \(64,\); use 'linear'"),
        (lambda: make_conv4((16, 16, 1), 5, filters=0), "make_conv4: filters .* got 0"),
    ],
)
def test_shapes_that_a_network_does_not_take(make, message):
    with pytest.raises(ValueError, match=message):
        make()


TINY = {"cnn": {"widths": (3, 4)}, "vit": {"patch_size": 2, "depth": 2, "width": 6, "num_heads": 3}}


def random_weights(network, *, seed=0):
    """Weights of which none is zero, from a fixed seed."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("size", [(7, 10), (8, 9), (5, 5)])
@pytest.mark.parametrize("kernel, stride", [(5, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize("padding", ["VALID", "SAME"])
def test_a_convolution_by_product_equals_the_definition(size, kernel, stride, padding):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, *size, 3)), rng.normal(size=(kernel, kernel, 3, 2))
    same = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in size]
    pads = [(p // 2, p - p // 2) if padding == "SAME" else (0, 0) for p in same]
    padded = np.pad(x, [(0, 0), *pads, (0, 0)])
    expected = [
        sum(scipy.signal.correlate2d(image[..., i], w[..., i, o], "valid") for i in range(3))
        for image in padded
        for o in range(2)
    ]
    expected = np.stack(expected)[:, ::stride, ::stride]
    expected = np.moveaxis(expected.reshape(2, 2, *expected.shape[1:]), 1, -1)
    for convolve in (networks._convolve_by_product, networks._convolve):
        actual = convolve(jnp.float32(x), jnp.float32(w), stride=stride, padding=padding)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_patches_are_squares_of_the_image():
    images = np.random.default_rng(0).normal(size=(2, 4, 6, 3))
    patches = networks._patches(jnp.float32(images), 2)
    assert patches.shape == (2, 6, 12)
    for place, (row, column) in enumerate(np.ndindex(2, 3)):
        square = images[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        np.testing.assert_allclose(patches[:, place], square.reshape(2, 12), rtol=1e-6)


def test_a_vit_knows_patches_apart_by_their_positions_alone():
    network = make_classifier("vit", (4, 4, 1), NUM_CLASSES, **TINY["vit"])
    params, apply = random_weights(network), jax.jit(network.apply)
    images = np.random.default_rng(1).normal(size=(3, 4, 4, 1)).astype(np.float32)
    swapped = np.concatenate([images[:, :, 2:], images[:, :, :2]], axis=2)  # halves, of two patches
    nowhere = {**params, "~": {"positions": np.zeros((4, 6), np.float32)}}
    np.testing.assert_allclose(
        apply(nowhere, swapped), apply(nowhere, images), rtol=1e-4, atol=1e-5
    )
    assert np.abs(apply(params, swapped) - apply(params, images)).max() > 1e-2


def test_the_vit_for_a_gpu_has_its_size():
    network = make_classifier("vit", (32, 32, 3), 10)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    block = 4 * (192 * 192 + 192) + 8 * 192 * 192 + 5 * 192 + 4 * 192  # attention, MLP, two norms
    rest = (4 * 4 * 3 + 1) * 192 + 64 * 192 + 2 * 192 + 192 * 10 + 10
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 9 * block + rest


def test_the_cnn_has_two_convolutions_of_each_width():
    network = make_classifier("cnn", (4, 4, 2), NUM_CLASSES, widths=(3, 4))
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    sizes = {name: leaf["w"].shape for name, leaf in shapes.items()}
    assert sizes == {
        "conv": (3, 3, 2, 3),
        "conv_1": (3, 3, 3, 3),
        "conv_2": (3, 3, 3, 4),
        "conv_3": (3, 3, 4, 4),
        "head": (4, NUM_CLASSES),
    }


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_classifiers_take_weights_under_vmap_and_name_their_head(name):
    network = make_classifier(name, (4, 4, 1), NUM_CLASSES, **TINY[name])
    several = [random_weights(network, seed=seed) for seed in (0, 1)]
    images = np.random.default_rng(1).normal(size=(5, 4, 4, 1)).astype(np.float32)
    together = jax.jit(jax.vmap(network.apply, (0, None)))(
        jax.tree.map(lambda *leaves: np.stack(leaves), *several), images
    )
    for logits, params in zip(together, several, strict=True):
        assert logits.shape == (5, NUM_CLASSES)
        np.testing.assert_allclose(logits, network.apply(params, images), rtol=1e-3, atol=1e-4)
    assert network.class_axes["head"] == {"w": 1, "b": 0}
    assert all(axis == -1 for axis in jax.tree.leaves({**network.class_axes, "head": {}}))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("cmn", {}, r"one of \('cnn', 'vit'\), got 'cmn'; did you mean 'cnn'"),
        ("vit", {"patch_size": 3}, "patch_size must divide images of 4 x 4, got 3"),
        ("vit", {"depth": 0}, "depth, width and num_heads must be at least 1, got 4, 0, 192, 12"),
        ("vit", {"heads": 3}, "an option of 'vit' must be one of .*'heads'.*'num_heads'"),
        ("cnn", {"widths": ()}, "widths must hold at least one number"),
        ("vit", {"width": 10, "num_heads": 3}, "num_heads must divide width=10, got 3"),
    ],
)
def test_classifiers_refuse_what_does_not_fit(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_classifier(name, (4, 4, 1), 2, **options)
