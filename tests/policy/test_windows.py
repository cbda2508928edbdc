"""A policy walked and trained window by window is the policy of the whole network."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.codec import make_codec
from lohp_jax.methods.cloning import cloning_loss
from lohp_jax.methods.hypernetwork import regression_loss
from lohp_jax.methods.weight_diffusion import denoising_loss
from lohp_jax.networks.levels import level_features
from lohp_jax.networks.policy import NetworkConfig
from lohp_jax.policy import windows as policy_windows
from lohp_jax.policy.config import HybridConfig
from lohp_jax.policy.hybrid import hybrid_loss
from lohp_jax.policy.kernels import kernels_along, make_policy, roll_out
from lohp_jax.policy.windows import at_window, views_of, walk_all, window_keys
from lohp_jax.tasks.support import ImageSupport
from lohp_jax.types import Example, Space, TaskFamily, View
from lohp_jax.windows import cut_tokens, join_tokens, weights_in_windows

NUM_STEPS, NUM_CLASSES = 3, 3
KEY = jax.random.key(0)
AXES = {"body": {"w": -1}, "gain": -1, "head": {"b": 0, "w": 1}}
RNG = np.random.default_rng(0)
THETA_0 = {
    "body": {"w": RNG.normal(size=(4, 5)).astype(np.float32), "none": None},
    "gain": np.float32(1.0),
    "head": {
        "b": RNG.normal(size=(NUM_CLASSES,)).astype(np.float32),
        "w": RNG.normal(size=(5, NUM_CLASSES)).astype(np.float32),
    },
}
CODEC = make_codec(THETA_0, channels=3, class_axes=AXES | {"body": {"w": -1, "none": None}})
CONTEXT = {
    "x": RNG.uniform(size=(2 * NUM_CLASSES, 2, 2, 1)).astype(np.float32),
    "y": np.repeat(np.arange(NUM_CLASSES), 2),
}
FAMILY = TaskFamily(*(None,) * 5, support=ImageSupport(NUM_CLASSES, (2, 2, 1)))
SPACE = Space(FAMILY, CODEC, THETA_0, NUM_STEPS, 2, 0)
CERTAIN = HybridConfig(perturb=False, on_policy=0.0)
"""Without noise, so that losses can be compared."""


def make(size, config=CERTAIN, **options):
    network = NetworkConfig(widths=(8, 8), embedding=8, window=size)
    return make_policy(SPACE, network, config, **options)


def random_params(policy):
    shapes = jax.eval_shape(policy.network.init, KEY, CONTEXT)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: jnp.float32(rng.normal(0, 0.3, size=p.shape)), shapes)


PARAMS = random_params(make(2))


def random_walk(seed):
    tokens = np.random.default_rng(seed).normal(size=(NUM_STEPS + 1, *CODEC.mask.shape))
    return jnp.where(CODEC.mask, jnp.float32(tokens), 0.0)


TOKENS, STATES = random_walk(2), random_walk(3)


def whole(policy):
    """A policy over all tokens at once, whose network looks at every window."""

    def heads(params, embedding, teacher, step, state):
        views = View(jnp.arange(policy.windows.count), cut_tokens(policy.windows, policy.start))

        def at(state, view):
            return policy.network.heads(params, embedding, teacher, step, state, view)

        pieces = jax.vmap(at)(cut_tokens(policy.windows, state), views)
        return jax.tree.map(functools.partial(join_tokens, policy.windows), pieces)

    return policy._replace(network=policy.network._replace(heads=heads), windows=None)


def cut(policy, states):
    """`[T, length, channels]` -> `[count, T, size, channels]`."""
    return jnp.moveaxis(jax.vmap(functools.partial(cut_tokens, policy.windows))(states), 0, 1)


def example_of(tokens=TOKENS, view=None):
    return Example(tokens, jnp.int32(1), CONTEXT, None, view)


@pytest.mark.parametrize("backward", ["bridge", "learned"])
@pytest.mark.parametrize("size", [2, 4])
def test_kernels_along_windows_equal_kernels_along_the_whole(size, backward):
    """The whole seen through one window over all that stands together, of the same weights."""
    config = dataclasses.replace(CERTAIN, backward=backward)
    policy, largest = make(size, config), make(8, config)
    embedding = policy.network.encode(PARAMS, CONTEXT, 1.0)
    along = jax.jit(lambda s: kernels_along(whole(largest), PARAMS, embedding, example_of(), s))

    @jax.jit
    def along_window(tokens, states, view):
        example = example_of(tokens, view)
        return kernels_along(at_window(policy, view), PARAMS, embedding, example, states)

    expected = jax.tree.map(functools.partial(cut, policy), along(STATES))
    views = views_of(policy, np.arange(policy.windows.count))
    for i, (tokens, states) in enumerate(
        zip(cut(policy, TOKENS), cut(policy, STATES), strict=True)
    ):
        view = jax.tree.map(lambda leaf, i=i: leaf[i], views)
        real = np.asarray(at_window(policy, view).codec.mask)
        for actual, wanted in zip(
            jax.tree.leaves(along_window(tokens, states, view)),
            jax.tree.leaves(jax.tree.map(lambda leaf, i=i: leaf[i], expected)),
            strict=True,
        ):
            np.testing.assert_allclose(actual[:, real], wanted[:, real], rtol=1e-5, atol=1e-5)


LOSSES = {
    "balance": (hybrid_loss, {}),
    "balance, learned P_B": (hybrid_loss, {"backward": "learned"}),
    "cloning": (cloning_loss, {}),
    "regression": (regression_loss, {}),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [2, 8])
def test_the_mean_over_windows_by_their_weights_is_the_loss_of_the_whole(size, name):
    """So a window that is drawn as often as it has weights gives an unbiased gradient."""
    loss, settings = LOSSES[name]
    policy = make(size, dataclasses.replace(CERTAIN, **settings))
    one = jax.value_and_grad(lambda p: loss(whole(policy), p, example_of(), KEY)[0])
    expected, expected_gradient = jax.jit(one)(PARAMS)
    views = views_of(policy, np.arange(policy.windows.count))
    share = weights_in_windows(policy.windows) / CODEC.mask.sum()

    def mean_loss(params):
        def of_window(tokens, view):
            return loss(at_window(policy, view), params, example_of(tokens, view), KEY)[0]

        return jnp.float32(share) @ jax.vmap(of_window)(cut(policy, TOKENS), views)

    actual, gradient = jax.jit(jax.value_and_grad(mean_loss))(PARAMS)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("loss", [hybrid_loss, denoising_loss])
def test_padding_has_no_part_in_the_loss(loss):
    features = level_features if loss is denoising_loss else None
    policy = make(8, HybridConfig(on_policy=0.1), step_features=features)
    params = random_params(policy)
    last = policy.windows.count - 1  # 6 weights of a label and 18 numbers of padding
    view = jax.tree.map(lambda leaf: leaf[0], views_of(policy, np.array([last])))

    @jax.jit
    def run(tokens, start):
        seen = view._replace(start=start)
        return loss(at_window(policy, seen), params, example_of(tokens, seen), KEY)[0]

    tokens, real = cut(policy, TOKENS)[last], np.asarray(at_window(policy, view).codec.mask)
    assert real.sum() == 6
    base = run(tokens, view.start)
    moved = run(tokens.at[1:, 0, 0].add(1.0), view.start)
    assert np.isfinite(base) and abs(moved - base) > 1e-4
    beyond = np.arange(len(real)) >= 4  # groups of two tokens that hold nothing
    np.testing.assert_array_equal(run(tokens, jnp.where(beyond[:, None], 9.0, view.start)), base)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_all_windows_are_walked_each_on_its_own(temperature, monkeypatch):
    policy = make(2)
    embedding = policy.network.encode(PARAMS, CONTEXT, 1.0)

    def walk(key, view):
        options = {"temperature": temperature}
        return roll_out(at_window(policy, view), PARAMS, embedding, jnp.int32(1), key, **options)

    together = jax.jit(lambda: walk_all(policy, walk, KEY))()
    assert together.shape == (NUM_STEPS + 1, *CODEC.mask.shape)
    index = np.arange(policy.windows.count)
    keys, views = window_keys(KEY, index), views_of(policy, index)
    alone = jax.jit(jax.vmap(walk))(keys, views)
    np.testing.assert_allclose(cut(policy, together), alone, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(
        policy_windows, "TOKENS_AT_ONCE", 6
    )  # batches of 3 do not divide 10 windows
    assert policy_windows.batch_of_windows(policy.windows) == 3
    batched = jax.jit(lambda: walk_all(policy, walk, KEY))()
    np.testing.assert_allclose(batched, together, rtol=1e-5, atol=1e-6)
    if not temperature:
        expected = roll_out(whole(policy), PARAMS, embedding, jnp.int32(1), KEY, temperature=0.0)
        np.testing.assert_allclose(together, expected, rtol=1e-5, atol=1e-5)


def test_views_hold_the_start_of_their_windows():
    policy = make(2)
    unit = jax.tree.map(lambda p: p / np.sqrt(np.mean(p**2)), THETA_0)
    expected = cut_tokens(policy.windows, CODEC.lay_out(unit))
    views = views_of(policy, np.array([[3, 1, 0], [9, 4, 4]]))
    assert views.index.dtype == np.int32 and views.start.shape == (2, 3, 2, 3)
    np.testing.assert_allclose(views.start, expected[views.index], rtol=1e-6)
