import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.networks.trunks import MLPTrunk, UNet, convolve

ROWS, LENGTH, INPUTS, CONDITION, OUTPUTS = 3, 5, 2, 4, 6
TRUNKS = {
    "unet": lambda x, condition: UNet((8, 12), OUTPUTS)(x, condition),
    "mlp": lambda x, condition: MLPTrunk((8, 8), OUTPUTS)(x, condition),
}
ORDER = np.array([2, 0, 1])


def example(length=LENGTH, seed=0):
    """Tokens `[ROWS, length, INPUTS]` and condition `[ROWS, CONDITION]`."""
    rng = np.random.default_rng(seed)
    shapes = (ROWS, length, INPUTS), (ROWS, CONDITION)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def random_like(params, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: rng.normal(0, 0.5, size=p.shape).astype(np.float32), params)


@pytest.fixture(scope="module", params=TRUNKS)
def trunk(request):
    """`apply(x, condition)` of each trunk, compiled, with random weights."""
    transformed = hk.without_apply_rng(hk.transform(TRUNKS[request.param]))
    params = random_like(jax.eval_shape(transformed.init, jax.random.key(0), *example()))
    return jax.jit(lambda x, condition: transformed.apply(params, x, condition))


def test_permuting_the_rows_permutes_the_output(trunk):
    x, condition = example()
    out = trunk(x, condition)
    assert out.shape == (ROWS, LENGTH, OUTPUTS)
    assert np.abs(out[0] - out[1]).max() > 0.1
    np.testing.assert_allclose(trunk(x[ORDER], condition[ORDER]), out[ORDER], rtol=1e-4, atol=1e-4)


def test_every_token_reaches_every_output(trunk):
    """Of its own row, and through the means over rows of the others."""
    x, condition = example()
    out = trunk(x, condition)
    for row, token in np.ndindex(ROWS, LENGTH):
        changed = x.copy()
        changed[row, token] += 1
        assert (np.abs(trunk(changed, condition) - out).max(axis=-1) > 0).all(), (row, token)


def test_the_condition_of_a_row_reaches_the_whole_row(trunk):
    x, condition = example()
    changed = condition.copy()
    changed[1] += 1
    difference = np.abs(trunk(x, changed) - trunk(x, condition)).max(axis=-1)
    assert (difference[1] > 1e-3).all()


@pytest.mark.parametrize("name", TRUNKS)
def test_the_output_starts_at_zero_and_learns(name):
    transformed = hk.without_apply_rng(hk.transform(TRUNKS[name]))

    @jax.jit
    def start(key):
        def loss_fn(params):
            out = transformed.apply(params, *example())
            return jnp.mean((out - 1) ** 2), out

        return jax.grad(loss_fn, has_aux=True)(transformed.init(key, *example()))

    grads, out = start(jax.random.key(0))
    np.testing.assert_array_equal(out, np.zeros((ROWS, LENGTH, OUTPUTS)))
    (output,) = (leaves for module, leaves in grads.items() if module.endswith("/output"))
    assert np.abs(output["w"]).max() > 0 and np.abs(output["b"]).max() > 0


@pytest.mark.parametrize("widths", [(8,), (8, 8), (8, 12, 8, 4)], ids=str)
@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_the_unet_takes_any_length_at_any_depth(widths, length):
    unet = hk.without_apply_rng(hk.transform(lambda *inputs: UNet(widths, OUTPUTS)(*inputs)))
    params = jax.eval_shape(unet.init, jax.random.key(0), *example(length))
    out = jax.eval_shape(unet.apply, params, *example(length))
    assert out.shape == (ROWS, length, OUTPUTS)


def convolve_oracle(x, w, b):
    """Three taps along axis -2 and zeros beyond the ends; w `[3 C, width]`, tap by tap."""
    taps = np.float64(w).reshape(3, x.shape[-1], -1)
    out = np.zeros((*x.shape[:-1], w.shape[1])) + b
    for row, i in np.ndindex(x.shape[:2]):
        for tap in range(3):
            if 0 <= i + tap - 1 < x.shape[1]:
                out[row, i] += np.float64(x[row, i + tap - 1]) @ taps[tap]
    return out


@pytest.mark.parametrize("length", [1, 2, LENGTH])
def test_convolve_equals_its_definition_and_that_of_lax(length):
    x, _ = example(length)
    transformed = hk.without_apply_rng(hk.transform(lambda x: convolve(x, 7, "convolution")))
    params = random_like(transformed.init(jax.random.key(0), x))
    w, b = params["convolution"]["w"], params["convolution"]["b"]
    out = transformed.apply(params, x)
    np.testing.assert_allclose(out, convolve_oracle(x, w, b), rtol=1e-5, atol=1e-5)
    of_lax = jax.lax.conv_general_dilated(
        x, w.reshape(3, INPUTS, 7), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    np.testing.assert_allclose(out, of_lax + b[None, None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length, padded", [(1, 8), (8, 8), (9, 12)])
def test_the_lowest_resolution_has_two_tokens_or_more(length, padded):
    """With one, the gradient of a batch crashed the process on a CPU."""
    transformed = hk.without_apply_rng(hk.transform(lambda *seen: UNet((8, 8, 8), 2)(*seen)))
    shapes = jax.eval_shape(transformed.init, jax.random.key(0), *example(length))
    assert shapes["u_net"]["position"].shape == (padded, 8)
    params, batch = random_like(shapes), [np.stack([x, -x]) for x in example(length)]

    @jax.jit
    @jax.grad
    def slope(params):
        return jnp.sum(jax.vmap(lambda *seen: transformed.apply(params, *seen))(*batch) ** 2)

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope(params)))
