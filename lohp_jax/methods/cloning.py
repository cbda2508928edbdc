"""Behaviour cloning: maximum likelihood of the stored transitions."""

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.policy import gaussian
from lohp_jax.policy.hybrid import Example, Policy, embed, kernels_along, tube_states


def cloning_loss(
    policy: Policy, params: dict, example: Example, key: jax.Array
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
    real = np.flatnonzero(policy.codec.mask)
    log_prob = gaussian.log_prob(states[1:], *forward).reshape(policy.num_steps, -1)
    return -jnp.mean(log_prob[:, real]), {}
