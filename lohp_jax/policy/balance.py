"""Balance losses of one trajectory, and what to watch while they are trained.

A trajectory s_0..s_T has log-ratios ell_t = log P_F(s_{t+1} | s_t) - log P_B(s_t | s_{t+1}) and log
flows log F(s_t), the last of which is the log reward. With the potential

    A_t = log F(s_t) - sum_{i<t} ell_i

the residual of the sub-trajectory m..n is A_m - A_n, and every loss here is a weighted mean of
squared residuals (no factor 1/2, nats squared). Where s_0 is drawn from p_0, log F(s_0) is
log Z + log p_0(s_0); where it is fixed, log F(s_0) = log Z and log P_B of step 0 is 0.

Gradients flow through every argument but `offline`; states sampled from the policy must enter with
their gradient stopped. Losses are in float32 at least, whatever the arguments: in half precision neither
sums over a trajectory nor the weights of its pairs are what they should be. A reward of zero, log R =
-inf, is infinitely out of balance: the losses are inf.
"""

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp

Reward = Literal["matched", "end"]
"""Which stored state rewards the start of a sub-trajectory: its own match, or that of its end."""


def potentials(log_ratio: jax.Array, log_flow: jax.Array) -> jax.Array:
    """Potential A_t = log F(s_t) - sum_{i<t} log_ratio_i, of which residuals are differences.

    Args:
      log_ratio: `[T]` log P_F(s_{t+1} | s_t) - log P_B(s_t | s_{t+1}), in nats.
      log_flow: `[T + 1]` log F(s_t); the last entry is the log reward.

    Returns: `[T + 1]`, in nats. The last entry is the log importance weight of the trajectory,
      before - log p_0(s_0) where s_0 is drawn.
    """
    log_ratio, log_flow = _trajectory(log_ratio, log_flow)
    return log_flow - jnp.pad(jnp.cumsum(log_ratio), (1, 0))


def db_loss(log_ratio: jax.Array, log_flow: jax.Array) -> jax.Array:
    """Detailed balance: mean over t of (A_t - A_{t+1})^2 (Bengio et al., 2023).

    Args:
      log_ratio: `[T]` log P_F(s_{t+1} | s_t) - log P_B(s_t | s_{t+1}), in nats.
      log_flow: `[T + 1]` log F(s_t); the last entry is the log reward.

    Returns: scalar, in nats squared.
    """
    log_ratio, log_flow = _trajectory(log_ratio, log_flow)
    return jnp.mean(jnp.square(log_flow[:-1] + log_ratio - log_flow[1:]))


def tb_loss(log_ratio: jax.Array, log_flow: jax.Array) -> jax.Array:
    """Trajectory balance: (A_0 - A_T)^2 (Malkin et al., 2022). Interior flows play no part.

    Args:
      log_ratio: `[T]` log P_F(s_{t+1} | s_t) - log P_B(s_t | s_{t+1}), in nats.
      log_flow: `[T + 1]` log F(s_t); the last entry is the log reward.

    Returns: scalar, in nats squared.
    """
    log_ratio, log_flow = _trajectory(log_ratio, log_flow)
    return jnp.square(log_flow[0] + jnp.sum(log_ratio) - log_flow[-1])


def subtb_loss(log_ratio: jax.Array, log_flow: jax.Array, *, lambda_: float = 0.9) -> jax.Array:
    """Sub-trajectory balance, SubTB(λ) (Madan et al., 2023).

    sum_{m<n} λ^(n-m) (A_m - A_n)^2 / sum_{m<n} λ^(n-m): the mean of detailed balance for λ -> 0,
    the uniform mean over all sub-trajectories for λ = 1, trajectory balance for λ -> inf.

    Args:
      log_ratio: `[T]` log P_F(s_{t+1} | s_t) - log P_B(s_t | s_{t+1}), in nats.
      log_flow: `[T + 1]` log F(s_t); the last entry is the log reward.
      lambda_: λ, positive and finite; a small value favours short sub-trajectories.

    Returns: scalar, in nats squared. Memory grows as T².

    Raises: ValueError, if `lambda_` is not positive and finite in float32.
    """
    _require_positive("subtb_loss", "lambda_", lambda_)
    potential = potentials(log_ratio, log_flow)
    return _weighted_mean(jnp.square(_differences(potential[:, None], potential[None])), lambda_)


def log_variance_loss(log_weight: jax.Array) -> jax.Array:
    """Log-variance loss (VarGrad): the variance of log w over a batch (Richter et al., 2020).

    log w = log R + sum log P_B - sum log P_F (- log p_0(s_0) where s_0 is drawn): the last entry
    of `potentials`. The loss needs no estimate of log Z, the batch mean stands in for it.

    Args:
      log_weight: `[B]` log importance weights of B trajectories, in nats.

    Returns: scalar population variance (divided by B), in nats squared; inf if a weight is zero.
    """
    chex.assert_rank(log_weight, 1)
    log_weight = _wide(log_weight)
    zero = jnp.isneginf(log_weight)
    spread = jnp.var(jnp.where(zero, 0.0, log_weight))
    return jnp.where(jnp.any(zero), jnp.inf, spread)


