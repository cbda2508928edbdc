"""Lo-Hp with its loop closed: the policy sees the context loss, and its gradient, where it is."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lohp_jax.methods.cloning import cloning_loss
from lohp_jax.methods.common import Loss, check_windows, settings, teacher_of, weighted
from lohp_jax.methods.hypernetwork import task_loss
from lohp_jax.networks.policy import NetworkConfig
from lohp_jax.policy.config import FeedbackConfig, HybridConfig
from lohp_jax.policy.feedback import (
    Loop,
    Turn,
    check_family,
    close_loop,
    condition_loss,
    familiarity,
    rule_loss,
    trust_in,
)
from lohp_jax.policy.hybrid import hybrid_loss
from lohp_jax.policy.kernels import Policy, make_policy, roll_out, tube_states
from lohp_jax.policy.windows import views_of
from lohp_jax.types import Method, PyTree, Space, Windowed

_AT_ONCE = 32
"""Tasks whose losses are measured together."""


def lohp_feedback(
    *,
    network: NetworkConfig = NetworkConfig(),
    balance: HybridConfig = HybridConfig(),
    loop: FeedbackConfig = FeedbackConfig(),
) -> Method:
    """Lo-Hp whose policy sees the context loss of the task at each of its N states.

    What the condition says and what the same rule says for every weight are added; a gate trusts the
    condition on tasks that are like the training tasks, see `lohp_jax.policy.feedback`. The family needs
    a `context_loss`. With the gradient in sight it spends N gradients on a task.

    With windows, an update moves the weights of a window and leaves the others of its network in the
    tube around the stored ones; for the gradient it holds the whole trajectories of its batch, those of
    `log_every` updates at a time.

    Args:
      network: sizes of the network that reads the condition.
      balance: the objective, which fixes the kernels; its `condition_dropout` gives way to the shares
        of `loop`.
      loop: what the policy sees and is trained by.

    Raises: ValueError for a network of windows, where the objective needs whole networks.
    """
    whole = "the task loss of generated weights needs all of them"
    check_windows(
        "lohp_feedback", network, balance, whole if loop.objective == "task_loss" else None
    )
    method = Method(
        "lohp_feedback",
        bind=lambda space: _bind(method, space, network, balance, loop),
        check=check_family,
        config=settings(network=network, balance=balance, loop=loop),
        window=network.window,
    )
    return method


def _bind(
    method: Method,
    space: Space,
    network: NetworkConfig,
    balance: HybridConfig,
    config: FeedbackConfig,
) -> Method:
    policy = make_policy(space, network, balance)
    loop = close_loop(policy, space, config)
    views = functools.partial(views_of, policy)
    looks = loop.policy.num_steps
    sees_gradient = config.sees == "gradient"
    return dataclasses.replace(
        method,
        init=lambda key, example: loop.policy.network.init(key, example.context),
        loss=_loss(loop, space, config),
        walk=functools.partial(walk, loop, space),
        calibrate=functools.partial(calibrate, loop, space),
        appraise=functools.partial(appraise, loop, space),
        gradients=looks if sees_gradient else 0,
        forward_passes=2 * looks + 1 + (0 if sees_gradient else looks),
        windowed=None if policy.windows is None else Windowed(policy.windows, views),
        bind=None,
    )


def _loss(loop: Loop, space: Space, config: FeedbackConfig) -> Loss:
    def objective(policy: Policy) -> Loss:
        if config.objective == "balance":
            return functools.partial(hybrid_loss, policy)
        if config.objective == "likelihood":
            return functools.partial(cloning_loss, policy)
        return functools.partial(task_loss, policy, space.family)

    def total(loop: Loop) -> Loss:
        alone = config.rule_alone if config.sees == "gradient" else 0.0  # it never walks alone
        terms = [(alone, objective(loop.blind)), (1.0, objective(loop.policy))]
        return weighted(terms)  # what is reported is that of the whole policy

    def loss_at_window(params, example, key):
        key, around_key = jax.random.split(key)
        around = tube_states(loop.policy, example.around, around_key)
        return total(loop.at_window(example.view, around))(params, example, key)

    return total(loop) if loop.at_window is None else loss_at_window


def walk(
    loop: Loop,
    space: Space,
    params: PyTree,
    context: PyTree,
    key: jax.Array,
    **options: Any,
) -> jax.Array:
    """`Method.walk` of a gated loop; guidance exaggerates what the condition adds to the rule."""
    teacher = teacher_of(space, key)
    _, trust = _gate(loop, space, params, context, teacher)
    return _walk_trusting(loop, params, context, key, teacher, trust, **options)


def _walk_trusting(
    loop: Loop,
    params: PyTree,
    context: PyTree,
    key: jax.Array,
    teacher: jax.Array,
    trust: jax.Array,
    *,
    temperature: jax.Array | float = 0.0,
    num_steps: int | None = None,
    guidance: float = 0.0,
) -> jax.Array:
    """A walk that follows the condition as far as it is trusted."""
    encode = functools.partial(loop.policy.network.encode, params, context)
    return roll_out(
        loop.policy,
        params,
        encode(Turn(trust, 1.0)),
        teacher,
        key,
        temperature=temperature,
        num_steps=num_steps,
        unconditional=encode(Turn(0.0, 1.0)) if guidance else None,
        guidance=guidance,
    )


def calibrate(loop: Loop, space: Space, params: PyTree, contexts: PyTree) -> PyTree:
    """`Method.calibrate`: keeps the losses that familiarity is measured against.

    Args:
      loop: the policy.
      space: where it walks.
      params: as trained.
      contexts: of training tasks, leading axis `NUM_KNOWN`.
    """
    teacher = teacher_of(space, jax.random.key(0))  # training imitates one
    halves = {"condition": condition_loss, "rule": rule_loss}

    def losses(context):
        seen = loop, space, params, context, teacher
        return {half: loss(*seen) for half, loss in halves.items()}

    known = jax.lax.map(losses, contexts, batch_size=_AT_ONCE)
    known = jax.tree.map(lambda x: jnp.sort(jnp.where(jnp.isfinite(x), x, jnp.inf)), known)
    return params | {"known": known}


def appraise(
    loop: Loop, space: Space, params: PyTree, context: PyTree, key: jax.Array
) -> dict[str, jax.Array]:
    """`Method.appraise`: `familiarity` of a task, `trust` in the condition, and `fallbacks`.

    The last counts the steps of a walk along the means at which loss or gradient were not finite.
    """
    teacher = teacher_of(space, key)
    familiar, trust = _gate(loop, space, params, context, teacher)
    states = _walk_trusting(loop, params, context, key, teacher, trust)
    seen = jax.vmap(loop.observe, (None, 0))(context, states[:-1])
    return {"familiarity": familiar, "trust": trust, "fallbacks": jnp.sum(1 - seen.usable)}


def _gate(
    loop: Loop, space: Space, params: PyTree, context: PyTree, teacher: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Familiarity of a task and trust in its condition, in walks after one teacher."""
    loss = condition_loss(loop, space, params, context, teacher)
    known = params["known"]
    return familiarity(known["condition"], loss), trust_in(loop.config, known, loss)
