"""A policy that sees where it is: the open loop's policy and a rule for every weight, and a gate.

At each of its N states the policy sees the context loss of the task, and its gradient if it is to. Its
kernels are the sum of what the condition says, by the network of the open loop, and of what a rule that
is the same for every weight makes of the observation. On a task unlike the training tasks the first is
wrong and the second is not; the gate therefore trusts the condition in so far as the task is familiar.

Familiarity is a conformal p-value: the share of training tasks on which a walk by the condition alone
ends at a context loss at least as high. Where the rule alone ended no lower on training tasks, the
condition is trusted all the same.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lohp_jax.networks.feedback import (
    Observation,
    blank_known,
    blank_observation,
    known_of,
    make_rule,
)
from lohp_jax.networks.policy import Heads
from lohp_jax.policy.config import FeedbackConfig
from lohp_jax.policy.kernels import Policy, roll_out
from lohp_jax.policy.windows import at_window, map_windows
from lohp_jax.types import PyTree, Space, TaskFamily, View
from lohp_jax.windows import rows_in

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
      at_window: `(view, around) -> Loop` of one window, whose states are `[size, channels]`, while the
        other weights are at `around` `[N + 1, length, channels]`; None for a policy that sees all tokens
        at once. Its `observe` still takes the whole state.
    """

    policy: Policy
    open: Policy
    blind: Policy
    observe: Callable[[PyTree, jax.Array], Observation]
    config: FeedbackConfig
    at_window: Callable[[View, jax.Array], "Loop"] | None = None


class _Place(NamedTuple):
    """Which weights a policy walks.

    Attributes:
      see: `(context, step, state) -> Observation` of these weights.
      everywhere: `(function, *tokens) -> pytree of tokens`, of a `(view, *tokens) -> pytree of tokens`
        that is given all of them, with None for a view, or those of one window.
    """

    see: Callable[[PyTree, jax.Array, jax.Array], Observation]
    everywhere: Callable[..., PyTree]


def check_family(family: TaskFamily) -> None:
    """Raises: ValueError for a family without `context_loss`, which a closed loop looks at."""
    if family.context_loss is None:
        raise ValueError(
            f"feedback: the family {family.name!r} has no context_loss, which a closed loop looks "
            "at; give TaskFamily.context_loss, `(params, context) -> scalar`, or walk without feedback."
        )


def close_loop(policy: Policy, space: Space, config: FeedbackConfig) -> Loop:
    """Lets a policy see the context loss at its states.

    Its params are those of the open loop beside those of the "rule" and the "known" losses. A policy of
    windows becomes one of the whole network, whose gradient it sees, and still computes its heads window
    by window.

    Args:
      policy: of the condition alone.
      space: where it walks.
      config: of the loop.

    Raises: ValueError for a family without `context_loss`.
    """
    check_family(space.family)
    observe = functools.partial(_observe, space, config.sees == "gradient")

    def see(context, step, state):
        return observe(context, state)

    if policy.windows is None:
        place = _Place(see, lambda function, *tokens: function(None, *tokens))
        return _loop_at(place, policy, observe, config)

    def at(view, around):
        rows = rows_in(policy.windows, view.index)

        def see_there(context, step, state):
            seen = observe(context, around[step].at[rows].set(state, mode="drop"))
            own = jnp.take(seen.gradient, rows, axis=0, mode="fill", fill_value=0.0)
            return seen._replace(gradient=own)

        place = _Place(see_there, lambda function, *tokens: function(view, *tokens))
        window = at_window(policy, view)._replace(network=policy.network)
        return _loop_at(place, window, observe, config)

    place = _Place(see, functools.partial(map_windows, policy))
    return _loop_at(place, policy, observe, config)._replace(at_window=at)


