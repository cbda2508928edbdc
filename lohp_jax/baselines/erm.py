"""Empirical risk minimisation: one network for all tasks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lohp_jax.baselines.adaptation import LEARNING_RATES
from lohp_jax.tasks.door import describe_family
from lohp_jax.types import Generator, Params, TaskFamily

_VALIDATION_TASKS = 64


def erm(
    family: TaskFamily, theta_0: Params, key: jax.Array, *, updates: int, batch_size: int
) -> tuple[Generator, float]:
    """Trains one network on all training tasks pooled; a generator that ignores its context.

    With domains as tasks this is the ERM of DomainBed (Gulrajani & Lopez-Paz, 2021), who find that,
    tuned, little beats it where nothing is seen of the new domain. It makes sense where labels have the
    same names in all tasks.

    Adam minimises the mean inner loss of `batch_size` training tasks, drawn anew for every update. Its
    rate is the best of `adaptation.LEARNING_RATES` by the mean score of the last network on the query
    examples of 64 training tasks, which no update sees: the training-domain validation of DomainBed.

    Args:
      family: the tasks.
      theta_0: the start.
      key: draws tasks.
      updates: of Adam; those of the generator beside it make the budgets equal.
      batch_size: tasks per update.

    Returns: the generator, and the rate that was picked.

    Raises: ValueError for a number that is not positive, or if no rate gives a finite score.
    """
    if min(updates, batch_size) < 1:
        raise ValueError(
            f"erm: updates and batch_size must be at least 1, got {updates} and {batch_size}."
        )
    description = describe_family(family)
    train_key, validation_key = jax.random.split(key)

    def mean_loss(params, key):
        task_keys, loss_keys = jax.random.split(key, (2, batch_size))
        data = jax.vmap(family.sample)(task_keys)
        return jnp.mean(jax.vmap(family.loss, (None, 0, 0))(params, data, loss_keys))

    @jax.jit
    def train(rate):
        optimizer = optax.adam(rate)

        def update(carry, key):
            params, state = carry
            steps, state = optimizer.update(jax.grad(mean_loss)(params, key), state, params)
            return (optax.apply_updates(params, steps), state), None

        start = theta_0, optimizer.init(theta_0)
        (params, _), _ = jax.lax.scan(update, start, jax.random.split(train_key, updates))
        data = jax.vmap(family.sample)(jax.random.split(validation_key, _VALIDATION_TASKS))
        scored = jax.vmap(lambda task: family.evaluate(params, task)[description.measure])(data)
        return params, scored.mean()

    trained = [train(rate) for rate in LEARNING_RATES]
    scores = np.array([score for _, score in trained])
    if not np.isfinite(scores).any():
        raise ValueError(f"erm: training at rates {LEARNING_RATES} gave no finite score.")
    best = int((np.nanargmax if description.higher_is_better else np.nanargmin)(scores))
    generator = Generator(_constant, trained[best][0], family=family.name)
    return generator, LEARNING_RATES[best]


def _constant(params: Params, context: object, key: jax.Array, **_: object) -> Params:
    return params
