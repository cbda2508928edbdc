"""Diffusion over weights, with the end of each stored trajectory as its only target.

Schedule and sampler are those that solve optimization problems; the denoiser is the policy's network
over the tokens of the codec, told a noise level where a policy is told its step.
"""

import functools

import jax
import jax.numpy as jnp

from lohp_jax.diffusion.sampler import Denoiser, sample
from lohp_jax.diffusion.schedule import Schedule, alpha_sigma
from lohp_jax.methods.common import policy_method, settings
from lohp_jax.networks.levels import level_features
from lohp_jax.networks.policy import NetworkConfig
from lohp_jax.policy.config import HybridConfig
from lohp_jax.policy.kernels import Policy, embed
from lohp_jax.types import Example, Method, PyTree

SCHEDULE = Schedule()


def weight_diffusion(
    *, network: NetworkConfig = NetworkConfig(), balance: HybridConfig = HybridConfig()
) -> Method:
    """Diffusion over the ends of the stored trajectories; a walk denoises by DDIM.

    Args:
      network: sizes of the denoiser.
      balance: gives the condition dropout; nothing else of it matters.
    """
    return policy_method(
        "weight_diffusion",
        lambda policy, space: functools.partial(denoising_loss, policy),
        network=network,
        balance=balance,
        step_features=level_features,
        sampler=denoise_from_noise,
        config=settings(network=network, balance=balance),
    )


def denoise(
    policy: Policy,
    params: PyTree,
    embedding: PyTree,
    teacher: jax.Array,
    z: jax.Array,
    log_snr: jax.Array,
) -> jax.Array:
    """The network's x_0, the standardised end weights, at noisy ones.

    Args:
      policy: whose network is told a noise level in place of a step.
      params: of its network.
      embedding: of the context.
      teacher: int32 scalar, the kind of trajectory whose end is meant.
      z: `[length, channels]`; padding is ignored.
      log_snr: scalar, the noise level.

    Returns: `[length, channels]`.
    """
    z = jnp.where(policy.codec.mask, z, 0.0)
    return policy.network.heads(params, embedding, teacher, log_snr, z).drift


def denoising_loss(
    policy: Policy, params: PyTree, example: Example, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean squared error of x_0 at N noise levels, N evaluations of the network as for cloning.

    Times are uniform in [0, 1], one in each N-th of it, so that every update sees the whole schedule
    (Kingma et al., 2021).

    Returns: the loss (scalar, in units of the standardised weights squared) and no diagnostics.
    """
    drop_key, time_key, noise_key = jax.random.split(key, 3)
    embedding = embed(policy, params, example.context, drop_key)
    count, end, mask = policy.num_steps, example.tokens[-1], policy.codec.mask
    times = (jnp.arange(count) + jax.random.uniform(time_key)) / count
    noises = jax.random.normal(noise_key, (count, *end.shape))

    def error_at(time, noise):
        log_snr = SCHEDULE.log_snr(time)
        alpha, sigma = alpha_sigma(log_snr)
        z = alpha * end + sigma * noise
        x0 = denoise(policy, params, embedding, example.teacher, z, log_snr)
        return jnp.sum(jnp.where(mask, x0 - end, 0.0) ** 2) / mask.sum()

    return jnp.mean(jax.vmap(error_at)(times, noises)), {}


def denoise_from_noise(
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
    """Samples end weights by DDIM; stands where a policy has `roll_out`, whose arguments it takes.

    Args:
      policy: whose network is told a noise level in place of a step.
      params: of its network.
      embedding: of the context.
      teacher: int32 scalar, the kind of trajectory whose end is meant.
      key: randomness of the noise.
      temperature: factor of the noise; 0 starts at z = 0.
      num_steps: noise levels, at each of which the network is evaluated once, or twice with guidance;
        None for N.
      unconditional: embedding without context; with `guidance` g the prediction becomes
        (1 + g) x_0 - g x_0 unconditional (Ho and Salimans, 2022).
      guidance: g.

    Returns: `[num_steps, length, channels]`, the network's x_0 at each level; the last is the sample.
    """
    shape = policy.codec.mask.shape

    def apply(params, z, log_snr, seen):
        embedding, unconditional, teacher = seen
        z = z.reshape(shape)
        x0 = denoise(policy, params, embedding, teacher, z, log_snr)
        if guidance:
            free = denoise(policy, params, unconditional, teacher, z, log_snr)
            x0 += guidance * (x0 - free)
        return x0.reshape(-1)

    _, path = sample(
        Denoiser(apply, lambda seen: policy.codec.mask.size),
        params,
        (embedding, unconditional, teacher),
        key,
        schedule=SCHEDULE,
        num_steps=policy.num_steps if num_steps is None else num_steps,
        temperature=temperature,
        return_path=True,
    )
    return path.x0[0].reshape(-1, *shape)
