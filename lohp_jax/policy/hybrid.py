"""Hybrid-policy sub-trajectory balance: Lo-Hp's objective, in a well-posed and in its literal form.

The policy walks in N steps along a stored optimizer trajectory z_0..z_N (tokens of every k-th state).
Its flow through step m is c_m R_m(s) with R_m(s) = exp(-|s - z_m|^2 / (2 tau_m^2)). Balance asks, of
every sub-trajectory m..n, that

    log c_m + log R_m(s_m) + sum log P_F(s_{t+1} | s_t)
        = log c_n + log R_n(s_n) + sum log P_B(s_t | s_{t+1}),

on states near the stored ones (off-policy) and on states the policy reaches (on-policy).
"""

import functools

import jax
import jax.numpy as jnp

from lohp_jax.policy import balance, gaussian
from lohp_jax.policy.kernels import (
    Kernel,
    Policy,
    embed,
    kernels_along,
    mean_over_weights,
    real_weights,
    roll_out,
    tube_states,
    widths,
)
from lohp_jax.types import Example, PyTree


def residuals(
    policy: Policy,
    params: PyTree,
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

    Returns: `[D or 1, N + 1, N + 1]`, D the number of weights; of a window with its padding.
    """
    config = policy.config
    ratio = gaussian.log_ratio_per_dimension(states[:-1], states[1:], *forward, *backward)
    ratio, path, offline = (real_weights(policy, x) for x in (ratio, states, example.tokens))
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


def hybrid_loss(
    policy: Policy, params: PyTree, example: Example, key: jax.Array
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
        states = roll_out(policy, *frozen, example.teacher, roll_key, temperature=1.0)
        paths.append(jax.lax.stop_gradient(states))

    def term(states):
        kernels = kernels_along(policy, params, embedding, example, states)
        by_weight = residuals(policy, params, example, states, *kernels)
        loss = mean_over_weights(policy, jax.vmap(loss_fn)(by_weight), 0)
        length = mean_over_weights(policy, jax.vmap(balance.residual_by_length)(by_weight), 0)
        log_stds = [real_weights(policy, kernel.log_std) for kernel in kernels]
        log_stds = [mean_over_weights(policy, log_std, -1) for log_std in log_stds]
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
