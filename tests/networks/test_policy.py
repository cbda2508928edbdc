import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.codec import make_codec
from lohp_jax.networks.policy import (
    Heads,
    NetworkConfig,
    from_rows,
    make_policy_network,
    to_rows,
    where_read,
)
from lohp_jax.tasks.support import ImageSupport, SetSupport

NUM_STEPS, NUM_TEACHERS, NUM_CLASSES = 2, 2, 3
CLASS_AXES = {"body": {"w": -1}, "head": {"b": 0, "w": 1}}
RNG = np.random.default_rng(0)
WEIGHTS = {
    "body": {"w": RNG.normal(size=(2, 4)).astype(np.float32)},
    "head": {
        "b": RNG.normal(size=(NUM_CLASSES,)).astype(np.float32),
        "w": RNG.normal(size=(4, NUM_CLASSES)).astype(np.float32),
    },
}
CODEC = make_codec(WEIGHTS, channels=3, class_axes=CLASS_AXES)
FLAT_CODEC = make_codec(WEIGHTS, channels=3)
CONTEXT = {
    "x": RNG.uniform(size=(2 * NUM_CLASSES, 2, 2, 1)).astype(np.float32),
    "y": np.repeat(np.arange(NUM_CLASSES), 2),
}
STATE = RNG.normal(size=CODEC.mask.shape).astype(np.float32)


SUPPORT = ImageSupport(NUM_CLASSES, (2, 2, 1))
POINTS = {  # without labels
    "x": RNG.normal(size=(5, 1)).astype(np.float32),
    "y": RNG.normal(size=(5, 1)).astype(np.float32),
}
POINTS_SUPPORT = SetSupport(POINTS)


def make(codec=CODEC, start=None, step_features=None, support=SUPPORT, **config):
    start = jnp.zeros(codec.mask.shape) if start is None else start
    config = NetworkConfig(**{"widths": (8,), "embedding": 8, **config})
    return make_policy_network(
        codec,
        config,
        start,
        encoder=support.encode(config.embedding),
        inputs=support.inputs,
        num_steps=NUM_STEPS,
        num_teachers=NUM_TEACHERS,
        step_features=step_features,
    )


def random_params(network, seed=0, context=CONTEXT):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(network.init, jax.random.key(0), context)
    return jax.tree.map(lambda p: rng.normal(0, 0.3, size=p.shape).astype(np.float32), shapes)


def compiled(network, like=CONTEXT):
    """`(context, keep=1, teacher=0, step=0, state=STATE) -> Heads` with random weights."""
    params = random_params(network, context=like)

    @jax.jit
    def run(context, keep, teacher, step, state):
        return network.heads(params, network.encode(params, context, keep), teacher, step, state)

    def call(context=like, keep=1.0, teacher=0, step=0, state=STATE):
        return run(context, keep, teacher, step, state)

    return call


@pytest.fixture(scope="module", params=["unet", "mlp"])
def heads(request):
    """`compiled` with a start that, like a zero head, tells no label from another."""
    return compiled(make(trunk=request.param))


def difference(a, b):
    return max(np.abs(x - y).max() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("trunk, codec", [("unet", CODEC), ("mlp", FLAT_CODEC)])
def test_heads_and_log_coefficient_start_at_zero(trunk, codec):
    network = make(codec, start=jnp.ones(codec.mask.shape), trunk=trunk)

    @jax.jit
    def start(key):
        params = network.init(key, CONTEXT)
        embedding = network.encode(params, CONTEXT, 1.0)
        heads = network.heads(params, embedding, 0, 0, jnp.ones(codec.mask.shape))
        return embedding, heads, network.log_coefficient(params)

    embedding, heads, log_coefficient = start(jax.random.key(0))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(embedding))
    for head in heads:
        np.testing.assert_array_equal(head, np.zeros(codec.mask.shape))
    np.testing.assert_array_equal(log_coefficient, np.zeros(NUM_STEPS + 1))


def test_each_input_changes_every_head(heads):
    base = heads()
    other_context = CONTEXT | {"x": 1 - CONTEXT["x"]}
    for name, changed in {
        "context": heads(context=other_context),
        "keep": heads(keep=0.0),
        "teacher": heads(teacher=1),
        "step": heads(step=1),
        "state": heads(state=STATE + 1),
    }.items():
        for head, values in zip(Heads._fields, changed, strict=True):
            assert np.abs(values - getattr(base, head)).max() > 1e-3, (name, head)


