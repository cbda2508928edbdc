"""Gaussian kernels of the forward and backward policy, and the tube around a stored trajectory.

Every kernel is a diagonal Gaussian, given by its mean (an absolute position, not a step) and the
log of its standard deviation. Arrays are `[D]`, one state each; leading axes pass through.

The tube gives step m a marginal N(z_m, tau_m^2) around a stored state z_m. Its bridge kernels are
the two conditionals of one Gaussian pair (s_m, s_{m+1}) with correlation rho, so they satisfy
detailed balance exactly: N(s_m; z_m, tau_m^2) P_F(s_{m+1} | s_m) is the same density as
N(s_{m+1}; z_{m+1}, tau_{m+1}^2) P_B(s_m | s_{m+1}).
"""

import chex
import jax
import jax.numpy as jnp


def log_prob(x: jax.Array, mean: jax.Array, log_std: jax.Array) -> jax.Array:
    """Log density of N(mean, exp(log_std)^2) at `x`, per dimension.

    Args:
      x: `[D]` state.
      mean: `[D]` mean.
      log_std: `[D]`, or a scalar that all dimensions share.

    Returns: `[D]` log densities in nats; their sum is that of the state.
    """
    chex.assert_equal_shape([x, mean])
    return -0.5 * jnp.square((x - mean) * jnp.exp(-log_std)) - log_std - 0.5 * jnp.log(2 * jnp.pi)


def sample(
    key: jax.Array, mean: jax.Array, log_std: jax.Array, temperature: float | jax.Array = 1.0
) -> jax.Array:
    """A draw from N(mean, (temperature * exp(log_std))^2).

    Args:
      key: a `jax.random.key`.
      mean: `[D]` mean.
      log_std: `[D]`, or a scalar that all dimensions share.
      temperature: factor of the standard deviation, may be traced; 0 returns the mean.

    Returns: `[D]` state.
    """
    return mean + temperature * jnp.exp(log_std) * jax.random.normal(key, mean.shape, mean.dtype)


def log_ratio_per_dimension(
    state: jax.Array,
    next_state: jax.Array,
    forward_mean: jax.Array,
    forward_log_std: jax.Array,
    backward_mean: jax.Array,
    backward_log_std: jax.Array,
) -> jax.Array:
    """Log-ratio of the two policies, log P_F(next | state) - log P_B(state | next), per dimension.

    With z_F = (next_state - forward_mean) / std_F and z_B = (state - backward_mean) / std_B it is
    (z_B^2 - z_F^2) / 2 + log std_B - log std_F; the constants log(2 pi) / 2 cancel.

    Args:
      state: `[D]` s_t.
      next_state: `[D]` s_{t+1}.
      forward_mean: `[D]` mean of P_F(s_{t+1} | s_t), a position.
      forward_log_std: `[D]` or a scalar.
      backward_mean: `[D]` mean of P_B(s_t | s_{t+1}), a position.
      backward_log_std: `[D]` or a scalar.

    Returns: `[D]` log-ratios, in nats.
    """
    chex.assert_equal_shape([state, next_state, forward_mean, backward_mean])
    forward = jnp.square(next_state - forward_mean) * jnp.exp(-2 * forward_log_std)
    backward = jnp.square(state - backward_mean) * jnp.exp(-2 * backward_log_std)
    return 0.5 * (backward - forward) + (backward_log_std - forward_log_std)


def log_ratio(
    state: jax.Array,
    next_state: jax.Array,
    forward_mean: jax.Array,
    forward_log_std: jax.Array,
    backward_mean: jax.Array,
    backward_log_std: jax.Array,
) -> jax.Array:
    """Log-ratio of the two policies, log P_F(next | state) - log P_B(state | next).

    The ratio is formed per dimension before the sum: two log densities of a large network summed
    apart are so large that their float32 difference is off by tenths of a nat.

    Args: as of `log_ratio_per_dimension`.

    Returns: scalar, in nats; the sum over the last axis.
    """
    per_dimension = log_ratio_per_dimension(
        state, next_state, forward_mean, forward_log_std, backward_mean, backward_log_std
    )
    return jnp.sum(per_dimension, axis=-1)


