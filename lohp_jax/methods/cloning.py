"""Behaviour cloning: maximum likelihood of the stored transitions."""

import functools

import jax
import jax.numpy as jnp

from lohp_jax.methods.common import policy_method, settings
from lohp_jax.networks.policy import NetworkConfig
from lohp_jax.policy import gaussian
from lohp_jax.policy.config import HybridConfig
from lohp_jax.policy.kernels import (
    Policy,
    embed,
    kernels_along,
    mean_over_weights,
    real_weights,
    tube_states,
)
from lohp_jax.types import Example, Method, PyTree


def cloning(
    *, network: NetworkConfig = NetworkConfig(), balance: HybridConfig = HybridConfig()
) -> Method:
    """Behaviour cloning with the network, the kernels and the perturbed states of Lo-Hp.

    Args:
      network: sizes of the policy network.
      balance: gives the tube and the range of the standard deviations; its terms are not used.
    """
    return policy_method(
        "cloning",
        lambda policy, space: functools.partial(cloning_loss, policy),
        network=network,
        balance=balance,
        config=settings(network=network, balance=balance),
    )


def cloning_loss(
    policy: Policy, params: PyTree, example: Example, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Negative log-likelihood of P_F along the states that the balance objective sees off-policy.

    The same network, the same perturbed states, no backward policy and no flow: what is left of
    Lo-Hp without balance.

    Returns: the loss (scalar, nats per weight and step) and no diagnostics.
    """
    drop_key, tube_key = jax.random.split(key)
    embedding = embed(policy, params, example.context, drop_key)
    states = tube_states(policy, example.tokens, tube_key)
    forward, _ = kernels_along(policy, params, embedding, example, states)
    by_weight = real_weights(policy, gaussian.log_prob(states[1:], *forward))
    return -jnp.mean(mean_over_weights(policy, by_weight, -1)), {}