def test_a_step_is_known_by_its_features_if_there_are_any():
    call = compiled(make(trunk="mlp", step_features=lambda level: jnp.stack([level, level**2])))
    base = call(step=0.5)
    assert difference(call(step=0.7), base) > 1e-3
    assert difference(call(step=-0.5), base) > 1e-3
    even = compiled(make(trunk="mlp", step_features=lambda level: level[None] ** 2))
    assert difference(even(step=-0.5), even(step=0.5)) == 0


def test_permuting_labels_and_blocks_permutes_the_heads(heads):
    """Where theta_0 gives the labels no names: shared tokens stay, those of the labels move."""
    order = np.array([2, 0, 1])  # label c of the base is called order[c]
    base = heads()
    blocks = to_rows(CODEC, jnp.asarray(STATE))
    moved = heads(
        context=CONTEXT | {"y": order[CONTEXT["y"]]},
        state=from_rows(CODEC, blocks[np.argsort(order)]),
    )
    for head, before in zip(moved, base, strict=True):
        rows = to_rows(CODEC, head)[order]
        np.testing.assert_allclose(rows, to_rows(CODEC, before), rtol=1e-4, atol=1e-4)


def test_a_start_that_differs_between_labels_names_them():
    call = compiled(make(start=CODEC.encode(WEIGHTS)))
    same = CONTEXT | {"x": np.ones_like(CONTEXT["x"])}
    own = to_rows(CODEC, call(context=same, state=np.zeros_like(STATE)).drift)
    assert np.abs(own[0] - own[1])[CODEC.shared_length :].max() > 1e-3


def test_without_keep_nothing_depends_on_the_context(heads):
    other = CONTEXT | {"x": 1 - CONTEXT["x"], "y": CONTEXT["y"][::-1]}
    assert difference(heads(context=other), heads()) > 1e-3
    assert difference(heads(context=other, keep=0.0), heads(keep=0.0)) == 0


def test_the_log_coefficient_ends_at_zero():
    network = make()
    params = random_params(network)
    actual = network.log_coefficient(params)
    assert actual.shape == (NUM_STEPS + 1,) and actual[-1] == 0
    np.testing.assert_array_equal(actual[:-1], params["log_coefficient"])


@pytest.mark.parametrize("codec", [CODEC, FLAT_CODEC], ids=["classes", "no classes"])
def test_from_rows_inverts_to_rows(codec):
    tokens = np.random.default_rng(1).normal(size=(codec.length, 5)).astype(np.float32)
    rows = to_rows(codec, tokens)
    assert len(rows) == max(1, codec.num_classes)
    np.testing.assert_allclose(from_rows(codec, rows), tokens, rtol=1e-6)


def test_a_row_is_the_network_as_its_label_sees_it():
    """The shared weights and one column of the head, and nothing of the other labels."""
    for c, row in enumerate(to_rows(CODEC, CODEC.encode(WEIGHTS))):
        own = {"body": WEIGHTS["body"], "head": {"b": WEIGHTS["head"]["b"][c : c + 1]}}
        own["head"]["w"] = WEIGHTS["head"]["w"][:, c : c + 1]
        alone = make_codec(own, channels=3, class_axes=CLASS_AXES)
        np.testing.assert_array_equal(row, alone.encode(own))


def test_pixels_stand_beside_the_weights_that_multiply_them():
    """Images of 4 pixels: beside column c of the head's w `[4, 3]`, the mean image of label c."""
    means = np.random.default_rng(3).uniform(size=(NUM_CLASSES, 4)).astype(np.float32)
    contrast = np.float64(means) - np.float64(means).mean(axis=0)
    contrast /= contrast.std() + 1e-3
    seen = where_read(CODEC, jnp.asarray(means))
    for part, expected in zip(jnp.split(seen, 2, axis=-1), (contrast, means), strict=True):
        beside = CODEC.decode(from_rows(CODEC, part))
        np.testing.assert_allclose(beside["head"]["w"], expected.T, rtol=1e-4, atol=1e-6)
        assert not beside["head"]["b"].any() and not beside["body"]["w"].any()


def test_every_label_sees_its_own_pixels_beside_shared_weights():
    weights = {"body": {"w": np.zeros((4, 2), np.float32)}, "head": WEIGHTS["head"]}
    codec = make_codec(weights, channels=3, class_axes=CLASS_AXES)
    means = np.random.default_rng(3).uniform(size=(NUM_CLASSES, 4)).astype(np.float32)
    shared = where_read(codec, jnp.asarray(means))[:, : codec.shared_length, 3:]
    for c in range(NUM_CLASSES):
        expected = np.repeat(means[c], 2)  # [4, 2] weights, row by row
        np.testing.assert_allclose(shared[c].ravel()[:8], expected, rtol=1e-6)


