"""A policy that sees where it is: the open loop's policy and a rule for every weight, and a gate.

At each of its N states the policy sees the context loss of the task, and its gradient if it is to. Its
kernels are the sum of what the condition says, by the network of the open loop, and of what a rule that
is the same for every weight makes of the observation. On a task unlike the training tasks the first is
wrong and the second is not; the gate therefore trusts the condition in so far as the task is familiar.

Familiarity is a conformal p-value: the share of training tasks on which a walk by the condition alone
ends at a context loss at least as high.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lohp_jax.networks.feedback import Observation, blank_observation, make_rule
from lohp_jax.networks.policy import Heads
from lohp_jax.policy.config import FeedbackConfig
from lohp_jax.policy.kernels import Policy, roll_out, unit_start
from lohp_jax.types import PyTree, Space, TaskFamily

NUM_KNOWN = 256
"""Training tasks that familiarity is measured against."""
_LEAST = 1e-8
"""Losses and gradients below it count as it, negative losses too: their logarithms are looked at."""


class Turn(NamedTuple):
    """How far a walk follows each half of the loop, scalars in [0, 1]."""

    condition: jax.Array | float
    rule: jax.Array | float


class Looking(NamedTuple):
    """What a closed loop carries along a walk in place of an embedding.

    Attributes:
      embedding: of the context, by the network of the open loop.
      context: which it looks at from every state.
      turn: whom it follows.
    """

    embedding: PyTree
    context: PyTree
    turn: Turn


class Loop(NamedTuple):
    """A policy with its loop closed.

    Attributes:
      policy: of both halves; its `network.encode` takes a `Turn` where others take `keep`.
      open: the policy of the condition alone.
      blind: the policy of the rule alone, which never reads the condition.
      observe: `(context, state) -> Observation`.
      config: of the loop.
    """

    policy: Policy
    open: Policy
    blind: Policy
    observe: Callable[[PyTree, jax.Array], Observation]
    config: FeedbackConfig


def check_family(family: TaskFamily) -> None:
    """Raises: ValueError for a family without `context_loss`, which a closed loop looks at."""
    if family.context_loss is None:
        raise ValueError(
            f"feedback: the family {family.name!r} has no context_loss, which a closed loop looks "
            "at; give TaskFamily.context_loss, `(params, context) -> scalar`, or walk without feedback."
        )


def close_loop(policy: Policy, space: Space, config: FeedbackConfig) -> Loop:
    """Lets a policy see the context loss at its states.

    Its params are those of the open loop beside those of the "rule" and the "known" losses.

    Args:
      policy: of the condition alone.
      space: where it walks.
      config: of the loop.

    Raises: ValueError for a family without `context_loss`.
    """
    check_family(space.family)
    network = policy.network
    rule = make_rule(
        policy.codec,
        unit_start(space),
        widths=config.widths,
        num_steps=policy.num_steps,
        forgotten=1 - policy.config.correlation if policy.config.backward == "bridge" else 0.0,
    )
    observe = functools.partial(_observe, space, config.sees == "gradient")

    def init(key, context):
        key, rule_key = jax.random.split(key)
        codec, step = policy.codec, jnp.zeros((), jnp.int32)
        seen = blank_observation(codec), jnp.ones(()), step, jnp.zeros(codec.mask.shape)
        beside = {"rule": rule.init(rule_key, *seen), "known": jnp.full(NUM_KNOWN, jnp.inf)}
        return network.init(key, context) | beside

    def encode(params, context, turn):
        return Looking(network.encode(params, context, 1.0), context, turn)

    def look(params, looking, step, state):
        seen = observe(looking.context, state)
        trust = jnp.asarray(looking.turn.condition, state.dtype)
        return seen, rule.apply(params["rule"], seen, trust, step, state)

    def heads(params, looking, teacher, step, state):
        said = network.heads(params, looking.embedding, teacher, step, state)
        seen, ruled = look(params, looking, step, state)
        return follow(looking.turn, seen.usable, said, ruled)

    closed = policy._replace(
        network=network._replace(init=init, encode=encode, heads=heads),
        keep=functools.partial(draw_turn, config),
    )
    blind = policy._replace(
        network=network._replace(
            encode=lambda params, context, turn: Looking((), context, turn),
            heads=lambda params, looking, teacher, *at: look(params, looking, *at)[1],
        ),
        keep=lambda key: Turn(0.0, 1.0),
    )
    return Loop(closed, policy, blind, observe, config)


def _observe(space: Space, sees_gradient: bool, context: PyTree, state: jax.Array) -> Observation:
    """`Loop.observe`; nothing is differentiated through it."""
    codec = space.codec

    def loss_at(tokens):
        return space.family.context_loss(codec.decode(tokens), context)

    state = jax.lax.stop_gradient(state)
    if sees_gradient:
        loss, gradient = jax.value_and_grad(loss_at)(state)
    else:
        loss, gradient = loss_at(state), jnp.zeros_like(state)
    gradient = jnp.where(codec.mask, gradient, 0.0)
    rms = jnp.sqrt(jnp.sum(gradient**2) / codec.mask.sum())
    usable = jnp.isfinite(loss) & jnp.isfinite(rms)
    tiny = jnp.finfo(state.dtype).tiny
    gradient = gradient / jnp.maximum(rms, tiny)
    log_rms = jnp.log(jnp.maximum(rms, _LEAST)) if sees_gradient else jnp.zeros(())
    seen = Observation(gradient, log_rms, jnp.log(jnp.maximum(loss, _LEAST)), jnp.ones(()))
    seen = jax.tree.map(lambda x: jnp.where(usable, x, 0.0), seen)
    return jax.lax.stop_gradient(seen)


def follow(turn: Turn, usable: jax.Array, condition: Heads, rule: Heads) -> Heads:
    """The sum of both halves; where nothing usable was seen, the condition alone, however familiar."""
    trust = jnp.where(usable > 0, turn.condition, 1.0)
    return jax.tree.map(lambda c, r: trust * c + usable * turn.rule * r, condition, rule)


def draw_turn(config: FeedbackConfig, key: jax.Array) -> Turn:
    """Whom an example of training follows: the condition, and the rule unless it is left out."""
    rule = jax.random.bernoulli(key, 1 - config.condition_alone).astype(jnp.float32)
    return Turn(1.0, rule)


def condition_loss(
    loop: Loop, space: Space, params: PyTree, context: PyTree, teacher: jax.Array
) -> jax.Array:
    """Context loss where a walk by the condition alone ends, following the means; no gradient."""
    embedding = loop.open.network.encode(params, context, 1.0)
    states = roll_out(loop.open, params, embedding, teacher, jax.random.key(0), temperature=0.0)
    return space.family.context_loss(space.codec.decode(states[-1]), context)


def familiarity(known: jax.Array, loss: jax.Array) -> jax.Array:
    """(1 + the number of known losses that are no lower) / (1 + their number); in (0, 1].

    On tasks like the training tasks it is uniform (Vovk et al., 2005); a loss that is not finite has the
    lowest value.
    """
    return (1 + jnp.sum(known >= loss)) / (1 + known.size)


def trust_in(config: FeedbackConfig, known: jax.Array, familiarity: jax.Array) -> jax.Array:
    """How far the condition is followed: 0 beyond all known losses, 1 from `level` on."""
    least = 1 / (1 + known.size)
    return jnp.clip((familiarity - least) / max(config.level - least, least), 0.0, 1.0)
