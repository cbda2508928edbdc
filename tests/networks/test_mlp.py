"""The multi-layer perceptron against its definition."""

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.networks.mlp import apply_mlp, init_mlp

KEY = jax.random.key(0)


def test_network_is_its_definition():
    params = init_mlp(KEY, (4, 5, 3))
    x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    params["layer_0"]["b"] = jnp.arange(5.0)
    hidden = np.tanh(x @ params["layer_0"]["w"] + np.arange(5.0)[None])
    expected = hidden @ params["layer_1"]["w"]
    np.testing.assert_allclose(apply_mlp(params, x, jnp.tanh), expected, rtol=1e-5)


def test_weights_start_at_one_over_root_of_inputs():
    params = init_mlp(KEY, (400, 100, 3))
    np.testing.assert_allclose(params["layer_0"]["w"].std(), 0.05, rtol=0.02)
    assert not np.any(params["layer_0"]["b"])


def test_weights_are_drawn_layer_by_layer_as_asked():
    params = init_mlp(KEY, (2, 3, 1), w_init=lambda key, shape: jax.random.uniform(key, shape))
    for i, key in enumerate(jax.random.split(KEY, 2)):
        shape = ((2, 3), (3, 1))[i]
        np.testing.assert_array_equal(params[f"layer_{i}"]["w"], jax.random.uniform(key, shape))
        np.testing.assert_array_equal(params[f"layer_{i}"]["b"], np.zeros(shape[1]))
