import math

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.codec import make_codec, standard_scale

DTYPES = [np.float16, jnp.bfloat16, np.float32]
AXES = {"body": {"kernel": -1, "b": -1}, "head": {"w": 1, "b": 0}, "gain": -1}
NUM_LABELS = 3


def weights(seed=0, batch=()):
    """float32 weights whose class axes are `AXES`."""
    rng = np.random.default_rng(seed)
    shapes = {
        "body": {"kernel": (3, 3, 1, 2), "b": (2,)},
        "head": {"w": (5, NUM_LABELS), "b": (NUM_LABELS,)},
        "gain": (),
    }
    return jax.tree.map(
        lambda shape: rng.normal(size=batch + shape).astype(np.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def encode_oracle(params, axes, channels):
    """Rows one by one: leaves without a class axis first, then label by label."""
    rows = []

    def put(numbers):
        for start in range(0, numbers.size, channels):
            row = numbers.ravel()[start : start + channels]
            rows.append([*row, *[0.0] * (channels - len(row))])

    leaves = list(zip(jax.tree.leaves(params), jax.tree.leaves(axes), strict=True))
    for leaf, axis in leaves:
        if axis < 0:
            put(leaf)
    for label in range(NUM_LABELS):
        for leaf, axis in leaves:
            if axis >= 0:
                put(np.take(leaf, label, axis))
    return np.array(rows)


def relabel(params, permutation):
    """Weights in which label `l` has what label `permutation[l]` had."""
    return jax.tree.map(
        lambda leaf, axis: leaf if axis < 0 else np.take(leaf, permutation, axis), params, AXES
    )


def assert_same_bits(actual, expected):
    chex.assert_trees_all_equal_structs(actual, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


@st.composite
def arrays(draw):
    """Any bits that are a number: subnormal, infinite and negative zero among them."""
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    array = np.frombuffer(rng.bytes(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)
    return np.where(np.isnan(array), dtype.type(-0.0), array)


@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
@hypothesis.given(
    params=st.recursive(
        arrays(),
        lambda node: st.one_of(
            st.dictionaries(st.sampled_from("abc"), node, min_size=1),
            st.lists(node, min_size=1, max_size=3),
            st.tuples(node, node),
        ),
        max_leaves=5,
    ),
    channels=st.integers(1, 9),
)
def test_decode_inverts_encode_bit_for_bit(params, channels):
    codec = make_codec(params, channels=channels)
    tokens = jax.jit(codec.encode)(params)
    assert tokens.shape == codec.mask.shape == (codec.length, channels)
    assert tokens.dtype == jnp.float32
    assert codec.mask.sum() == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert_same_bits(jax.jit(codec.decode)(tokens), params)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("channels", [1, 4, 100])
def test_tokens_are_shared_leaves_and_then_one_block_per_label(channels, transform):
    params = weights()
    codec = make_codec(params, channels=channels, class_axes=AXES)
    tokens = transform(codec.encode)(params)
    np.testing.assert_array_equal(tokens, encode_oracle(params, AXES, channels))
    ones = jax.tree.map(np.ones_like, params)
    np.testing.assert_array_equal(codec.mask, encode_oracle(ones, AXES, channels))
    assert_same_bits(transform(codec.decode)(tokens), params)


def test_relabelling_the_weights_permutes_the_blocks_of_the_labels():
    params, permutation = weights(), [2, 0, 1]
    codec = make_codec(params, channels=4, class_axes=AXES)
    tokens, relabelled = codec.encode(params), codec.encode(relabel(params, permutation))
    assert codec.num_classes == NUM_LABELS and codec.length == 7 + NUM_LABELS * 3
    shared = codec.shared_length
    assert shared == 7  # 5 tokens of 18 numbers, 1 of 2, 1 of a scalar
    np.testing.assert_array_equal(relabelled[:shared], tokens[:shared])
    blocks = tokens[shared:].reshape(NUM_LABELS, -1, 4)
    np.testing.assert_array_equal(relabelled[shared:].reshape(blocks.shape), blocks[permutation, :])
    for rows in (codec.mask, codec.features):
        own = rows[shared:].reshape(NUM_LABELS, -1, rows.shape[-1])
        np.testing.assert_array_equal(own, own[permutation, :])


def test_without_class_axes_every_token_is_shared():
    codec = make_codec(weights(), channels=4)
    assert codec.num_classes == 0
    assert codec.shared_length == codec.length == len(codec.mask)


@pytest.mark.parametrize("with_reference", [False, True])
def test_tokens_are_standardised(with_reference):
    params, reference = weights(0), weights(1)
    scale = jax.tree.map(lambda leaf: np.float32(0.1 + np.abs(leaf).max()), params)
    codec = make_codec(
        params,
        channels=4,
        reference=reference if with_reference else None,
        scale=scale,
        class_axes=AXES,
    )
    expected = jax.tree.map(lambda p, r, s: (p - r * with_reference) / s, params, reference, scale)
    tokens = codec.encode(params)
    np.testing.assert_allclose(tokens, encode_oracle(expected, AXES, 4), rtol=1e-6)
    chex.assert_trees_all_close(codec.decode(tokens), params, rtol=1e-6, atol=1e-6)


def test_half_precision_is_standardised_in_single_precision():
    params = {"w": np.linspace(-1, 1, 7, dtype=np.float16)}
    codec = make_codec(params, channels=3, reference={"w": np.float16([0.5] * 7)}, scale={"w": 3.0})
    expected = (np.float64(params["w"]) - 0.5) / 3.0
    np.testing.assert_allclose(codec.encode(params)[codec.mask], expected, rtol=1e-6)
    assert_same_bits(codec.decode(codec.encode(params)), params)


def test_a_scale_may_hold_several_numbers_per_leaf():
    params = {"w": np.float32([[1, 2], [3, 4]])}
    codec = make_codec(params, channels=4, scale={"w": np.float32([[1, 2]])})
    np.testing.assert_array_equal(codec.encode(params), [[1, 1, 3, 2]])
    np.testing.assert_array_equal(codec.decode(codec.encode(params))["w"], params["w"])


def test_decode_ignores_padding():
    params = weights()
    codec = make_codec(params, channels=4, class_axes=AXES)
    tokens = jnp.where(codec.mask, codec.encode(params), jnp.nan)
    assert_same_bits(codec.decode(tokens), params)


def test_encode_and_decode_are_linear_inverses_under_grad():
    params = weights()
    codec = make_codec(params, channels=4, class_axes=AXES)
    cotangent = np.random.default_rng(2).normal(size=codec.mask.shape).astype(np.float32)
    gradient = jax.grad(lambda p: jnp.sum(codec.encode(p) * cotangent))(params)
    chex.assert_trees_all_equal(gradient, codec.decode(cotangent))
    target = weights(3)

    def inner_product(tokens):
        products = jax.tree.map(lambda a, b: jnp.sum(a * b), codec.decode(tokens), target)
        return sum(jax.tree.leaves(products))

    np.testing.assert_array_equal(jax.grad(inner_product)(cotangent), codec.encode(target))


def test_vmap_equals_a_loop():
    batch = weights(batch=(6,))
    codec = make_codec(weights(), channels=4, class_axes=AXES)
    tokens = jax.jit(jax.vmap(codec.encode))(batch)
    for i in range(6):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], batch)
        np.testing.assert_array_equal(tokens[i], codec.encode(one))
    assert_same_bits(jax.vmap(codec.decode)(tokens), batch)


def test_double_precision_is_kept():
    with jax.enable_x64(True):
        params = jax.tree.map(np.float64, weights()) | {"gain": np.float32(0.1)}
        for standardise in ({}, {"scale": jax.tree.map(lambda leaf: 1.0, params)}):
            codec = make_codec(params, channels=4, class_axes=AXES, **standardise)
            tokens = codec.encode(params)
            assert tokens.dtype == jnp.float64
            assert_same_bits(codec.decode(tokens), params)


def test_shapes_are_enough_to_build_a_codec():
    params = weights()
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, params))
    codec, expected = (make_codec(tree, channels=4, class_axes=AXES) for tree in (shapes, params))
    np.testing.assert_array_equal(codec.encode(params), expected.encode(params))
    np.testing.assert_array_equal(codec.features, expected.features)


