"""Hybrid-policy sub-trajectory balance: Lo-Hp's objective, in a well-posed and in its literal form.

The policy walks in N steps along a stored optimizer trajectory z_0..z_N (tokens of every k-th state).
Its flow through step m is c_m R_m(s) with R_m(s) = exp(-|s - z_m|^2 / (2 tau_m^2)). Balance asks, of
every sub-trajectory m..n, that

    log c_m + log R_m(s_m) + sum log P_F(s_{t+1} | s_t)
        = log c_n + log R_n(s_n) + sum log P_B(s_t | s_{t+1}),

on states near the stored ones (off-policy) and on states the policy reaches (on-policy).
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.codec import Codec
from lohp_jax.networks.policy import Heads, PolicyNetwork
from lohp_jax.policy import balance, gaussian
from lohp_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class HybridConfig:
    """The objective. Widths are in units of the standardised weights."""

    reward: Literal["matched", "end"] = "matched"
    """"matched": R_m at both ends of a sub-trajectory; "end": as published, R_n at both."""
    backward: Literal["bridge", "learned"] = "bridge"
    """P_B: the bridge of the tube, or the network's backward head (as published)."""
    per_dimension: bool = True
    """One residual per weight; False sums them over the weights, as published."""
    start_std: float = 0.1
    """Width of the prior over starts and of the tube at step 0."""
    end_std: float = 0.1
    """Width of the tube at step N."""
    correlation: float = 0.5
    """Correlation of neighbouring states in the tube, in [0, 1)."""
    log_std_range: float = 0.3
    """The policy's log standard deviation stays within this of the bridge's."""
    perturb: bool = True
    """Draw the off-policy states from the tube; False takes the stored states themselves."""
    lambda_: float = 0.9
    """Weight ratio between sub-trajectories one step apart in length."""
    huber_delta: float | None = 1.0
    """Residual, in nats, beyond which its loss is linear; None squares all, as published."""
    off_policy: float = 1.0
    """Weight of the off-policy term."""
    on_policy: float = 0.01
    """Weight of the on-policy term; 0 leaves its roll-out out of the computation."""
    coefficient_penalty: float = 1e-3
    """Weight of the mean square of the learned log-coefficients."""
    condition_dropout: float = 0.0
    """Share of examples that are trained without their context, which guidance needs."""

    def __post_init__(self):
        for name, allowed in (("reward", ("matched", "end")), ("backward", ("bridge", "learned"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        for name in ("start_std", "end_std", "log_std_range", "lambda_"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if self.huber_delta is not None and not self.huber_delta > 0:
            raise ValueError(f"huber_delta must be positive or None, got {self.huber_delta}.")
        for name in ("correlation", "condition_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        for name in ("off_policy", "on_policy", "coefficient_penalty"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if not self.off_policy + self.on_policy > 0:
            raise ValueError("off_policy and on_policy must not both be zero.")


PRESETS = {
    "well_posed": HybridConfig(),
    "paper_literal": HybridConfig(
        reward="end",
        backward="learned",
        per_dimension=False,
        start_std=1.0,
        end_std=0.5**0.5,
        correlation=0.0,
        log_std_range=4.0,
        perturb=False,
        huber_delta=None,
        on_policy=1.0,
        coefficient_penalty=0.0,
    ),
}
"""`paper_literal` is kept for comparison, and falls far behind: `end` rewards cannot all be met, and a
learned P_B leaves the speed of the policy free, so that a lower loss need not mean better weights."""


class Policy(NamedTuple):
    """A network together with the kernels that its outputs stand for.

    Attributes:
      network: the network.
      codec: tokens to weights.
      config: the objective that fixes the kernels.
      num_steps: N.
    """

    network: PolicyNetwork
    codec: Codec
    config: HybridConfig
    num_steps: int


class Example(NamedTuple):
    """One stored trajectory as the objectives see it.

    Attributes:
      tokens: `[N + 1, length, channels]` the matched states.
      optimizer: int32 scalar, the kind of optimizer that made it.
      context: what the generator may see of the task.
      data: the task itself, for objectives that need its loss.
    """

    tokens: jax.Array
    optimizer: jax.Array
    context: dict
    data: PyTree


class Kernel(NamedTuple):
    """Gaussian over states: `mean` and `log_std`, `[length, channels]`."""

    mean: jax.Array
    log_std: jax.Array


def widths(policy: Policy) -> jax.Array:
    """`[N + 1]` width of the tube at each step."""
    return gaussian.tube_std(policy.num_steps, policy.config.start_std, policy.config.end_std)


def embed(policy: Policy, params: dict, context: dict, key: jax.Array) -> PyTree:
    """Embedding of a context in training, now and then that of no context at all."""
    keep = jax.random.bernoulli(key, 1 - policy.config.condition_dropout)
    return policy.network.encode(params, context, keep.astype(jnp.float32))


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
    params: dict,
    embedding: PyTree,
    optimizer: jax.Array,
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
      optimizer: int32 scalar, the kind of trajectory to imitate.
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
        heads = policy.network.heads(params, embedding, optimizer, index, state)
        if guidance:
            free = policy.network.heads(params, unconditional, optimizer, index, state)
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
    policy: Policy, params: dict, embedding: PyTree, example: Example, states: jax.Array
) -> tuple[Kernel, Kernel]:
    """Forward and backward kernels of every step of `states` `[N + 1, length, channels]`.

    One batched call of the network, and a second one for a learned P_B, which is given s_{m+1} and
    must not see s_m; kernels have a leading axis N.
    """
    steps = jnp.arange(policy.num_steps)

    def heads_at(states):
        return jax.vmap(policy.network.heads, (None, None, None, 0, 0))(
            params, embedding, example.optimizer, steps, states
        )

    heads = heads_at(states[:-1])
    forward = jax.vmap(lambda h, m, s: forward_kernel(policy, h, m, s))(heads, steps, states[:-1])
    if policy.config.backward == "learned":
        heads = heads_at(states[1:])
    backward = jax.vmap(lambda h, m, s, z, z_next: backward_kernel(policy, h, m, s, z, z_next))(
        heads, steps, states[1:], example.tokens[:-1], example.tokens[1:]
    )
    return forward, backward


def residuals(
    policy: Policy,
    params: dict,
    example: Example,
    states: jax.Array,
    forward: Kernel,
    backward: Kernel,
) -> jax.Array:
    """Balance residuals of every sub-trajectory of `states`.

    Matched rewards make c_m R_m the tube, up to the learned coefficient; those of the literal form
    have one width and no coefficient but the learned one.

    Args:
      policy: gives the widths, and the objective its form.
      params: of the network, for the learned coefficient.
      example: the stored trajectory.
      states: `[N + 1, length, channels]`.
      forward: P_F along the states, of `kernels_along`.
      backward: P_B along the states.

    Returns: `[D or 1, N + 1, N + 1]`, D the number of weights.
    """
    config = policy.config
    ratio = gaussian.log_ratio_per_dimension(states[:-1], states[1:], *forward, *backward)
    ratio, path, offline = (_weights(policy, x) for x in (ratio, states, example.tokens))
    tau, coefficient = widths(policy), policy.network.log_coefficient(params)
    if config.reward == "matched":
        variance, num_summed = tau**2, 1 if config.per_dimension else path.shape[1]
        coefficient += num_summed * gaussian.tube_log_coefficient(tau)
    else:
        variance = tau[-1] ** 2
    of_states = functools.partial(
        balance.lohp_residuals,
        log_coefficient=coefficient,
        variance=variance,
        compression=1,
        reward=config.reward,
    )
    if not config.per_dimension:
        return of_states(ratio.sum(axis=-1), path, offline)[None]
    return jax.vmap(of_states, in_axes=(1, 2, 2))(ratio, path[:, None], offline[:, None])


def _weights(policy: Policy, tokens: jax.Array) -> jax.Array:
    """`[T, length, channels]` -> `[T, D]`, without the padding."""
    return tokens.reshape(len(tokens), -1)[:, np.flatnonzero(policy.codec.mask)]


def hybrid_loss(
    policy: Policy, params: dict, example: Example, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The hybrid objective of one stored trajectory, off- plus on-policy.

    Returns: the loss (scalar) and diagnostics: `off_policy` and `on_policy` terms,
      `residual_by_length` `[N]`, `log_std` and `backward_log_std` `[N]` (of P_F and P_B, means over the
      weights, off-policy), `log_coefficient` `[N + 1]` and, with an on-policy term, the `progress` and
      `cosine` of the roll-out, see `displacement`.
    """
    config = policy.config
    example = example._replace(tokens=jax.lax.stop_gradient(example.tokens))
    drop_key, tube_key, roll_key = jax.random.split(key, 3)
    embedding = embed(policy, params, example.context, drop_key)

    loss_fn = functools.partial(
        balance.lohp_loss, lambda_=config.lambda_, huber_delta=config.huber_delta
    )
    paths = [tube_states(policy, example.tokens, tube_key)]
    if config.on_policy:
        frozen = jax.lax.stop_gradient((params, embedding))
        states = roll_out(policy, *frozen, example.optimizer, roll_key, temperature=1.0)
        paths.append(jax.lax.stop_gradient(states))

    def term(states):
        kernels = kernels_along(policy, params, embedding, example, states)
        by_weight = residuals(policy, params, example, states, *kernels)
        loss = jnp.mean(jax.vmap(loss_fn)(by_weight))
        length = jax.vmap(balance.residual_by_length)(by_weight).mean(axis=0)
        log_stds = [_weights(policy, kernel.log_std).mean(axis=-1) for kernel in kernels]
        return loss, length, *log_stds

    if config.on_policy:
        terms, *described = jax.vmap(term)(jnp.stack(paths))  # one call of the network for both
    else:  # no axis of size 1: jaxlib 0.10 crashes on its gradient on a CPU
        terms, *described = jax.tree.map(lambda x: x[None], term(paths[0]))
    names = ("residual_by_length", "log_std", "backward_log_std")
    coefficient = policy.network.log_coefficient(params)
    info = {name: values[0] for name, values in zip(names, described, strict=True)}
    info |= {"off_policy": terms[0], "log_coefficient": coefficient}
    penalty = config.coefficient_penalty * jnp.mean(coefficient**2)
    loss = config.off_policy * terms[0] + penalty
    if config.on_policy:
        loss += config.on_policy * terms[1]
        info |= {"on_policy": terms[1]} | displacement(states, example.tokens)
    return loss, info


def displacement(states: jax.Array, offline: jax.Array) -> dict[str, jax.Array]:
    """How far and in which direction a roll-out went, against the stored trajectory.

    A policy that freezes shows a falling loss and a `progress` that stays near 0.

    Args:
      states: `[N + 1, length, channels]`.
      offline: the same shape.

    Returns: `progress`, the ratio of the two distances, and `cosine`, of the two directions.
    """
    moved, wanted = states[-1] - states[0], offline[-1] - offline[0]
    lengths = jnp.linalg.norm(moved), jnp.linalg.norm(wanted)
    tiny = jnp.finfo(moved.dtype).tiny
    return {
        "progress": lengths[0] / jnp.maximum(lengths[1], tiny),
        "cosine": jnp.sum(moved * wanted) / jnp.maximum(lengths[0] * lengths[1], tiny),
    }
