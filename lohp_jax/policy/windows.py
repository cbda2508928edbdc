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
    policy: Policy, walk: Callable[[jax.Array, View], PyTree], key: jax.Array
) -> jax.Array:
    """Walks every window, a batch at a time, and puts the states together.

    Args:
      policy: whose windows.
      walk: `(key, view) -> [S, size, channels]`.
      key: randomness of all windows.

    Returns: `[S, length, channels]`.
    """
    windows, batch = policy.windows, batch_of_windows(policy.windows)
    starts = cut_tokens(windows, jnp.asarray(policy.start))
    num_batches = -(-windows.count // batch)
    index = jnp.minimum(jnp.arange(num_batches * batch, dtype=jnp.int32), windows.count - 1)

    def some(index):
        return jax.vmap(walk)(window_keys(key, index), View(index, starts[index]))

    pieces = jax.lax.map(some, index.reshape(num_batches, batch))
    pieces = pieces.reshape(num_batches * batch, *pieces.shape[2:])[: windows.count]
    return jax.vmap(functools.partial(join_tokens, windows), 1)(pieces)
