"""Empirical risk minimisation: one network for all tasks."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lohp_jax.baselines.adaptation import LEARNING_RATES
from lohp_jax.tasks.door import describe_family
from lohp_jax.types import Generator, Params, TaskFamily

WEIGHT_DECAYS = (0.0, 0.03, 0.3)
_VALIDATION_TASKS = 64


class ErmTuned(NamedTuple):
    """The best setting found, of AdamW."""

    learning_rate: float
    weight_decay: float


def erm(
    family: TaskFamily, theta_0: Params, key: jax.Array, *, updates: int, batch_size: int
) -> tuple[Generator, ErmTuned]:
    """Trains one network on all training tasks pooled; a generator that ignores its context.

    With domains as tasks this is the ERM of DomainBed (Gulrajani & Lopez-Paz, 2021), who find that,
    tuned, little beats it where nothing is seen of the new domain. It makes sense where labels have the
    same names in all tasks.

    AdamW minimises the mean inner loss of `batch_size` training tasks, drawn anew for every update. Of
    all `adaptation.LEARNING_RATES` with all `WEIGHT_DECAYS` the best is taken, by the mean score of the
    last network on the query examples of 64 training tasks, which no update sees. This is DomainBed's
    training-domain validation: it sees nothing of the shift to a new domain, and may prefer less decay
    than that would want.

    Args:
      family: the tasks.
      theta_0: the start.
      key: draws tasks.
      updates: of AdamW; those of the generator beside it make the budgets equal.
      batch_size: tasks per update.

    Returns: the generator, and the setting that was picked.

    Raises: ValueError for a number that is not positive, or if no setting gives a finite score.
    """
    if min(updates, batch_size) < 1:
        raise ValueError(
            f"erm: updates and batch_size must be at least 1, got {updates} and {batch_size}."
        )
    description = describe_family(family)
    train_key, validation_key = jax.random.split(key)

    @jax.jit
    @jax.vmap
    def score(params):
        data = jax.vmap(family.sample)(jax.random.split(validation_key, _VALIDATION_TASKS))
        return jax.vmap(lambda task: family.evaluate(params, task)[description.measure])(
            data
        ).mean()

    train = _trainer(family, theta_0, train_key, updates, batch_size)
    best, best_score = None, -np.inf
    for rate in LEARNING_RATES:
        trained = train(rate, jnp.array(WEIGHT_DECAYS))
        found = np.asarray(score(trained)) * (1 if description.higher_is_better else -1)
        found = np.where(np.isfinite(found), found, -np.inf)
        which = int(np.argmax(found))
        if found[which] > best_score:
            params = jax.tree.map(lambda leaf, which=which: leaf[which], trained)
            best, best_score = (params, ErmTuned(rate, WEIGHT_DECAYS[which])), found[which]
    if best is None:
        raise ValueError(f"erm: training at rates {LEARNING_RATES} gave no finite score.")
    return Generator(_constant, best[0], family=family.name), best[1]


def _trainer(
    family: TaskFamily, theta_0: Params, key: jax.Array, updates: int, batch_size: int
) -> Callable[[float, jax.Array], Params]:
    """`(learning_rate, weight_decays [D]) -> params` with leading axis D, on the same draws of tasks."""

    def mean_loss(params, key):
        task_keys, loss_keys = jax.random.split(key, (2, batch_size))
        data = jax.vmap(family.sample)(task_keys)
        return jnp.mean(jax.vmap(family.loss, (None, 0, 0))(params, data, loss_keys))

    def train(learning_rate, weight_decay):
        optimizer = optax.adamw(learning_rate, weight_decay=weight_decay)

        def update(carry, key):
            params, state = carry
            steps, state = optimizer.update(jax.grad(mean_loss)(params, key), state, params)
            return (optax.apply_updates(params, steps), state), None

        start = theta_0, optimizer.init(theta_0)
        (params, _), _ = jax.lax.scan(update, start, jax.random.split(key, updates))
        return params

    return jax.jit(jax.vmap(train, (None, 0)))


def _constant(params: Params, context: object, key: jax.Array, **_: object) -> Params:
    return params