def lohp_residuals(
    log_ratio: jax.Array,
    states: jax.Array,
    offline: jax.Array,
    log_coefficient: jax.Array,
    *,
    variance: jax.Array | float,
    compression: int,
    reward: Reward = "matched",
) -> jax.Array:
    """Residuals of Lo-Hp's balance between a policy's states and a stored trajectory.

    State s_m is rewarded for being near the stored state θ_{km} that it stands for,
    log R_m(s) = -|s - θ_{km}|^2 / (2 variance_m), and its flow is c_m R_m. For m < n,

        d(m, n) = log c_m + log R_*(s_m) + sum_{m<=t<n} ell_t - log c_n - log R_n(s_n)

    with R_* = R_m ("matched") or R_n ("end", as the paper states it). Only "matched" has a
    potential; "end" can be zero on all pairs only if all stored states coincide.

    Gaussian kernels and rewards are separable, so large weights are balanced per dimension, where
    the gradient keeps its signal: `jax.vmap` over D, log_ratio `[N]`, states and offline `[.., 1]`.

    Args:
      log_ratio: `[N]` log P_F(s_{m+1} | s_m) - log P_B(s_m | s_{m+1}), in nats.
      states: `[N + 1, D]` states of the policy, or stored states pushed through its kernels.
      offline: `[k N + 1, D]` stored optimizer states; no gradient flows into them.
      log_coefficient: `[N + 1]` log c_m, in nats.
      variance: width of the reward, in squared weights; a scalar or `[N + 1]`. The paper's
        exp(-|s - θ|^2) is 1/2.
      compression: k, the optimizer steps that one step of the policy stands for.
      reward: "matched" or "end".

    Returns: `[N + 1, N + 1]` d(m, n) in nats where m < n, zero elsewhere.

    Raises: ValueError, if `reward` is unknown, `compression` < 1, or `variance`, where it is not
      traced, is not positive and finite.
    """
    rewards = get_args(Reward)
    if reward not in rewards:
        raise ValueError(f"lohp_residuals: reward must be one of {rewards}, got {reward!r}.")
    if compression < 1:
        raise ValueError(f"lohp_residuals: compression must be >= 1, got {compression}.")
    _require_positive("lohp_residuals", "variance", variance)
    chex.assert_rank([log_ratio, states, offline], [1, 2, 2])
    (num_steps,), dimension = log_ratio.shape, states.shape[1]
    chex.assert_shape(states, (num_steps + 1, dimension))
    chex.assert_shape(offline, (compression * num_steps + 1, dimension))

    states, centers = _wide(states), _wide(jax.lax.stop_gradient(offline[::compression]))
    variance = jnp.broadcast_to(jnp.asarray(variance, states.dtype), (num_steps + 1,))
    coefficient = potentials(log_ratio, log_coefficient)
    end = _log_reward(states, centers, variance)
    if reward == "matched":
        start = end[:, None]
    else:
        start = _log_reward(states[:, None], centers[None, :], variance[None, :])
    return _differences(coefficient[:, None] + start, (coefficient + end)[None])


def lohp_loss(
    residuals: jax.Array, *, lambda_: float, huber_delta: float | None = None
) -> jax.Array:
    """Mean of squared residuals over pairs m < n with weights λ^(n-m), as SubTB(λ).

    A residual grows as the square of an error of the mean, so squared residuals let few large errors
    decide the gradient. Any other convex function with its minimum at zero has the same solutions
    (Hu et al., 2025, Beyond Squared Error); Huber's (1964) keeps the square below a threshold and is
    linear beyond it.

    Args:
      residuals: `[N + 1, N + 1]` d(m, n), as of `lohp_residuals`, in nats.
      lambda_: λ, positive and finite; a small value favours short sub-trajectories.
      huber_delta: the threshold, positive, in nats; None squares all residuals, as SubTB does.

    Returns: scalar, in nats squared.

    Raises: ValueError, if `lambda_` or `huber_delta` is not positive and finite in float32.
    """
    _require_positive("lohp_loss", "lambda_", lambda_)
    residuals = _wide(residuals)
    if huber_delta is None:
        return _weighted_mean(jnp.square(residuals), lambda_)
    _require_positive("lohp_loss", "huber_delta", huber_delta)
    size = jnp.abs(residuals)
    beyond = huber_delta * (2 * size - huber_delta)
    return _weighted_mean(jnp.where(size < huber_delta, size**2, beyond), lambda_)


