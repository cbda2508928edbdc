"""The policy's kernels: a network that looks at states, and the Gaussians its outputs stand for.

The policy walks in N steps along a stored optimizer trajectory z_0..z_N (tokens of every k-th state).
Around it lies a tube, N(z_m, tau_m^2); see `lohp_jax.policy.gaussian`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.codec import root_mean_square
from lohp_jax.networks.policy import Heads, NetworkConfig, PolicyNetwork, make_policy_network
from lohp_jax.networks.windows import make_window_network
from lohp_jax.policy import gaussian
from lohp_jax.policy.config import HybridConfig
from lohp_jax.tasks.support import support_of
from lohp_jax.types import Codec, Example, PyTree, Space, Windows
from lohp_jax.windows import make_windows


class Policy(NamedTuple):
    """A network together with the kernels that its outputs stand for.

    Attributes:
      network: the network.
      codec: tokens to weights.
      config: the objective that fixes the kernels.
      num_steps: N.
      keep: `(key) -> keep`, draws what `network.encode` is told to keep of an example in training; None
        for 0 with the probability of `condition_dropout` and 1 otherwise.
      windows: how the network sees tokens; None for all at once.
      start: `[length, channels]` tokens of theta_0, scaled to about 1.
    """

    network: PolicyNetwork
    codec: Codec
    config: HybridConfig
    num_steps: int
    keep: Callable[[jax.Array], PyTree] | None = None
    windows: Windows | None = None
    start: np.ndarray | None = None


def make_policy(
    space: Space,
    network: NetworkConfig,
    config: HybridConfig,
    *,
    num_steps: int | None = None,
    step_features: Callable[[jax.Array], jax.Array] | None = None,
) -> Policy:
    """Builds the policy of a space.

    Args:
      space: where it walks.
      network: sizes of the network.
      config: the objective that fixes the kernels.
      num_steps: N; None for that of the space.
      step_features: of `make_policy_network`.
    """
    support = support_of(space.family)
    num_steps = space.num_steps if num_steps is None else num_steps
    start, windows = unit_start(space), None
    parts = {"encoder": support.encode(network.embedding), "inputs": support.inputs}
    parts |= {"num_teachers": space.num_teachers, "step_features": step_features}
    if network.window is None:
        built = make_policy_network(space.codec, network, start, num_steps=num_steps, **parts)
    else:
        windows, start = make_windows(space.codec, network.window), np.asarray(start)
        built = make_window_network(windows, network, start, num_steps=num_steps, **parts)
    return Policy(built, space.codec, config, num_steps, windows=windows, start=start)


def unit_start(space: Space) -> jax.Array:
    """`[length, channels]` tokens of theta_0, every leaf scaled to a root mean square of 1."""

    def scaled(p):
        return p / jnp.maximum(root_mean_square(p), jnp.finfo(p.dtype).tiny)

    return space.codec.lay_out(jax.tree.map(scaled, space.theta_0))


class Kernel(NamedTuple):
    """Gaussian over states: `mean` and `log_std`, `[length, channels]`."""

    mean: jax.Array
    log_std: jax.Array


def widths(policy: Policy) -> jax.Array:
    """`[N + 1]` width of the tube at each step."""
    return gaussian.tube_std(policy.num_steps, policy.config.start_std, policy.config.end_std)


def embed(policy: Policy, params: PyTree, context: PyTree, key: jax.Array) -> PyTree:
    """Embedding of a context in training, now and then that of no context at all."""
    if policy.keep is None:
        kept = jax.random.bernoulli(key, 1 - policy.config.condition_dropout).astype(jnp.float32)
    else:
        kept = policy.keep(key)
    return policy.network.encode(params, context, kept)


def forward_kernel(policy: Policy, heads: Heads, step: jax.Array, state: jax.Array) -> Kernel:
    """P_F(s_{m+1} | s_m): the network's drift on top of the tube's contraction of the state.

    The bridge of the tube is N(z_{m+1} + a (s_m - z_m), tau_{m+1}^2 (1 - rho^2)) with
    a = rho tau_{m+1} / tau_m; the mean here is a s_m + drift, so the network is left to say
    z_{m+1} - a z_m, and an error of the state shrinks by a at every step. A learned P_B knows no
    bridge, and the mean is s_m + drift.
    """
    rho, tau = policy.config.correlation, widths(policy)
    keep = rho * tau[step + 1] / tau[step] if policy.config.backward == "bridge" else 1.0
    base = jnp.log(tau[step + 1]) + 0.5 * np.log1p(-(rho**2))
    log_std = gaussian.bounded_log_std(heads.log_std, base, policy.config.log_std_range)
    return Kernel(keep * state + heads.drift, log_std)


def backward_kernel(
    policy: Policy,
    heads: Heads,
    step: jax.Array,
    next_state: jax.Array,
    center: jax.Array,
    next_center: jax.Array,
) -> Kernel:
    """P_B(s_m | s_{m+1}): the tube's bridge, or the network's backward head."""
    config, tau = policy.config, widths(policy)
    if config.backward == "bridge":
        mean, log_std = gaussian.bridge_backward(
            next_state, center, next_center, tau[step], tau[step + 1], config.correlation
        )
        return Kernel(mean, jnp.broadcast_to(log_std, mean.shape))
    log_std = gaussian.bounded_log_std(
        heads.backward_log_std, jnp.log(tau[step]), config.log_std_range
    )
    return Kernel(next_state + heads.backward_drift, log_std)


def roll_out(
    policy: Policy,
    params: PyTree,
    embedding: PyTree,
    teacher: jax.Array,
    key: jax.Array,
    *,
    temperature: jax.Array | float,
    num_steps: int | None = None,
    unconditional: PyTree | None = None,
    guidance: float = 0.0,
) -> jax.Array:
    """Walks the forward policy from its prior; one `lax.scan`.

    Args:
      policy: the policy.
      params: of its network.
      embedding: of the context.
      teacher: int32 scalar, the kind of trajectory to imitate.
      key: randomness of start and steps.
      temperature: factor of every standard deviation, the prior's included; 0 follows the means.
      num_steps: how many of the N steps to take; None for all.
      unconditional: embedding without context; with `guidance` g the drift becomes
        (1 + g) drift - g drift_unconditional (Ho and Salimans, 2022).
      guidance: g.

    Returns: `[num_steps + 1, length, channels]` states.

    Raises: ValueError for a `num_steps` that is not between 1 and N.
    """
    if num_steps is not None and not 1 <= num_steps <= policy.num_steps:
        raise ValueError(
            f"roll_out: num_steps must be between 1 and {policy.num_steps}, got {num_steps}."
        )
    count = policy.num_steps if num_steps is None else num_steps
    keys = jax.random.split(key, count + 1)
    shape = policy.codec.mask.shape
    start = temperature * policy.config.start_std * jax.random.normal(keys[0], shape)
    start = jnp.where(policy.codec.mask, start, 0.0)

    def step(state, inputs):
        index, step_key = inputs
        heads = policy.network.heads(params, embedding, teacher, index, state)
        if guidance:
            free = policy.network.heads(params, unconditional, teacher, index, state)
            heads = heads._replace(drift=heads.drift + guidance * (heads.drift - free.drift))
        kernel = forward_kernel(policy, heads, index, state)
        drawn = gaussian.sample(step_key, kernel.mean, kernel.log_std, temperature)
        next_state = jnp.where(policy.codec.mask, drawn, 0.0)
        return next_state, next_state

    _, states = jax.lax.scan(step, start, (jnp.arange(count), keys[1:]))
    return jnp.concatenate([start[None], states])


def tube_states(policy: Policy, tokens: jax.Array, key: jax.Array) -> jax.Array:
    """States drawn around the stored ones, each with the tube's width at its step."""
    if not policy.config.perturb:
        return tokens
    noise = jax.random.normal(key, tokens.shape) * widths(policy)[:, None, None]
    return jnp.where(policy.codec.mask[None], tokens + noise, 0.0)