def test_features_say_layer_kind_fan_and_position():
    params = {
        "conv": {"k": np.zeros((3, 3, 1, 2))},
        "head": {"b": np.zeros(2), "w": np.ones((5, 2))},
    }
    params = jax.tree.map(np.float32, params)
    codec = make_codec(params, channels=6)
    conv = [1, 0, 0, 0, 1, np.log10(9), np.log10(2)]
    bias = [0, 1, 1, 0, 0, np.log10(5), np.log10(2)]
    matrix = [0, 1, 0, 1, 0, np.log10(5), np.log10(2)]
    expected = [[*conv, 0], [*conv, 0.5], [*conv, 1], [*bias, 0], [*matrix, 0], [*matrix, 1]]
    np.testing.assert_allclose(codec.features, expected, rtol=1e-6)
    assert codec.features.dtype == np.float32


def test_standard_scale_is_the_root_mean_square_per_leaf():
    batch, reference = weights(0, batch=(7,)), weights(1)
    expected = jax.tree.map(
        lambda w, r: np.sqrt(np.mean((np.float64(w) - r) ** 2)), batch, reference
    )
    actual = standard_scale(batch, reference)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5)
    assert all(s.dtype == jnp.float32 and s.shape == () for s in jax.tree.leaves(actual))


@pytest.mark.parametrize("size", [5.0, 3e30, 3e-30])
def test_standard_scale_takes_empty_leaves_and_numbers_of_any_size(size):
    """Squares of 3e30 and of 3e-30 are no float32; the mean of no numbers is none at all."""
    batch = {"empty": np.zeros((2, 0), np.float32), "full": np.full((2, 3), size, np.float32)}
    reference = jax.tree.map(lambda leaf: np.zeros_like(leaf[0]), batch)
    scale = standard_scale(batch, reference)
    np.testing.assert_allclose(scale["full"], size, rtol=1e-6)
    assert np.isfinite(scale["empty"]) and scale["empty"] > 0