def residual_by_length(residuals: jax.Array) -> jax.Array:
    """Root mean square residual of the sub-trajectories of each length.

    Args:
      residuals: `[N + 1, N + 1]` d(m, n), as of `lohp_residuals`, in nats.

    Returns: `[N]`, in nats; entry l - 1 is over the pairs with n - m = l.
    """
    gap = _gap(residuals, jnp.int32)
    square = jax.ops.segment_sum(
        jnp.square(residuals).ravel(), jnp.maximum(gap, 0).ravel(), num_segments=len(gap)
    )
    num_pairs = jnp.arange(len(gap) - 1, 0, -1)
    return jnp.sqrt(square[1:] / num_pairs)


def additivity_defect(residuals: jax.Array) -> jax.Array:
    """Largest |d(m, n) + d(n, p) - d(m, p)| over m < n < p: zero where a potential exists.

    Args:
      residuals: `[N + 1, N + 1]` d(m, n), as of `lohp_residuals`, in nats.

    Returns: scalar, in nats. Memory grows as N².
    """
    gap = _gap(residuals, jnp.int32)

    def defect_at(n):
        defect = residuals[:, n][:, None] + residuals[n, :][None, :] - residuals
        split = (gap[:, n] > 0)[:, None] & (gap[n, :] > 0)[None, :]
        return jnp.max(jnp.where(split, jnp.abs(defect), 0))

    return jnp.max(jax.lax.map(defect_at, jnp.arange(len(gap))))


def elbo_eubo_gap(on_policy_log_weight: jax.Array, target_log_weight: jax.Array) -> jax.Array:
    """Distance between the bounds E_PF[log w] <= log Z <= E_PB[log w] (Blessing et al., 2024).

    Zero exactly where the policy samples the target; the lower bound alone does not see modes that
    the policy misses.

    Args:
      on_policy_log_weight: `[B]` log w of trajectories drawn from the forward policy, in nats.
      target_log_weight: `[B']` log w of target samples taken backwards by the backward policy.

    Returns: scalar estimate of EUBO - ELBO, in nats.
    """
    chex.assert_rank([on_policy_log_weight, target_log_weight], 1)
    return jnp.mean(target_log_weight) - jnp.mean(on_policy_log_weight)


def effective_sample_size(log_weight: jax.Array) -> jax.Array:
    """Effective share of a batch of weighted samples, (mean w)^2 / mean(w^2) (Kish, 1965).

    Args:
      log_weight: `[B]` log importance weights, up to a constant.

    Returns: scalar from 1 / B (one sample carries all the weight) to 1 (all weigh the same).
    """
    chex.assert_rank(log_weight, 1)
    weight = jnp.exp(log_weight - jnp.max(log_weight))
    return jnp.square(jnp.mean(weight)) / jnp.mean(jnp.square(weight))


def _log_reward(states, centers, variance):
    """`[..., D]` states and centers, `[...]` variance -> `[...]` log R(s)."""
    return -0.5 * jnp.sum(jnp.square(states - centers), axis=-1) / variance


def _weighted_mean(values, lambda_):
    """Mean over pairs m < n with weights λ^(n-m), formed in log space against overflow."""
    gap = _gap(values, values.dtype)
    log_weight = gap * jnp.log(jnp.asarray(lambda_, values.dtype))
    weight = jax.nn.softmax(jnp.where(gap > 0, log_weight, -jnp.inf), axis=(0, 1))
    counted = jnp.where(weight > 0, values, 0.0)  # a weight can underflow where a value is inf
    return jnp.sum(weight * counted)


def _differences(start, end):
    """`start - end` at the pairs m < n, zero elsewhere; -inf on both sides of m = n is no NaN."""
    num_states = max(*start.shape, *end.shape)
    pairs = jnp.triu(jnp.ones((num_states, num_states), bool), k=1)
    return jnp.where(pairs, start, 0.0) - jnp.where(pairs, end, 0.0)


def _gap(pairs, dtype):
    """`[N + 1, N + 1]` n - m, for an array of that shape."""
    chex.assert_rank(pairs, 2)
    index = jnp.arange(pairs.shape[0], dtype=dtype)
    chex.assert_shape(pairs, (len(index), len(index)))
    return index[None, :] - index[:, None]


def _trajectory(log_ratio, log_flow):
    """Both, in float32 at least."""
    chex.assert_rank([log_ratio, log_flow], 1)
    chex.assert_shape(log_flow, (log_ratio.shape[0] + 1,))
    return _wide(log_ratio), _wide(log_flow)


def _wide(x):
    return jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))


def _require_positive(function, name, value):
    """Checks a scalar or an array that a user chose; a traced value cannot be checked."""
    if isinstance(value, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():
        array = jnp.asarray(value)
        valid = bool(jnp.all((array > 0) & jnp.isfinite(array)))
    if not valid:
        raise ValueError(f"{function}: {name} must be positive and finite, got {value}.")
