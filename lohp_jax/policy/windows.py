"""A policy of any size, one window after another.

Kernels, rewards and per-dimension residuals separate over weights, so a window under the same condition
is a trajectory of its own: it is trained on alone, and windows are walked in any order.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.policy.kernels import Policy
from lohp_jax.types import PyTree, View, Windows
from lohp_jax.windows import cut_tokens, join_tokens, numbers_in, take_tokens

TOKENS_AT_ONCE = 4096
"""Tokens whose windows are walked in one batch."""


def at_window(policy: Policy, view: View) -> Policy:
    """The policy of one window: states, kernels and losses are `[..., size, channels]`."""
    numbers = numbers_in(policy.windows, view.index)
    codec = dataclasses.replace(policy.codec, length=policy.windows.size, mask=numbers.real)

    def heads(*seen):
        return policy.network.heads(*seen, view)

    return policy._replace(network=policy.network._replace(heads=heads), codec=codec)


def views_of(policy: Policy, index: np.ndarray) -> View:
    """The windows of these numbers, `[...]`, made on the host."""
    index = np.asarray(index, np.int32)
    rows = [take_tokens(policy.windows, policy.start, i) for i in index.ravel()]
    shape = (*index.shape, policy.windows.size, policy.start.shape[1])
    return View(index, np.reshape(rows, shape))


def batch_of_windows(windows: Windows) -> int:
    """Windows that are walked at once."""
    return min(windows.count, max(1, TOKENS_AT_ONCE // windows.size))


def window_keys(key: jax.Array, index: jax.Array) -> jax.Array:
    """A key for each of the windows `[B]`, the same whichever are walked together."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(index)


def walk_all(
    policy: Policy, walk: Callable[[jax.Array, View], jax.Array], key: jax.Array
) -> jax.Array:
    """Walks every window, a batch at a time, and puts the states together.

    Args:
      policy: whose windows.
      walk: `(key, view) -> [S, size, channels]`.
      key: randomness of all windows.

    Returns: `[S, length, channels]`.
    """

    def one(view):
        return jnp.moveaxis(walk(window_keys(key, view.index[None])[0], view), 0, 1)

    return jnp.moveaxis(map_windows(policy, one), 1, 0)


def map_windows(policy: Policy, function: Callable[..., PyTree], *tokens: jax.Array) -> PyTree:
    """Applies a function to every window, a batch at a time, and puts what it returns together.

    Args:
      policy: whose windows.
      function: `(view, *pieces [size, ...]) -> pytree of [size, ...]`.
      *tokens: `[length, ...]`, cut into windows.

    Returns: pytree of `[length, ...]`.
    """
    windows = policy.windows
    views = View(jnp.arange(windows.count, dtype=jnp.int32), jnp.asarray(policy.start))
    cut = functools.partial(cut_tokens, windows)
    pieces = views._replace(start=cut(views.start)), *map(cut, tokens)
    batch = batch_of_windows(windows)
    out = jax.lax.map(lambda piece: function(*piece), pieces, batch_size=batch)
    return jax.tree.map(functools.partial(join_tokens, windows), out)
