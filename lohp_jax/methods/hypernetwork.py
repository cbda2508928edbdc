"""Hypernetworks: the policy's network applied once, from theta_0 straight to the end weights."""

import functools

import jax
import jax.numpy as jnp

from lohp_jax.methods.common import policy_method, settings
from lohp_jax.networks.policy import NetworkConfig
from lohp_jax.policy.config import HybridConfig
from lohp_jax.policy.kernels import Policy, embed, roll_out
from lohp_jax.tasks.support import canonical_order, relabel
from lohp_jax.types import Example, Method, PyTree, TaskFamily


def hypernetwork(
    *, network: NetworkConfig = NetworkConfig(), balance: HybridConfig = HybridConfig()
) -> Method:
    """A network from contexts to weights, trained on the task loss of what it generates.

    Args:
      network: sizes of its network.
      balance: gives the condition dropout; nothing else of it matters.
    """

    def make_loss(policy, space):
        return functools.partial(task_loss, policy, space.family)

    whole = "the task loss of generated weights needs all of them"
    return _one_step("hypernetwork", make_loss, network, balance, needs_whole=whole)


def hypernetwork_regression(
    *, network: NetworkConfig = NetworkConfig(), balance: HybridConfig = HybridConfig()
) -> Method:
    """A network from contexts to weights, trained on the ends of the stored trajectories.

    Args:
      network: sizes of its network.
      balance: gives the condition dropout; nothing else of it matters.
    """

    def make_loss(policy, space):
        return functools.partial(regression_loss, policy)

    return _one_step("hypernetwork_regression", make_loss, network, balance)


def _one_step(name, make_loss, network, balance, **fields) -> Method:
    config = settings(network=network, balance=balance)
    fields |= {"network": network, "balance": balance, "num_steps": 1, "config": config}
    return policy_method(name, make_loss, **fields)


def task_loss(
    policy: Policy, family: TaskFamily, params: PyTree, example: Example, key: jax.Array
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
    states = roll_out(policy, params, embedding, example.teacher, drop_key, temperature=0.0)
    weights = relabel(policy.codec.decode(states[-1]), family.class_axes, rank)
    return family.loss(weights, example.data, loss_key), {}


def regression_loss(
    policy: Policy, params: PyTree, example: Example, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean squared error of the generated tokens against the end of the stored trajectory.

    Returns: the loss (scalar, in units of the standardised weights squared) and no diagnostics.
    """
    embedding = embed(policy, params, example.context, key)
    states = roll_out(policy, params, embedding, example.teacher, key, temperature=0.0)
    error = jnp.where(policy.codec.mask, states[-1] - example.tokens[-1], 0.0)
    return jnp.sum(error**2) / policy.codec.mask.sum(), {}
