"""Lo-Di: diffusion over weights whose targets are local, the states of a stored trajectory in turn.

The Lo-Hp paper ablates a variant of this name, between a hypernetwork and Lo-Op (table 2). What we know
of it is that its diffusion has local targets; the rest is our reading: the chain has a noise level for
each of the N steps of a walk, and at level m, from noise to data, the network sees the stored state
z_m under noise and is to say z_{m+1}. Sampling then follows DDIM, with the noise that the network's
input is known to hold and a target that moves along the trajectory.
"""

import functools

import jax
import jax.numpy as jnp

from lohp_jax.diffusion.schedule import Schedule, alpha_sigma
from lohp_jax.methods.common import policy_method, settings
from lohp_jax.networks.policy import NetworkConfig
from lohp_jax.policy.config import HybridConfig
from lohp_jax.policy.kernels import Policy, embed
from lohp_jax.types import Example, Method, PyTree

SCHEDULE = Schedule()


def lo_di(
    *, network: NetworkConfig = NetworkConfig(), balance: HybridConfig = HybridConfig()
) -> Method:
    """Lo-Di: diffusion in N levels, each with the next stored state as its target.

    Args:
      network: sizes of the denoiser.
      balance: gives the condition dropout; nothing else of it matters.
    """
    return policy_method(
        "lo_di",
        lambda policy, space: functools.partial(local_loss, policy),
        network=network,
        balance=balance,
        sampler=denoise_along,
        config=settings(network=network, balance=balance),
    )


def levels(num_steps: int) -> tuple[jax.Array, jax.Array]:
    """(α, σ) `[N]` of the levels of a walk, at times 1, 1 - 1/N, .., 1/N of the schedule."""
    return alpha_sigma(SCHEDULE.log_snr(1.0 - jnp.arange(num_steps) / num_steps))


def local_loss(
    policy: Policy, params: PyTree, example: Example, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean squared error of z_{m+1} from α_m z_m + σ_m ε, over all levels m.

    Returns: the loss (scalar, in units of the standardised weights squared) and no diagnostics.
    """
    drop_key, noise_key = jax.random.split(key)
    embedding = embed(policy, params, example.context, drop_key)
    mask = policy.codec.mask
    states, targets = example.tokens[:-1], example.tokens[1:]
    noises = jax.random.normal(noise_key, states.shape)

    def error_at(step, alpha, sigma, state, noise, target):
        z = jnp.where(mask, alpha * state + sigma * noise, 0.0)
        said = policy.network.heads(params, embedding, example.teacher, step, z).drift
        return jnp.sum(jnp.where(mask, said - target, 0.0) ** 2) / mask.sum()

    steps = jnp.arange(policy.num_steps)
    errors = jax.vmap(error_at)(steps, *levels(policy.num_steps), states, noises, targets)
    return jnp.mean(errors), {}


def denoise_along(
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
    """Walks from noise at theta_0 to the end, one local target after another.

    Args:
      policy: whose network says the next state.
      params: of its network.
      embedding: of the context.
      teacher: int32 scalar, the kind of trajectory to imitate.
      key: randomness of the noise, drawn once.
      temperature: factor of the noise.
      num_steps: how many of the N levels to take; None for all.
      unconditional: embedding without context; with `guidance` g a target becomes
        (1 + g) target - g target unconditional (Ho and Salimans, 2022).
      guidance: g.

    Returns: `[num_steps + 1, length, channels]`, theta_0 and the target that each level says.

    Raises: ValueError for a `num_steps` that is not between 1 and N.
    """
    count = policy.num_steps if num_steps is None else num_steps
    if not 1 <= count <= policy.num_steps:
        raise ValueError(
            f"denoise_along: num_steps must be between 1 and {policy.num_steps}, got {num_steps}."
        )
    mask = policy.codec.mask
    noise = temperature * jax.random.normal(key, mask.shape)

    def step(state, inputs):
        index, alpha, sigma = inputs
        z = jnp.where(mask, alpha * state + sigma * noise, 0.0)
        said = policy.network.heads(params, embedding, teacher, index, z).drift
        if guidance:
            free = policy.network.heads(params, unconditional, teacher, index, z).drift
            said += guidance * (said - free)
        said = jnp.where(mask, said, 0.0)
        return said, said

    start = jnp.zeros(mask.shape, noise.dtype)
    of_levels = (jnp.arange(count), *(x[:count] for x in levels(policy.num_steps)))
    _, states = jax.lax.scan(step, start, of_levels)
    return jnp.concatenate([start[None], states])
