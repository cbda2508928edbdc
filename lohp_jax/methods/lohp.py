"""Lo-Hp (arXiv 2511.00543) and its presets: a policy trained by hybrid-policy sub-trajectory balance."""

import dataclasses
import functools
from typing import Literal, get_args

import jax.numpy as jnp

from lohp_jax.checks import check_option
from lohp_jax.methods.cloning import cloning_loss
from lohp_jax.methods.common import policy_method, settings, weighted
from lohp_jax.methods.hypernetwork import task_loss
from lohp_jax.methods.lohp_feedback import lohp_feedback
from lohp_jax.networks.policy import NetworkConfig
from lohp_jax.policy.config import PAPER_LITERAL, FeedbackConfig, HybridConfig
from lohp_jax.policy.hybrid import hybrid_loss
from lohp_jax.types import Method

Feedback = Literal["none", "loss", "gradient"]


def lohp(
    *,
    network: NetworkConfig = NetworkConfig(),
    balance: HybridConfig = HybridConfig(),
    anchor: float = 0.0,
    feedback: Feedback = "none",
) -> Method:
    """Lo-Hp in its well-posed form.

    Args:
      network: sizes of the policy network.
      balance: the objective.
      anchor: weight of the likelihood of stored transitions, added to the objective.
      feedback: "gradient" or "loss": what of the context loss the policy sees at its states, as in
        `lohp_feedback`, which has more settings; "none" for a policy that looks at the task once.

    Raises: ValueError for another `feedback`, or for feedback with an anchor.

    >>> lohp(network=NetworkConfig(widths=(16, 32))).name
    'lohp'
    """

    check_option("lohp", "feedback", feedback, get_args(Feedback))
    if feedback != "none":
        if anchor:
            raise ValueError(f"lohp: anchor must be 0 with feedback, got {anchor}.")
        loop = FeedbackConfig(sees=feedback)
        return lohp_feedback(network=network, balance=balance, loop=loop)

    def make_loss(policy, space):
        hybrid = functools.partial(hybrid_loss, policy)
        return weighted([(1.0, hybrid), (anchor, functools.partial(cloning_loss, policy))])

    config = settings(network=network, balance=balance, anchor=anchor)
    return policy_method("lohp", make_loss, network=network, balance=balance, config=config)


def lohp_consolidated(
    *,
    network: NetworkConfig = NetworkConfig(),
    balance: HybridConfig = HybridConfig(),
    anchor: float = 0.0,
    consolidation: float = 1.0,
) -> Method:
    """Lo-Hp, then half as many updates with the task loss of the generated weights added.

    Args:
      network: sizes of the policy network.
      balance: the objective.
      anchor: of the `lohp` that it starts from.
      consolidation: weight of the task loss, which must be differentiable.
    """

    def make_loss(policy, space):
        task = functools.partial(task_loss, policy, space.family)
        return weighted([(1.0, functools.partial(hybrid_loss, policy)), (consolidation, task)])

    return policy_method(
        "lohp_consolidated",
        make_loss,
        network=network,
        balance=balance,
        starts_from=lohp(network=network, balance=balance, anchor=anchor),
        share=0.5,
        needs_whole="the task loss of generated weights needs all of them",
        config=settings(
            network=network, balance=balance, anchor=anchor, consolidation=consolidation
        ),
    )


def lo_op(
    *, network: NetworkConfig = NetworkConfig(), balance: HybridConfig = HybridConfig()
) -> Method:
    """Lo-Op: balance on the policy's own states alone, which knows of a trajectory its two ends only.

    The Lo-Hp paper ablates a variant of this name, between Lo-Di and Lo-Hp (table 2): on-policy
    balance without the supervision of offline sub-trajectories. As a reward needs a place, ours are
    along the straight line from theta_0 to the end; no state stored in between is looked at, and no
    state but the policy's own is walked from. For rewards at the stored states give `lohp` a `balance`
    with `off_policy=0.0, on_policy=1.0`.

    Args:
      network: sizes of the policy network.
      balance: the objective, of which the weights of both terms are replaced.
    """
    on_policy = dataclasses.replace(balance, off_policy=0.0, on_policy=1.0)

    def loss(policy, params, example, key):
        straight = jnp.linspace(example.tokens[0], example.tokens[-1], len(example.tokens))
        return hybrid_loss(policy, params, example._replace(tokens=straight), key)

    return policy_method(
        "lo_op",
        lambda policy, space: functools.partial(loss, policy),
        network=network,
        balance=on_policy,
        config=settings(network=network, balance=balance),
    )


def paper_literal(*, network: NetworkConfig = NetworkConfig()) -> Method:
    """The objective of the Lo-Hp paper (arXiv 2511.00543) to the letter, which falls short.

    Rewards, backward policy, starts at N(0, I) and unperturbed states are the paper's. Standardised
    weights around a shared theta_0, a pinned last coefficient, bounds of the standard deviations, λ, the
    weights of the terms and the network are not; see `PAPER_LITERAL`. The paper warns of rates above
    .001: train it with `learning_rate=1e-3` or less, where the default is 3e-3.

    Args:
      network: sizes of the policy network.
    """
    return policy_method(
        "paper_literal",
        lambda policy, space: functools.partial(hybrid_loss, policy),
        network=network,
        balance=PAPER_LITERAL,
        config=settings(network=network),
    )