def _loop_at(
    place: _Place,
    policy: Policy,
    observe: Callable[[PyTree, jax.Array], Observation],
    config: FeedbackConfig,
) -> Loop:
    """The loop of the weights at a place; `policy` has their codec, and the network of a window."""
    network, sizes = policy.network, {"widths": config.widths, "num_steps": policy.num_steps}
    rule = make_rule(**sizes, forgotten=_forgotten(policy))

    def init(key, context):
        key, rule_key = jax.random.split(key)
        return network.init(key, context) | {
            "rule": rule.init(rule_key, *_blank_sight(policy)),
            "known": {half: jnp.full(NUM_KNOWN, jnp.inf) for half in ("condition", "rule")},
        }

    def said(view, params, embedding, *at):
        return network.heads(params, embedding, *at, *([] if view is None else [view]))

    def ruled(view, params, looking, step, state, seen):
        trust = jnp.asarray(looking.turn.condition, state.dtype)
        known = known_of(policy.codec, policy.start, policy.windows, view)
        return rule.apply(params["rule"], seen, known, trust, step, state)

    def heads(alone, params, looking, teacher, step, state):
        seen = place.see(looking.context, step, state)

        def at(view, state, gradient):
            rule = ruled(view, params, looking, step, state, seen._replace(gradient=gradient))
            if alone:
                return rule
            condition = said(view, params, looking.embedding, teacher, step, state)
            return follow(looking.turn, seen.usable, condition, rule)

        return place.everywhere(at, state, seen.gradient)

    def open_heads(params, embedding, teacher, step, state):
        seen = embedding, teacher, step
        return place.everywhere(lambda view, state: said(view, params, *seen, state), state)

    def encode(params, context, turn):
        return Looking(network.encode(params, context, 1.0), context, turn)

    def encode_blind(params, context, turn):
        return Looking((), context, turn)

    def of(keep=None, **functions):
        return policy._replace(network=network._replace(**functions), keep=keep, windows=None)

    both, alone = (functools.partial(heads, alone) for alone in (False, True))
    return Loop(
        of(functools.partial(draw_turn, config), init=init, encode=encode, heads=both),
        of(heads=open_heads),
        of(lambda key: Turn(0.0, 1.0), encode=encode_blind, heads=alone),
        observe,
        config,
    )


def _forgotten(policy: Policy) -> float:
    """The share of the state that a kernel leaves out of the mean of the next one."""
    return 1 - policy.config.correlation if policy.config.backward == "bridge" else 0.0


def _blank_sight(policy: Policy) -> tuple[Any, ...]:
    """What the rule takes of one token; nothing in it grows with their number."""
    channels, step = policy.start.shape[1], jnp.zeros((), jnp.int32)
    known = blank_known(policy.codec)
    return blank_observation(1, channels), known, jnp.ones(()), step, jnp.zeros((1, channels))


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
    squares, products, sizes = (
        jnp.where(codec.mask, x, 0.0).sum() / codec.mask.sum()
        for x in (state**2, state * gradient, jnp.abs(gradient))
    )
    means = jnp.stack([jnp.log1p(squares), products / jnp.sqrt(1 + squares), sizes])
    log_rms = jnp.log(jnp.maximum(rms, _LEAST)) if sees_gradient else jnp.zeros(())
    log_loss = jnp.log(jnp.maximum(loss, _LEAST))
    seen = Observation(gradient, means, log_rms, log_loss, jnp.ones(()))
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
    return _end_loss(loop.open, space, params, embedding, context, teacher)


def rule_loss(
    loop: Loop, space: Space, params: PyTree, context: PyTree, teacher: jax.Array
) -> jax.Array:
    """Context loss where a walk by the rule alone ends, following the means."""
    looking = loop.blind.network.encode(params, context, Turn(0.0, 1.0))
    return _end_loss(loop.blind, space, params, looking, context, teacher)


def _end_loss(policy, space, params, embedding, context, teacher) -> jax.Array:
    states = roll_out(policy, params, embedding, teacher, jax.random.key(0), temperature=0.0)
    return space.family.context_loss(space.codec.decode(states[-1]), context)


def familiarity(known: jax.Array, loss: jax.Array) -> jax.Array:
    """(1 + the number of known losses that are no lower) / (1 + their number); in (0, 1].

    On tasks like the training tasks it is uniform (Vovk et al., 2005); a loss that is not finite has the
    lowest value.
    """
    return (1 + _no_lower(known, loss)) / (1 + known.size)


def _no_lower(known: jax.Array, loss: jax.Array) -> jax.Array:
    """How many known losses are no lower; 0 for a loss that is not finite."""
    return jnp.sum((known >= loss) & jnp.isfinite(loss))


def trust_in(config: FeedbackConfig, known: dict[str, jax.Array], loss: jax.Array) -> jax.Array:
    """How far the condition is followed on a task where it leads to this context loss.

    From familiarity `level` on it is followed fully, beyond all known losses not at all; but at least by
    the share of training tasks on which the rule alone ended at a loss as high, for where the rule
    promises nothing better there is no reason to leave the condition. A policy that sees the loss alone
    follows it always: its rule knows no way to go by itself.

    Args:
      config: of the loop.
      known: `[K]` losses of training tasks, `condition_loss` of the "condition" and `rule_loss` of the
        "rule".
      loss: `condition_loss` of the task, scalar.
    """
    if config.sees == "loss":
        return jnp.ones_like(loss)
    least = 1 / (1 + known["condition"].size)
    beyond = familiarity(known["condition"], loss) - least
    trust = jnp.clip(beyond / max(config.level - least, least), 0.0, 1.0)
    return jnp.maximum(trust, _no_lower(known["rule"], loss) / known["rule"].size)
