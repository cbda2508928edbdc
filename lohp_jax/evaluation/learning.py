"""How well optimizers train: losses along a run, and on the task's query examples at its end."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lohp_jax.optimizers.extra_args import with_extra_args
from lohp_jax.optimizers.meta import bounded
from lohp_jax.types import PyTree, Split, TaskFamily

ADAM_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
"""Learning rates to choose the best from."""
SCORES = {"mean_loss": np.min, "final_loss": np.min, "query_loss": np.min, "accuracy": np.max}
"""What is measured of a run, and how the best is chosen."""
_TAIL = 0.1


def make_trainer(
    family: TaskFamily,
    make_optimizer: Callable[[PyTree, jax.Array], optax.GradientTransformation],
    *,
    split: Split = "train",
    segment: int = 50,
) -> Callable[[PyTree, jax.Array, int], dict[str, np.ndarray]]:
    """Builds training on tasks of a family under every one of several settings of an optimizer.

    It compiles once for all numbers of steps.

    Args:
      family: the tasks.
      make_optimizer: `(setting, num_steps) -> optimizer`, both traced.
      split: where tasks come from.
      segment: steps that are compiled in one piece.

    Returns: `(settings, keys, num_steps) -> scores`, settings with a leading axis S, keys `[N]`, one for
      each task, its start and its batches; num_steps a multiple of `segment`. Scores `[S, N]`:
      `mean_loss`, of training along the run, and `final_loss`, of its last tenth, bounded as in
      meta-training; `query_loss`, bounded, and `accuracy` at the end.
    """

    def begin(setting, key, num_steps):
        params = family.init(jax.random.split(key, 3)[1])
        return params, make_optimizer(setting, num_steps).init(params)

    def advance(setting, key, num_steps, state, first):
        task_key, _, loss_key = jax.random.split(key, 3)
        data = family.sample(task_key, split)
        optimizer = with_extra_args(make_optimizer(setting, num_steps))

        def step(carry, count):
            params, opt_state = carry
            step_key = jax.random.fold_in(loss_key, count)
            value, gradients = jax.value_and_grad(family.loss)(params, data, step_key)
            updates, opt_state = optimizer.update(gradients, opt_state, params, value=value)
            return (optax.apply_updates(params, updates), opt_state), bounded(value)

        state, losses = jax.lax.scan(step, state, first + jnp.arange(segment))
        query = family.evaluate(state[0], data)
        return state, (losses.mean(), bounded(query["loss"]), query["accuracy"])

    begin = jax.jit(_over_settings_and_tasks(begin))
    advance = jax.jit(_over_settings_and_tasks(advance), donate_argnums=3)

    def train(settings, keys, num_steps):
        if num_steps < segment or num_steps % segment:
            raise ValueError(
                f"make_trainer: num_steps must be a multiple of {segment}, got {num_steps}."
            )
        state, losses = begin(settings, keys, num_steps), []
        for first in range(0, num_steps, segment):
            state, (loss, query_loss, accuracy) = advance(settings, keys, num_steps, state, first)
            losses.append(np.asarray(loss))
        return _scores(losses, query_loss, accuracy)

    return train


def _scores(
    losses: list[np.ndarray], query_loss: jax.Array, accuracy: jax.Array
) -> dict[str, np.ndarray]:
    """`SCORES` of the mean losses of every segment and what was measured at the end."""
    tail = max(1, int(_TAIL * len(losses)))
    return {
        "mean_loss": np.mean(losses, axis=0),
        "final_loss": np.mean(losses[-tail:], axis=0),
        "query_loss": np.asarray(query_loss),
        "accuracy": np.asarray(accuracy),
    }


def adam(setting: dict[str, jax.Array], num_steps: jax.Array) -> optax.GradientTransformation:
    """Adam at a learning rate, or with one that falls from it to zero along a cosine.

    Args:
      setting: `rate`, and `cosine`, 1.0 where it falls and 0.0 where it stays.
      num_steps: until it is zero.
    """

    def schedule(count):
        fallen = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(count / num_steps, 1.0)))
        return setting["rate"] * (1 - setting["cosine"] * (1 - fallen))

    return optax.adam(schedule)


def adam_settings(*, cosine: bool) -> dict[str, np.ndarray]:
    """Those of `ADAM_RATES`, for `adam`."""
    return {
        "rate": np.float32(ADAM_RATES),
        "cosine": np.full(len(ADAM_RATES), cosine, np.float32),
    }


def best_of(scores: dict[str, np.ndarray]) -> dict[str, float]:
    """Of each score `[S, N]` the best of the means over tasks, each at a setting of its own."""
    return {name: float(SCORES[name](values.mean(axis=1))) for name, values in scores.items()}


def _over_settings_and_tasks(fn):
    """`fn(setting, key, num_steps, [state, first])`, with axes `[S]`, `[N]`, none, `[S, N]`, none."""

    def over_all(settings, keys, num_steps, *more):
        inner, outer = ((0, None), (0, None)) if more else ((), ())
        over_tasks = jax.vmap(fn, (None, 0, None, *inner))
        return jax.vmap(over_tasks, (0, None, None, *outer))(settings, keys, num_steps, *more)

    return over_all