def test_weights_without_class_axes_see_the_pixels_of_all_labels():
    """Beside entry [p, k] of w `[4, 3]` stand, label by label, the contrast and mean of pixel p."""
    means = np.random.default_rng(3).uniform(size=(NUM_CLASSES, 4)).astype(np.float32)
    contrast = np.float64(means) - np.float64(means).mean(axis=0)
    contrast /= contrast.std() + 1e-3
    seen = where_read(FLAT_CODEC, jnp.asarray(means))
    assert seen.shape == (1, FLAT_CODEC.length, NUM_CLASSES * 2 * 3)
    parts = jnp.split(seen[0], 2 * NUM_CLASSES, axis=-1)
    for c in range(NUM_CLASSES):
        for part, values in zip(parts[2 * c : 2 * c + 2], (contrast, means), strict=True):
            beside = FLAT_CODEC.decode(part)
            expected = np.repeat(values[c][:, None], 3, axis=1)
            np.testing.assert_allclose(beside["head"]["w"], expected, rtol=1e-4, atol=1e-6)
            assert not beside["head"]["b"].any() and not beside["body"]["w"].any()


def test_labels_without_class_axes_become_one_row_that_knows_of_all():
    """Weights that do not tell labels apart: what each label looks like still counts, by its name."""
    network = make(FLAT_CODEC, trunk="mlp")
    params = random_params(network)
    assert params["network"]["rows"]["w"].shape == (NUM_CLASSES * 8, 8)
    state = np.zeros(FLAT_CODEC.mask.shape, np.float32)
    call = compiled(network)
    base = call(state=state)
    assert base.drift.shape == FLAT_CODEC.mask.shape
    for c in range(NUM_CLASSES):
        member = (CONTEXT["y"] == c)[:, None, None, None]
        moved = CONTEXT | {"x": np.where(member, 1 - CONTEXT["x"], CONTEXT["x"])}
        assert difference(call(context=moved, state=state), base) > 1e-3
    renamed = CONTEXT | {"y": np.array([2, 0, 1])[CONTEXT["y"]]}
    assert difference(call(context=renamed, state=state), base) > 1e-3
    order = np.random.default_rng(0).permutation(len(CONTEXT["y"]))
    shuffled = {name: leaf[order] for name, leaf in CONTEXT.items()}
    assert difference(call(context=shuffled, state=state), base) < 1e-4


def test_a_context_without_labels_is_read_into_every_row():
    """Class axes, and a context that says nothing of the labels: all of them see the same row."""
    call = compiled(make(support=POINTS_SUPPORT, trunk="mlp"), like=POINTS)
    base = call(state=np.zeros_like(STATE))
    rows = to_rows(CODEC, base.drift)
    np.testing.assert_allclose(rows[1:], np.stack([rows[0]] * 2), rtol=1e-5)
    moved = call(context=POINTS | {"y": POINTS["y"] + 1}, state=np.zeros_like(STATE))
    assert difference(moved, base) > 1e-3


def test_without_labels_or_class_axes_the_encoder_is_read_as_it_is():
    network = make(FLAT_CODEC, support=POINTS_SUPPORT, trunk="mlp")
    params = jax.eval_shape(network.init, jax.random.key(0), POINTS)
    assert "rows" not in params["network"]
    embedding, seen = jax.eval_shape(lambda p: network.encode(p, POINTS, 1.0), params)
    assert embedding.shape == (1, 8) and seen.shape == (1, FLAT_CODEC.length, 0)


def test_shared_tokens_are_the_mean_of_what_the_labels_say():
    rows = np.random.default_rng(2).normal(size=(NUM_CLASSES, 5, 2)).astype(np.float32)
    shared = from_rows(CODEC, jnp.asarray(rows))[: CODEC.shared_length]
    np.testing.assert_allclose(
        shared, rows.astype(np.float64).mean(axis=0)[: CODEC.shared_length], rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize(
    "config, message",
    [
        ({"trunk": "nuet"}, r"trunk must be .*\('unet', 'mlp'\), got 'nuet'; did you mean 'unet'"),
        ({"embedding": 0}, "embedding must be at least 1, got 0"),
        ({"widths": ()}, r"widths must be positive and at least one, got \(\)"),
        ({"widths": (8, 0)}, r"widths must be positive and at least one, got \(8, 0\)"),
    ],
)
def test_a_bad_config_says_what_is_wrong(config, message):
    with pytest.raises(ValueError, match=message):
        NetworkConfig(**config)
