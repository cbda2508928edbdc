"""Hypernetworks: the policy's network applied once, from theta_0 straight to the end weights."""

import jax
import jax.numpy as jnp

from lohp_jax.policy.hybrid import Example, Policy, embed, roll_out
from lohp_jax.types import TaskFamily


def task_loss(
    policy: Policy, family: TaskFamily, params: dict, example: Example, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Inner loss of the generated weights (Ha et al., 2017, trained over tasks).

    Needs a differentiable task while the generator trains, which Lo-Hp does not. With a policy of
    several steps it is the consolidation term: the gradient runs through the whole mean roll-out.

    Returns: the loss (scalar) and no diagnostics.
    """
    drop_key, loss_key = jax.random.split(key)
    embedding = embed(policy, params, example.context, drop_key)
    states = roll_out(policy, params, embedding, example.optimizer, drop_key, temperature=0.0)
    return family.loss(policy.codec.decode(states[-1]), example.data, loss_key), {}


def regression_loss(
    policy: Policy, params: dict, example: Example, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean squared error of the generated tokens against the end of the stored trajectory.

    Returns: the loss (scalar, in units of the standardised weights squared) and no diagnostics.
    """
    embedding = embed(policy, params, example.context, key)
    states = roll_out(policy, params, embedding, example.optimizer, key, temperature=0.0)
    error = jnp.where(policy.codec.mask, states[-1] - example.tokens[-1], 0.0)
    return jnp.sum(error**2) / policy.codec.mask.sum(), {}
