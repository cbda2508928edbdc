"""Hypernetworks: the policy's network applied once, from theta_0 straight to the end weights."""

import jax
import jax.numpy as jnp

from lohp_jax.policy.hybrid import Example, Policy, embed, roll_out
from lohp_jax.tasks.support import canonical_order, relabel
from lohp_jax.types import TaskFamily


def task_loss(
    policy: Policy, family: TaskFamily, params: dict, example: Example, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Inner loss of the generated weights (Ha et al., 2017, trained over tasks).

    Needs a differentiable task while the generator trains, which Lo-Hp does not. With a policy of
    several steps it is the consolidation term: the gradient runs through the whole mean roll-out.

    Labels are in their canonical order, as in generation. In the order they come, gradients of tasks
    that differ in the names of the labels cancel, and a hidden layer never starts to learn (measured
    on `digits_partitions`: .62, the majority class, against .82 after 250 updates).

    Returns: the loss (scalar) and no diagnostics.
    """
    drop_key, loss_key = jax.random.split(key)
    context, rank = canonical_order(family, example.context)
    embedding = embed(policy, params, context, drop_key)
    states = roll_out(policy, params, embedding, example.optimizer, drop_key, temperature=0.0)
    weights = relabel(policy.codec.decode(states[-1]), family.class_axes, rank)
    return family.loss(weights, example.data, loss_key), {}


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
