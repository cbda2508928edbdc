"""Gradient descent on the context that a generator sees."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lohp_jax.tasks.door import describe_family
from lohp_jax.tasks.support import support_of
from lohp_jax.trajectories.rollout import over_tasks, rollout
from lohp_jax.types import Generator, Params, PyTree, TaskFamily

WEIGHT_DECAYS = (0.1,)
"""Of AdamW; each more costs as much as all of Adam."""
LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
NUM_STEPS = 600
_RECORD_EVERY = 10


class Tuned(NamedTuple):
    """The best setting found: `learning_rate`, `num_steps` after which to stop, and `weight_decay`."""

    learning_rate: float
    num_steps: int
    weight_decay: float = 0.0


def adapt(
    family: TaskFamily,
    theta_0: Params,
    context: PyTree,
    learning_rate: jax.Array | float,
    *,
    num_steps: int,
    record_every: int = 1,
    weight_decay: jax.Array | float = 0.0,
) -> Params:
    """Adam from theta_0 on the context loss of one task; AdamW with a `weight_decay`.

    Returns: weights with leading axis `num_steps / record_every + 1`.
    """
    on_support = dataclasses.replace(
        family, loss=lambda params, context, key: family.context_loss(params, context)
    )
    run = rollout(
        on_support,
        optax.adamw(learning_rate, weight_decay=weight_decay),  # without decay it is Adam
        context,
        theta_0,
        jax.random.key(0),  # the loss is that of the whole support: nothing is drawn
        num_steps=num_steps,
        record_every=record_every,
    )
    return run.states


def adam_on_support(family: TaskFamily, theta_0: Params, tuned: Tuned) -> Generator:
    """Tuned Adam or AdamW on the context, as a generator.

    Args:
      family: with a `context_loss`.
      theta_0: the shared start.
      tuned: of `tune`.
    """

    def apply(theta_0, context, key, **_):
        states = adapt(
            family,
            theta_0,
            context,
            tuned.learning_rate,
            num_steps=tuned.num_steps,
            record_every=tuned.num_steps,
            weight_decay=tuned.weight_decay,
        )
        return jax.tree.map(lambda leaf: leaf[-1], states)

    return Generator(
        apply,
        theta_0,
        family=family.name,
        check=support_of(family).check,
        gradients=tuned.num_steps,
    )


def tune(
    family: TaskFamily,
    theta_0: Params,
    data: PyTree,
    contexts: PyTree,
    *,
    num_steps: int | None = None,
    weight_decays: Sequence[float] = (0.0,),
) -> Tuned:
    """Picks the setting of Adam or AdamW by the mean query score on training tasks.

    The query examples are those that also score held-out tasks, which favours this baseline: no
    generator was tuned on them.

    Args:
      family: the tasks, with a `context_loss`.
      theta_0: the shared start.
      data: training tasks, leading axis R.
      contexts: their contexts, leading axis R.
      num_steps: how many steps it is to be; None picks one, up to `NUM_STEPS`.
      weight_decays: to pick from: none for Adam, `WEIGHT_DECAYS` for AdamW.
    """
    description = describe_family(family)
    last, every = (NUM_STEPS, _RECORD_EVERY) if num_steps is None else (num_steps, num_steps)

    def scores(setting, data, context):
        rate, decay = setting
        counts = {"num_steps": last, "record_every": every}
        states = adapt(family, theta_0, context, rate, **counts, weight_decay=decay)
        return jax.vmap(lambda p: family.evaluate(p, data)[description.measure])(states)

    @jax.jit
    def by_setting(setting):
        return over_tasks(functools.partial(scores, setting))(data, contexts).mean(axis=0)

    settings = list(itertools.product(LEARNING_RATES, weight_decays))
    table = jnp.stack([by_setting(setting) for setting in settings])
    worst = -jnp.inf if description.higher_is_better else jnp.inf
    table = jnp.where(jnp.isfinite(table), table, worst)
    if num_steps is not None:
        table = table[:, 1:]  # it is not to stay at the start
    best = jnp.argmax(table) if description.higher_is_better else jnp.argmin(table)
    row, step = jnp.unravel_index(best, table.shape)
    rate, decay = settings[int(row)]
    return Tuned(rate, num_steps or max(1, int(step)) * every, decay)
