"""Windows of tokens against the tokens they are cut from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.codec import leaf_features, make_codec
from lohp_jax.windows import (
    cut_tokens,
    flat_leaves,
    join_tokens,
    make_windows,
    num_places,
    numbers_in,
    renamed,
    restore,
    spans_in,
    standardise,
    take_tokens,
    weights_in_windows,
)

NUM_LABELS, CHANNELS = 3, 4
SHAPES = {
    "conv": (3, 3, 1, 2),
    "empty": (0, 2),
    "gain": (),
    "none": None,
    "head": {"b": (NUM_LABELS,), "mid": (2, NUM_LABELS, 3), "w": (7, NUM_LABELS)},
}
AXES = {
    "conv": -1,
    "empty": -1,
    "gain": -1,
    "none": None,
    "head": {"b": 0, "mid": 1, "w": 1},
}
CASES = [(axes, size) for axes in (AXES, None) for size in (1, 2, 3, 5, 6)]


def weights(seed=0, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def make(axes, size, **standard):
    return make_windows(make_codec(weights(), channels=CHANNELS, class_axes=axes, **standard), size)


def blocks(codec, tokens):
    """The shared tokens, then those of each label."""
    found = [tokens[: codec.shared_length]]
    if codec.num_classes:
        found += np.split(tokens[codec.shared_length :], codec.num_classes)
    return found


def cut_oracle(codec, size, tokens):
    """Window by window, each from one block and padded with zeros."""
    pieces = []
    for block in blocks(codec, tokens):
        for first in range(0, len(block), size):
            rows = block[first : first + size]
            pieces.append(np.pad(rows, ((0, size - len(rows)), (0, 0))))
    return np.stack(pieces)


@pytest.mark.parametrize("axes, size", CASES)
def test_windows_are_runs_of_one_block_and_join_to_the_tokens(axes, size):
    windows = make(axes, size)
    tokens = np.asarray(windows.codec.encode(weights(1)))
    pieces = jax.jit(lambda t: cut_tokens(windows, t))(tokens)
    np.testing.assert_array_equal(pieces, cut_oracle(windows.codec, size, tokens))
    assert len(pieces) == windows.count
    noisy = jnp.where(cut_tokens(windows, jnp.ones_like(tokens)) > 0, pieces, jnp.nan)
    joined = join_tokens(windows, noisy)
    np.testing.assert_array_equal(joined, tokens)
    for index in range(windows.count):
        np.testing.assert_array_equal(take_tokens(windows, tokens, index), pieces[index])


@pytest.mark.parametrize("axes, size", CASES)
def test_a_window_knows_what_stands_in_it(axes, size):
    """Leaf, number within it and padding of every number, from the number of the window alone."""
    windows = make(axes, size)
    codec = windows.codec
    numbers = jax.jit(jax.vmap(lambda i: numbers_in(windows, i)))(np.arange(windows.count))
    real = cut_oracle(codec, size, codec.mask.astype(int)) > 0
    np.testing.assert_array_equal(numbers.real, real)
    known = cut_oracle(codec, size, codec.features[:, :-1])
    there = real.any(axis=-1)
    np.testing.assert_array_equal(leaf_features(codec.leaves)[numbers.leaf][there], known[there])
    order = {leaf.number: i for i, leaf in enumerate(codec.leaves)}

    def positions(number, leaf):
        axis = codec.leaves[order[number]].axis
        rest = leaf.shape[:axis] + leaf.shape[axis + 1 :] if axis >= 0 else leaf.shape
        offsets = np.arange(np.prod(rest, dtype=int), dtype=np.float32).reshape(rest)
        return np.broadcast_to(np.expand_dims(offsets, axis) if axis >= 0 else offsets, leaf.shape)

    leaves, structure = jax.tree.flatten(weights())
    wanted = structure.unflatten([positions(i, leaf) for i, leaf in enumerate(leaves)])
    wanted = cut_oracle(codec, size, np.asarray(codec.encode(wanted)))
    np.testing.assert_array_equal(np.where(real, numbers.offset, 0), wanted)
    labels = [-1] * windows.shared + list(np.repeat(range(codec.num_classes), windows.own))
    np.testing.assert_array_equal(numbers.label, labels)
    assert int(numbers.place.max()) == num_places(windows) - 1


@pytest.mark.parametrize("axes, size", CASES)
def test_spans_lead_from_leaves_to_windows_and_back_bit_for_bit(axes, size):
    windows = make(axes, size)
    codec, params = windows.codec, weights(1)
    leaves = flat_leaves(jax.tree.leaves(params), 0)
    pieces = cut_oracle(codec, size, np.asarray(codec.encode(params)))
    back = [np.full_like(leaf, np.nan) for leaf in leaves]
    for index, piece in enumerate(pieces):
        read = np.zeros(piece.size, np.float32)
        for span in spans_in(windows, index):
            values = leaves[span.leaf.number][span.index]
            read[span.start : span.stop] = standardise(codec, span, values)
            back[span.leaf.number][span.index] = restore(codec, span, values)
        np.testing.assert_array_equal(read.reshape(piece.shape), piece)
    for leaf, written in zip(leaves, back, strict=True):
        np.testing.assert_array_equal(leaf, written)


@pytest.mark.parametrize("scalars", [True, False])
def test_spans_are_standardised_as_tokens_are(scalars):
    params, reference = weights(1), weights(2)
    scale = jax.tree.map(lambda x: np.abs(x) + 0.5, weights(3))
    if scalars:
        scale = jax.tree.map(lambda x: np.float32(x.sum() + 3.0), scale)
    windows = make(AXES, 2, reference=reference, scale=scale)
    codec, leaves = windows.codec, flat_leaves(jax.tree.leaves(params), 0)
    pieces = cut_tokens(windows, codec.encode(params)).reshape(windows.count, -1)
    for index in range(windows.count):
        for span in spans_in(windows, index):
            values = leaves[span.leaf.number][span.index]
            standard = standardise(codec, span, values)
            np.testing.assert_allclose(standard, pieces[index, span.start : span.stop], rtol=1e-6)
            np.testing.assert_allclose(restore(codec, span, standard), values, atol=1e-6)


def test_restored_numbers_have_the_type_of_their_leaf():
    params = {"a": np.ones(5, np.float16), "b": np.ones(3, np.float32)}
    scale = {"a": np.float32(2.0), "b": np.float32(3.0)}
    windows = make_windows(make_codec(params, channels=2, scale=scale), 2)
    spans = [span for index in range(windows.count) for span in spans_in(windows, index)]
    types = {s.leaf.path: restore(windows.codec, s, np.ones(1, np.float32)).dtype for s in spans}
    assert types == {"['a']": np.float16, "['b']": np.float32}


@pytest.mark.parametrize("axes, size", CASES)
def test_every_weight_is_in_one_window(axes, size):
    """Shared ones too: labels do not multiply them."""
    windows = make(axes, size)
    counts = weights_in_windows(windows)
    real = cut_oracle(windows.codec, size, windows.codec.mask.astype(int))
    np.testing.assert_array_equal(counts, real.sum(axis=(1, 2)))
    assert counts.sum() == sum(leaf.size for leaf in jax.tree.leaves(weights()))


def test_a_window_of_one_label_is_renamed_to_that_of_another():
    windows, names = make(AXES, 2), np.array([2, 0, 1])
    assert windows.shared == 3 and windows.own == 3
    actual = [renamed(windows, i, names) for i in range(windows.count)]
    assert actual == [0, 1, 2, 9, 10, 11, 3, 4, 5, 6, 7, 8]
    assert [renamed(windows, i, None) for i in range(windows.count)] == list(range(windows.count))


@pytest.mark.parametrize("size", [0, -1, 7])
def test_a_window_that_no_tokens_fill_is_refused(size):
    message = (
        rf"window must be between 1 and 6 tokens of 4 weights, .*got {size}; choose less, or None"
    )
    with pytest.raises(ValueError, match=message):
        make(AXES, size)
