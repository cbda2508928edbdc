"""The network over windows: what it says of a token depends on the token, not on the window."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.codec import make_codec
from lohp_jax.networks.policy import Heads, NetworkConfig
from lohp_jax.networks.windows import TOKEN_VECTOR, make_window_network
from lohp_jax.tasks.support import ImageSupport, SetSupport
from lohp_jax.types import View
from lohp_jax.windows import cut_tokens, join_tokens, make_windows

NUM_STEPS, NUM_CLASSES = 2, 3
AXES = {"body": {"w": -1}, "gain": -1, "head": {"b": 0, "w": 1}}
RNG = np.random.default_rng(0)
WEIGHTS = {
    "body": {"w": RNG.normal(size=(4, 5)).astype(np.float32)},
    "gain": np.float32(1.0),
    "head": {
        "b": RNG.normal(size=(NUM_CLASSES,)).astype(np.float32),
        "w": RNG.normal(size=(5, NUM_CLASSES)).astype(np.float32),
    },
}
CODEC = make_codec(WEIGHTS, channels=3, class_axes=AXES)  # 8 shared tokens, 3 of each label
FLAT_CODEC = make_codec(WEIGHTS, channels=3)
CONTEXT = {
    "x": RNG.uniform(size=(2 * NUM_CLASSES, 2, 2, 1)).astype(np.float32),
    "y": np.repeat(np.arange(NUM_CLASSES), 2),
}
SUPPORT = ImageSupport(NUM_CLASSES, (2, 2, 1))
POINTS = {name: RNG.normal(size=(5, 1)).astype(np.float32) for name in ("x", "y")}
STATE = RNG.normal(size=CODEC.mask.shape).astype(np.float32)


def make(codec=CODEC, size=2, start=None, support=SUPPORT, step_features=None, **config):
    """The windows and the network over them."""
    windows = make_windows(codec, size)
    start = np.zeros(codec.mask.shape, np.float32) if start is None else np.asarray(start)
    config = NetworkConfig(**{"widths": (8, 8), "embedding": 8, "window": size, **config})
    network = make_window_network(
        windows,
        config,
        start,
        encoder=support.encode(config.embedding),
        inputs=support.inputs,
        num_steps=NUM_STEPS,
        num_teachers=2,
        step_features=step_features,
    )
    return windows, start, network


def random_params(network, context=CONTEXT, seed=0):
    shapes = jax.eval_shape(network.init, jax.random.key(0), context)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: rng.normal(0, 0.3, size=p.shape).astype(np.float32), shapes)


def compiled(windows, start, network, like=CONTEXT):
    """`(context, keep=1, teacher=0, step=0, state=STATE, start=start) -> Heads [length, channels]`."""
    params = random_params(network, like)

    @jax.jit
    def run(context, keep, teacher, step, state, start):
        seen = network.encode(params, context, keep)
        views = View(jnp.arange(windows.count), cut_tokens(windows, start))

        def at(state, view):
            return network.heads(params, seen, teacher, step, state, view)

        pieces = jax.vmap(at)(cut_tokens(windows, state), views)
        return jax.tree.map(lambda piece: join_tokens(windows, piece), pieces)

    def call(context=like, keep=1.0, teacher=0, step=0, state=STATE, start=start):
        return run(context, keep, teacher, step, state, start)

    return call


@pytest.fixture(scope="module")
def heads():
    return compiled(*make())


def difference(a, b):
    return max(np.abs(x - y).max() for x, y in zip(a, b, strict=True))


def own_rows(tokens):
    return np.asarray(tokens)[CODEC.shared_length :].reshape(NUM_CLASSES, -1, tokens.shape[-1])


@pytest.mark.parametrize("codec, largest", [(CODEC, 8), (FLAT_CODEC, 14)])
def test_the_size_of_the_window_does_not_matter(codec, largest):
    """One window over everything that stands together, against many; the same weights fit all."""
    start = np.asarray(codec.encode(WEIGHTS))
    state = RNG.normal(size=codec.mask.shape).astype(np.float32)
    whole = compiled(*make(codec, largest, start=start))(state=state)
    assert np.abs(whole.drift).max() > 0.1
    for size in (2, 4, 6):
        pieces = compiled(*make(codec, size, start=start))(state=state)
        for actual, expected in zip(pieces, whole, strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_heads_and_log_coefficient_start_at_zero():
    windows, start, network = make(start=CODEC.encode(WEIGHTS))
    params = jax.jit(network.init)(jax.random.key(0), CONTEXT)
    seen = network.encode(params, CONTEXT, 1.0)
    view = View(jnp.int32(3), cut_tokens(windows, start)[3])
    for head in network.heads(params, seen, 0, 0, jnp.ones((2, 3)), view):
        np.testing.assert_array_equal(head, np.zeros((2, 3)))
    np.testing.assert_array_equal(network.log_coefficient(params), np.zeros(NUM_STEPS + 1))


def test_each_input_changes_every_head(heads):
    base = heads()
    for name, changed in {
        "context": heads(context=CONTEXT | {"x": 1 - CONTEXT["x"]}),
        "keep": heads(keep=0.0),
        "teacher": heads(teacher=1),
        "step": heads(step=1),
        "state": heads(state=STATE + 1),
        "start": heads(start=np.ones_like(STATE)),
    }.items():
        for head, values in zip(Heads._fields, changed, strict=True):
            assert np.abs(values - getattr(base, head)).max() > 1e-3, (name, head)


def test_every_token_is_told_apart_from_the_others(heads):
    """By its place alone: state and start are the same everywhere."""
    same = np.ones_like(STATE)
    drift = np.asarray(heads(state=same, start=same).drift)
    rows = np.concatenate([drift[: CODEC.shared_length], own_rows(drift)[0]])
    apart = np.abs(rows[:, None] - rows[None]).max(axis=-1)
    assert apart[~np.eye(len(rows), dtype=bool)].min() > 1e-3


def test_without_keep_nothing_depends_on_the_context(heads):
    other = CONTEXT | {"x": 1 - CONTEXT["x"], "y": CONTEXT["y"][::-1]}
    assert difference(heads(context=other), heads()) > 1e-3
    assert difference(heads(context=other, keep=0.0), heads(keep=0.0)) == 0


def test_permuting_labels_and_blocks_permutes_the_heads(heads):
    """Where theta_0 gives the labels no names: shared tokens stay, those of the labels move."""
    order = np.array([2, 0, 1])  # label c of the base is called order[c]
    base, state = heads(), STATE.copy()
    state[CODEC.shared_length :] = own_rows(STATE)[np.argsort(order)].reshape(-1, 3)
    moved = heads(context=CONTEXT | {"y": order[CONTEXT["y"]]}, state=state)
    for head, before in zip(moved, base, strict=True):
        shared = slice(CODEC.shared_length)
        np.testing.assert_allclose(head[shared], before[shared], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(own_rows(head)[order], own_rows(before), rtol=1e-4, atol=1e-4)


def test_a_start_that_differs_between_labels_names_them_to_shared_tokens():
    call = compiled(*make(start=CODEC.encode(WEIGHTS)))
    order = np.array([2, 0, 1])
    renamed = call(context=CONTEXT | {"y": order[CONTEXT["y"]]})
    shared = slice(CODEC.shared_length)
    assert np.abs(renamed.drift[shared] - call().drift[shared]).max() > 1e-3


@pytest.mark.parametrize("codec", [CODEC, FLAT_CODEC])
def test_the_inputs_that_a_weight_multiplies_stand_beside_it(codec):
    """Only through them does pixel p reach a network whose encoder sees nothing."""
    windows, start, network = make(codec)
    params = random_params(network)
    params["encoder"] = jax.tree.map(np.zeros_like, params["encoder"])
    state = np.zeros(codec.mask.shape, np.float32)

    @jax.jit
    def drift(context):
        seen = network.encode(params, context, 1.0)
        views = View(jnp.arange(windows.count), cut_tokens(windows, start))

        def at(state, view):
            return network.heads(params, seen, 0, 0, state, view).drift

        return join_tokens(windows, jax.vmap(at)(cut_tokens(windows, state), views))

    brighter = CONTEXT["x"].copy()
    brighter[:, 1, 1] += 0.5  # of all labels alike: the fourth row of body's w, numbers 15 to 19
    moved = np.abs(drift(CONTEXT | {"x": brighter}) - drift(CONTEXT)).max(axis=-1) > 1e-4
    touched = np.zeros(codec.length, bool)
    touched[5:7] = True  # tokens of three numbers
    touched[4] = True  # meets token 5 where the resolution is halved
    touched[7] = True  # meets token 6
    np.testing.assert_array_equal(moved, touched)


def test_contexts_without_labels_are_read():
    call = compiled(*make(support=SetSupport(POINTS)), like=POINTS)
    base = call(state=np.zeros_like(STATE))
    rows = own_rows(base.drift)
    np.testing.assert_allclose(rows[1:], np.stack([rows[0]] * 2), rtol=1e-5)
    moved = call(context=POINTS | {"y": POINTS["y"] + 1}, state=np.zeros_like(STATE))
    assert difference(moved, base) > 1e-3


def test_a_step_is_known_by_its_features_if_there_are_any():
    call = compiled(*make(step_features=lambda level: jnp.stack([level, level**2])))
    assert difference(call(step=0.7), call(step=0.5)) > 1e-3


def sized(side):
    """A network of two layers, `side` wide, and the parameters over windows of it."""
    weights = {"a": {"w": (4, side)}, "b": {"w": (side, side)}, "head": {"w": (side, NUM_CLASSES)}}
    shapes = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        weights,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    axes = {"a": {"w": -1}, "b": {"w": -1}, "head": {"w": 1}}
    codec = make_codec(shapes, channels=16, class_axes=axes)
    _, _, network = make(codec, 4, widths=(8, 16))
    return codec, network, jax.eval_shape(network.init, jax.random.key(0), CONTEXT)


def test_only_a_small_vector_a_token_grows_with_the_network():
    """Nor do labels multiply it: those of one label serve all."""
    (small, _, few), (large, _, many) = sized(32), sized(320)
    assert large.length > 50 * small.length
    sizes = [
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}
        for params in (few, many)
    ]
    differ = [name for name in sizes[0] if sizes[0][name] != sizes[1][name]]
    assert len(differ) == 1
    own = (large.length - large.shared_length) // NUM_CLASSES
    assert sizes[1][differ[0]] == (large.shared_length + own, TOKEN_VECTOR)


def test_temporaries_of_a_window_do_not_grow_with_the_network():
    def temporaries(side):
        _, network, params = sized(side)
        seen = jax.eval_shape(network.encode, params, CONTEXT, 1.0)
        state = jax.ShapeDtypeStruct((4, 16), jnp.float32)
        view = View(jax.ShapeDtypeStruct((), jnp.int32), state)
        lowered = jax.jit(lambda *args: network.heads(*args[:2], 0, 0, *args[2:])).lower(
            params, seen, state, view
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    small, large = temporaries(32), temporaries(320)
    assert small > 0 and large <= 1.1 * small


@pytest.mark.parametrize(
    "config, message",
    [
        ({"window": 0}, "window must be a positive multiple of 2, .*got 0"),
        ({"window": -2}, "window must be a positive multiple of 2, .*got -2"),
        ({"window": 3}, "window must be a positive multiple of 2, by which 2 widths .*got 3"),
        ({"window": 4, "trunk": "mlp"}, "window needs trunk='unet', got 'mlp'"),
    ],
)
def test_a_bad_window_says_what_is_wrong(config, message):
    with pytest.raises(ValueError, match=message):
        NetworkConfig(**{"widths": (8, 8), **config})
