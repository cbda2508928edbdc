"""A rule that is the same for every weight: from what is observed at a state to a step.

A network that tells weights apart by their place learns the tasks that it was trained on; one that sees
of a weight only what any weight might have, its value, its gradient and what kind of layer it is in,
learns to descend, and does so on tasks unlike any before. It is a learned optimizer whose steps are as
long as many of an optimizer's.
"""

from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.codec import leaf_features
from lohp_jax.networks.policy import Heads
from lohp_jax.types import Codec, View, Windows
from lohp_jax.windows import numbers_in

_EMBEDDING = 8
_DESCENT = 0.3
"""Root mean square of the step along the negative gradient that the untrained rule takes. The trained
one says its logarithm: near a solution steps become as many times shorter as the loss does."""
_LOG_LONGEST = 2.0
"""Largest logarithm of a step over that of the untrained rule."""


class Observation(NamedTuple):
    """What is seen of a task at one state; zeros where that is not finite.

    Attributes:
      gradient: `[length, channels]` of the context loss by the tokens, over its root mean square; zeros
        for a policy that sees the loss alone.
      means: `[3]` over all weights: q, the mean of the squared state, as log(1 + q); that of the state
        times the gradient, over sqrt(1 + q); and that of the absolute gradient. None grows faster than
        the state, which a rule that is fed back could not bear.
      log_rms: scalar, log of that root mean square.
      log_loss: scalar, log of the context loss.
      usable: 1.0 if loss and gradient are finite, else 0.0.
    """

    gradient: jax.Array
    means: jax.Array
    log_rms: jax.Array
    log_loss: jax.Array
    usable: jax.Array


class Known(NamedTuple):
    """What is known of weights before any task.

    Attributes:
      leaf: `[length, F]` features of the leaf that each token is of.
      start: `[length, channels]` tokens of theta_0, scaled to about 1.
    """

    leaf: jax.Array
    start: jax.Array


def make_rule(*, widths: tuple[int, ...], num_steps: int, forgotten: float = 0.0) -> hk.Transformed:
    """Builds the rule as a Haiku pair of `init` and `apply`.

    Args:
      widths: of the hidden layers that all weights share.
      num_steps: N; each step has an embedding of its own.
      forgotten: the share of the state that the kernel leaves out of the mean of the next one.

    Returns: `init(key, *seen) -> params` and `apply(params, *seen) -> Heads` with `seen` an
      `Observation`, what is `Known`, the trust in the condition that walks beside it (scalar in [0, 1]),
      the step (int32 scalar) and the state `[length, channels]`, all of the same weights.
    """

    def rule(
        seen: Observation, known: Known, trust: jax.Array, step: jax.Array, state: jax.Array
    ) -> Heads:
        g = seen.gradient
        own = [state, g, jnp.sign(g) * jnp.sqrt(jnp.abs(g)), jnp.abs(g), known.start]
        own = jnp.stack(own, axis=-1)
        common = jnp.stack([seen.log_rms, seen.log_loss, trust])
        step = hk.Embed(num_steps, _EMBEDDING, name="step")(step)
        common = jnp.concatenate([common, seen.means, step])
        first, *others = widths
        h = hk.Linear(first, name="weight")(own)  # one layer by parts: no [D, F] of repeats
        h += hk.Linear(first, with_bias=False, name="leaf")(known.leaf)[:, None]
        h += hk.Linear(first, with_bias=False, name="task")(common)[None, None]
        for width in others:
            h = hk.Linear(width)(jax.nn.relu(h))
        out = hk.Linear(5, w_init=jnp.zeros, name="output")(jax.nn.relu(h))
        drift, log_std, backward_drift, backward_log_std, descent = jnp.moveaxis(out, -1, 0)
        drift += (1 - trust) * forgotten * state  # alone, it goes on from where it is
        descent = _DESCENT * jnp.exp(jnp.minimum(descent, _LOG_LONGEST))
        return Heads(drift - descent * g, log_std, backward_drift, backward_log_std)

    return hk.without_apply_rng(hk.transform(rule))


def known_of(
    codec: Codec, start: jax.Array, windows: Windows | None = None, view: View | None = None
) -> Known:
    """What is known of all weights, or of those of a window.

    Args:
      codec: of the network.
      start: `[length, channels]` tokens of theta_0, scaled to about 1.
      windows: of the tokens.
      view: the window; None for all of them.
    """
    if view is None:  # without the place in it
        return Known(jnp.asarray(codec.features[:, :-1]), jnp.asarray(start))
    of_leaf = jnp.asarray(leaf_features(codec.leaves))
    return Known(of_leaf[numbers_in(windows, view.index).leaf], view.start)


def blank_known(codec: Codec) -> Known:
    """What is known of one token at zeros."""
    return Known(leaf_features(codec.leaves)[:1], np.zeros((1, codec.mask.shape[1]), np.float32))


def blank_observation(length: int, channels: int) -> Observation:
    """An observation of zeros."""
    zero = np.zeros((), np.float32)
    gradient, means = np.zeros((length, channels), np.float32), np.zeros(3, np.float32)
    return Observation(gradient, means, zero, zero, zero)