def test_weights_with_an_empty_leaf_are_encoded_and_decoded():
    tree = {"empty": np.zeros((0, 3), np.float32), "full": np.arange(5, dtype=np.float32)}
    reference = jax.tree.map(np.zeros_like, tree)
    scale = standard_scale(jax.tree.map(lambda leaf: leaf[None], tree), reference)
    codec = make_codec(tree, channels=2, reference=reference, scale=scale)
    chex.assert_trees_all_close(codec.decode(codec.encode(tree)), tree, rtol=1e-6)


def test_standard_scale_stays_away_from_zero():
    still = {"a": np.zeros((4, 2), np.float16), "b": np.full((4, 3), 1e-4, np.float16)}
    reference = {"a": np.zeros(2, np.float16), "b": np.zeros(3, np.float16)}
    scale = standard_scale(still, reference, floor=0.01)
    np.testing.assert_allclose([scale["a"], scale["b"]], [1e-6, 1e-4], rtol=1e-3)
    nowhere = standard_scale(still, {"a": reference["a"], "b": still["b"][0]})
    assert nowhere == {"a": 1.0, "b": 1.0}


ONE = {"w": np.zeros((2, 3), np.float32), "b": np.zeros(3, np.float32)}


@pytest.mark.parametrize(
    "params, options, message",
    [
        (ONE, {"channels": 0}, r"make_codec: channels must be at least 1, got 0"),
        ({}, {}, r"at least one array"),
        ({"w": np.zeros(3, np.int32)}, {}, r"floating-point arrays, got int32 at \['w'\]"),
        ({"w": 1.0}, {}, r"floating-point arrays, got float at \['w'\]"),
        (ONE, {"class_axes": {"w": 2, "b": -1}}, r"class axis of \['w'\].*\(2, 3\), or -1; got 2"),
        (ONE, {"class_axes": {"w": -2, "b": -1}}, r"class axis of \['w'\].*; got -2"),
        (ONE, {"class_axes": {"w": 0, "b": 0}}, r"agree on the number of labels.*3.*2"),
        (ONE, {"class_axes": {"w": 1}}, r"b"),
        (ONE, {"scale": {"w": 1.0}}, r"b"),
        (ONE, {"scale": {"w": 1.0, "b": 1.0}, "reference": {"w": 0.0}}, r"b"),
    ],
)
def test_make_codec_rejects(params, options, message):
    with pytest.raises(ValueError, match=message):
        make_codec(params, **{"channels": 4} | options)


def test_encode_and_decode_reject_other_shapes():
    codec = make_codec(ONE, channels=4)
    with pytest.raises(ValueError, match="encode: expected weights with structure"):
        codec.encode({"w": ONE["w"]})
    with pytest.raises(ValueError, match=r"encode: expected shape \(3,\) at \['b'\], got \(4,\)"):
        codec.encode({**ONE, "b": np.zeros(4, np.float32)})
    with pytest.raises(
        ValueError, match=r"decode: expected tokens of shape \(3, 4\), got \(4, 3\)"
    ):
        codec.decode(np.zeros((4, 3), np.float32))
