"""Rivals at few-shot regression of sines: MAML, ridge on random features, Adam on the support.

MAML (Finn et al., 2017): a perceptron of 40-40 rectified units, one inner step on K points in training,
25 tasks per update. Its inner rate, 0.01 as published or a larger one, is picked on training tasks, as
are the rates of the others. All are then scored on the same held-out tasks, by the mean squared error
at 100 evenly spaced inputs.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lohp_jax.baselines.meta_learning import descend, train_maml
from lohp_jax.tasks.regression import sine_regression
from lohp_jax.types import Params, PyTree, TaskFamily

SHOTS = (5, 10)
STEPS = (1, 5, 10)
INNER_RATES = (0.01, 0.03)
ADAM_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
ADAM_STEPS = (1, 5, 10, 20, 50, 100, 200, 500, 1000)
LENGTHS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
PENALTIES = (1e-13, 1e-12, 1e-11, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
NUM_FEATURES = 256
NUM_TUNING = 200


def adam_path(
    family: TaskFamily, params: Params, data: PyTree, context: PyTree, *, rate: jax.Array
) -> jax.Array:
    """`[len(ADAM_STEPS)]` objective of Adam on the context after each of `ADAM_STEPS`."""
    optimizer = optax.adam(rate)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(family.context_loss)(params, context), state)
        return (optax.apply_updates(params, updates), state), None

    carry, objectives = (params, optimizer.init(params)), []
    for num_steps in np.diff(ADAM_STEPS, prepend=0):
        carry, _ = jax.lax.scan(step, carry, None, int(num_steps))
        objectives.append(family.evaluate(carry[0], data)["objective"])
    return jnp.stack(objectives)


def ridge(key: jax.Array) -> TaskFamily:
    """Ridge regression on random Fourier features (Rahimi and Recht, 2007) of a Gaussian kernel.

    Its params are the support, `x` and `y` `[K, 1]`, `length` of the kernel and `penalty` of the squared
    weights.

    Args:
      key: of the features.
    """
    frequency_key, phase_key = jax.random.split(key)
    frequencies = jax.random.normal(frequency_key, (1, NUM_FEATURES))
    phases = jax.random.uniform(phase_key, (1, NUM_FEATURES), maxval=2 * jnp.pi)

    def features(params, x):
        angles = x @ frequencies / params["length"] + phases
        return jnp.sqrt(2 / NUM_FEATURES) * jnp.cos(angles)

    def predict(params, x):
        left, sizes, right = jnp.linalg.svd(features(params, params["x"]), full_matrices=False)
        shrunk = (sizes / (sizes**2 + params["penalty"]))[:, None] * (left.T @ params["y"])
        return features(params, x) @ (right.T @ shrunk)

    one = jnp.ones((1, 1))
    return sine_regression(
        lambda key: {"x": one, "y": one, "length": jnp.ones(()), "penalty": jnp.ones(())}, predict
    )


def tasks_and_contexts(
    family: TaskFamily, key: jax.Array, split: str, num_tasks: int
) -> tuple[PyTree, PyTree]:
    """`num_tasks` tasks of a split, and one context of each."""

    def one(key):
        task_key, context_key = jax.random.split(key)
        data = family.sample(task_key, split)
        return data, family.context(data, context_key)

    return jax.jit(jax.vmap(one))(jax.random.split(key, num_tasks))


def score_maml(
    family: TaskFamily, params: Params, rate: jax.Array, tasks: tuple[PyTree, PyTree]
) -> jax.Array:
    """`[len(STEPS)]` mean objective over tasks after each of `STEPS` on the context."""

    def objectives(data, context):
        adapted, found = params, []
        for num_steps in np.diff(STEPS, prepend=0):
            adapted = descend(family, adapted, context, rate=rate, num_steps=num_steps)
            found.append(family.evaluate(adapted, data)["objective"])
        return jnp.stack(found)

    return jnp.mean(jax.vmap(objectives)(*tasks), axis=0)


def score_adam(
    family: TaskFamily, key: jax.Array, rate: jax.Array, tasks: tuple[PyTree, PyTree]
) -> jax.Array:
    """`[len(ADAM_STEPS)]` mean objective over tasks of Adam from a random start."""
    path = functools.partial(adam_path, family, family.init(key), rate=rate)
    return jnp.mean(jax.vmap(path)(*tasks), axis=0)


def score_ridge(
    key: jax.Array, setting: tuple[jax.Array, jax.Array], tasks: tuple[PyTree, PyTree]
) -> jax.Array:
    """Mean objective over tasks of ridge on random features; `setting` is (length, penalty)."""
    family = ridge(key)

    def objective(data, context):
        params = {**context, "length": setting[0], "penalty": setting[1]}
        return family.evaluate(params, data)["objective"]

    return jnp.mean(jax.vmap(objective)(*tasks))


def maml_rows(
    family: TaskFamily, tuning: Any, tasks: Any, keys: jax.Array, updates: int
) -> list[dict[str, Any]]:
    """MAML with the inner rate that is best on training tasks, at each number of steps."""
    train = functools.partial(train_maml, family, updates=updates, query_loss=family.loss)
    score = jax.jit(functools.partial(score_maml, family))
    rates = jnp.float32(INNER_RATES)
    over_rates = jax.vmap(lambda key, rate: train(key, inner_rate=rate), (None, 0))
    starts = jax.jit(jax.vmap(over_rates, (0, None)))(keys, rates)
    rows = []
    for seed in range(len(keys)):
        of_rate = [jax.tree.map(lambda leaf, i=i: leaf[seed, i], starts) for i in range(len(rates))]  # noqa: B023
        tuned = np.stack([score(p, r, tuning) for p, r in zip(of_rate, rates, strict=True)])
        scores = np.stack([score(p, r, tasks) for p, r in zip(of_rate, rates, strict=True)])
        for column, num_steps in enumerate(STEPS):
            best = int(_finite(tuned[:, column]).argmin())
            settings = {"rate": INNER_RATES[best], "updates": updates}
            rows.append(as_row("maml", num_steps, settings, seed, scores[best, column]))
    return rows


def adam_rows(family: TaskFamily, tuning: Any, tasks: Any, keys: jax.Array) -> list[dict[str, Any]]:
    """Adam on the support, at each number of steps and at the best one."""
    score = jax.jit(functools.partial(score_adam, family))
    which = [("same_support_adam", [ADAM_STEPS.index(num_steps)]) for num_steps in STEPS]
    which.append(("same_support_adam_best", list(range(len(ADAM_STEPS)))))
    rows = []
    for seed, key in enumerate(keys):
        tuned = np.stack([score(key, rate, tuning) for rate in ADAM_RATES])
        for method, columns in which:
            picked = _finite(tuned[:, columns])
            row, column = np.unravel_index(picked.argmin(), picked.shape)
            rate, column = ADAM_RATES[row], columns[column]
            objective = score(key, rate, tasks)[column]
            rows.append(as_row(method, ADAM_STEPS[column], {"rate": rate}, seed, objective))
    return rows


def ridge_rows(tuning: Any, tasks: Any, keys: jax.Array) -> list[dict[str, Any]]:
    """Ridge on random features, at the best length and penalty."""
    score = jax.jit(score_ridge)
    rows = []
    for seed, key in enumerate(keys):
        settings = list(itertools.product(LENGTHS, PENALTIES))
        tuned = _finite(np.stack([score(key, setting, tuning) for setting in settings]))
        best = settings[int(tuned.argmin())]
        names = {"length": best[0], "penalty": best[1]}
        rows.append(as_row("ridge_random_features", 0, names, seed, score(key, best, tasks)))
    return rows


def constant_row(family: TaskFamily, tasks: Any) -> dict[str, Any]:
    """The mean of the training y, whatever x is."""
    params = family.init(jax.random.key(0))
    chance = jax.vmap(lambda data: family.evaluate(params, data)["chance"])(tasks[0])
    return as_row("constant", 0, {}, 0, jnp.mean(chance))


def _finite(objectives: np.ndarray) -> np.ndarray:
    """Objectives, infinite where a task diverged, so that no such setting is picked."""
    return np.where(np.isfinite(objectives), objectives, np.inf)


def as_row(
    method: str, gradients: int, settings: dict[str, float], seed: int, objective: Any
) -> dict[str, Any]:
    """One line of the results."""
    row = {"method": method, "gradients": gradients, "settings": settings, "seed": seed}
    return {**row, "objective": float(objective)}