def bounded_log_std(raw: jax.Array, base: jax.Array | float, log_range: float) -> jax.Array:
    """Keeps a predicted log standard deviation within `base` ± `log_range`.

    base + log_range * tanh(raw / log_range): the identity plus `base` near raw = 0, so that a
    zero-initialised network starts at `base` with unit slope. Without a floor, balance losses
    reward a policy that freezes; without a ceiling, they diverge.

    Args:
      raw: `[D]` output of a network.
      base: centre of the range; a scalar or `[D]`.
      log_range: half the width of the range, in nats; a Python number.

    Returns: `[D]` log standard deviation.

    Raises: ValueError, if `log_range` is not positive.
    """
    if not log_range > 0:
        raise ValueError(f"bounded_log_std: log_range must be > 0, got {log_range}.")
    return base + log_range * jnp.tanh(raw / log_range)


def tube_std(num_steps: int, start_std: float, end_std: float) -> jax.Array:
    """Width of the tube at each step, annealed geometrically.

    Args:
      num_steps: N, steps of the policy.
      start_std: tau_0, the width of the prior p_0.
      end_std: tau_N, the width of the target around the last stored state.

    Returns: `[N + 1]` standard deviations from `start_std` to `end_std`.

    Raises: ValueError, if `num_steps` < 1 or a width is not positive.
    """
    if num_steps < 1:
        raise ValueError(f"tube_std: num_steps must be >= 1, got {num_steps}.")
    if not (start_std > 0 and end_std > 0):
        raise ValueError(f"tube_std: widths must be > 0, got {start_std} and {end_std}.")
    return jnp.geomspace(start_std, end_std, num_steps + 1)


def tube_log_coefficient(std: jax.Array) -> jax.Array:
    """Log coefficient of the reward that makes c_m R_m the tube's flow, per dimension.

    N(s; z_m, tau_m^2) is proportional to c_m R_m(s) with R_m(s) = exp(-(s - z_m)^2 / (2 tau_m^2))
    and c_m = tau_N / tau_m. For D dimensions summed, multiply by D.

    Args:
      std: `[N + 1]` widths, tau_m.

    Returns: `[N + 1]` log c_m, in nats; the last is 0.
    """
    chex.assert_rank(std, 1)
    return jnp.log(std[-1]) - jnp.log(std)


def bridge_backward(
    next_state: jax.Array,
    center: jax.Array,
    next_center: jax.Array,
    std: jax.Array,
    next_std: jax.Array,
    rho: float,
) -> tuple[jax.Array, jax.Array]:
    """Backward kernel of the tube, P_B(s_m | s_{m+1}).

    N(z_m + rho (tau_m / tau_{m+1}) (s_{m+1} - z_{m+1}), tau_m^2 (1 - rho^2)).

    Args:
      next_state: `[D]` s_{m+1}.
      center: `[D]` stored state z_m.
      next_center: `[D]` stored state z_{m+1}.
      std: tau_m; a scalar or `[D]`.
      next_std: tau_{m+1}; a scalar or `[D]`.
      rho: correlation of neighbouring states in [0, 1), a Python number; 0 makes them independent.

    Returns: mean `[D]` and log standard deviation (shape of `std`).

    Raises: ValueError, if `rho` is outside [0, 1).
    """
    _check_rho("bridge_backward", rho)
    return _condition(next_state, next_center, next_std, center, std, rho)


def bridge_forward(
    state: jax.Array,
    center: jax.Array,
    next_center: jax.Array,
    std: jax.Array,
    next_std: jax.Array,
    rho: float,
) -> tuple[jax.Array, jax.Array]:
    """Forward kernel of the tube, P_F(s_{m+1} | s_m), the exact partner of `bridge_backward`.

    N(z_{m+1} + rho (tau_{m+1} / tau_m) (s_m - z_m), tau_{m+1}^2 (1 - rho^2)).

    Args:
      state: `[D]` s_m.
      center: `[D]` stored state z_m.
      next_center: `[D]` stored state z_{m+1}.
      std: tau_m; a scalar or `[D]`.
      next_std: tau_{m+1}; a scalar or `[D]`.
      rho: correlation of neighbouring states in [0, 1), a Python number.

    Returns: mean `[D]` and log standard deviation (shape of `next_std`).

    Raises: ValueError, if `rho` is outside [0, 1).
    """
    _check_rho("bridge_forward", rho)
    return _condition(state, center, std, next_center, next_std, rho)


def _condition(given, given_center, given_std, center, std, rho):
    """Mean and log std of y given x, for Gaussians x (`given`) and y with correlation `rho`."""
    chex.assert_equal_shape([given, given_center, center])
    mean = center + rho * (std / given_std) * (given - given_center)
    return mean, jnp.log(std) + 0.5 * jnp.log1p(-(rho**2))


def _check_rho(function: str, rho: float) -> None:
    if not 0 <= rho < 1:
        raise ValueError(f"{function}: rho must be in [0, 1), got {rho}.")
