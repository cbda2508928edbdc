import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from lohp_jax.tasks.networks import NETWORKS, make_network

SHAPE, NUM_CLASSES = (5, 6, 2), 3


def network_and_weights(name):
    """A network with random weights, zeros replaced, and images; all from fixed seeds."""
    network = make_network(name, SHAPE, NUM_CLASSES)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
        jax.eval_shape(network.init, jax.random.key(0)),
    )
    return network, params, rng.normal(size=(4, *SHAPE)).astype(np.float32)


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
    class_axes = make_network(name, SHAPE, NUM_CLASSES).class_axes
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
