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

from lohp_jax.networks.policy import Heads
from lohp_jax.types import Codec

_EMBEDDING = 8
_DESCENT = 0.3
"""Root mean square of the step along the negative gradient that the untrained rule takes."""


class Observation(NamedTuple):
    """What is seen of a task at one state; zeros where that is not finite.

    Attributes:
      gradient: `[length, channels]` of the context loss by the tokens, over its root mean square; zeros
        for a policy that sees the loss alone.
      log_rms: scalar, log of that root mean square.
      log_loss: scalar, log of the context loss.
      usable: 1.0 if loss and gradient are finite, else 0.0.
    """

    gradient: jax.Array
    log_rms: jax.Array
    log_loss: jax.Array
    usable: jax.Array


def make_rule(
    codec: Codec,
    start: jax.Array,
    *,
    widths: tuple[int, ...],
    num_steps: int,
    forgotten: float = 0.0,
) -> hk.Transformed:
    """Builds the rule as a Haiku pair of `init` and `apply`.

    Args:
      codec: of the generated network.
      start: `[length, channels]` tokens of theta_0, scaled to about 1.
      widths: of the hidden layers that all weights share.
      num_steps: N; each step has an embedding of its own.
      forgotten: the share of the state that the kernel leaves out of the mean of the next one.

    Returns: `init(key, *seen) -> params` and `apply(params, *seen) -> Heads` with `seen` an
      `Observation`, the trust in the condition that walks beside it (scalar in [0, 1]), the step (int32
      scalar) and the state `[length, channels]`.
    """
    of_leaf = jnp.asarray(codec.features[:, :-1])  # without the place in it
    num_weights = int(codec.mask.sum())

    def mean(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(codec.mask, values, 0.0)) / num_weights

    def rule(seen: Observation, trust: jax.Array, step: jax.Array, state: jax.Array) -> Heads:
        g = seen.gradient
        own = jnp.stack([state, g, jnp.sign(g) * jnp.sqrt(jnp.abs(g)), jnp.abs(g), start], axis=-1)
        means = [mean(state**2), mean(state * g), mean(jnp.abs(g))]
        common = jnp.stack([seen.log_rms, seen.log_loss, trust, *means])
        common = jnp.concatenate([common, hk.Embed(num_steps, _EMBEDDING, name="step")(step)])
        first, *others = widths
        h = hk.Linear(first, name="weight")(
            own
        )  # one layer over all, by parts: no [D, F] of repeats
        h += hk.Linear(first, with_bias=False, name="leaf")(of_leaf)[:, None]
        h += hk.Linear(first, with_bias=False, name="task")(common)[None, None]
        for width in others:
            h = hk.Linear(width)(jax.nn.silu(h))
        out = hk.Linear(5, w_init=jnp.zeros, name="output")(jax.nn.silu(h))
        drift, log_std, backward_drift, backward_log_std, descent = jnp.moveaxis(out, -1, 0)
        drift += (1 - trust) * forgotten * state  # alone, it goes on from where it is
        return Heads(drift - (descent + _DESCENT) * g, log_std, backward_drift, backward_log_std)

    return hk.without_apply_rng(hk.transform(rule))


def blank_observation(codec: Codec) -> Observation:
    """An observation of zeros."""
    zero = np.zeros((), np.float32)
    return Observation(np.zeros(codec.mask.shape, np.float32), zero, zero, zero)