def kernels_along(
    policy: Policy, params: PyTree, embedding: PyTree, example: Example, states: jax.Array
) -> tuple[Kernel, Kernel]:
    """Forward and backward kernels of every step of `states` `[N + 1, length, channels]`.

    One batched call of the network, and a second one for a learned P_B, which is given s_{m+1} and
    must not see s_m; kernels have a leading axis N.
    """
    steps = jnp.arange(policy.num_steps)

    def heads_at(states):
        return jax.vmap(policy.network.heads, (None, None, None, 0, 0))(
            params, embedding, example.teacher, steps, states
        )

    heads = heads_at(states[:-1])
    forward = jax.vmap(lambda h, m, s: forward_kernel(policy, h, m, s))(heads, steps, states[:-1])
    if policy.config.backward == "learned":
        heads = heads_at(states[1:])
    backward = jax.vmap(lambda h, m, s, z, z_next: backward_kernel(policy, h, m, s, z, z_next))(
        heads, steps, states[1:], example.tokens[:-1], example.tokens[1:]
    )
    return forward, backward


def real_weights(policy: Policy, tokens: jax.Array) -> jax.Array:
    """`[T, length, channels]` -> `[T, D]`, without the padding; that of a window stays."""
    flat = tokens.reshape(len(tokens), -1)
    return flat if _is_window(policy) else flat[:, np.flatnonzero(policy.codec.mask)]


def mean_over_weights(policy: Policy, values: jax.Array, axis: int) -> jax.Array:
    """The mean along an axis of weights, as `real_weights` has them, or of size 1."""
    if not _is_window(policy):
        return jnp.mean(values, axis=axis)
    real = policy.codec.mask.reshape(
        [-1 if i == axis % values.ndim else 1 for i in range(values.ndim)]
    )
    return jnp.sum(jnp.where(real, values, 0.0), axis=axis) / real.sum()


def _is_window(policy: Policy) -> bool:
    """Whether this is a policy of one window, of `at_window`, whose padding is only known to jax."""
    return not isinstance(policy.codec.mask, np.ndarray)
