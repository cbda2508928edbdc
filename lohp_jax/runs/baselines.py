"""What the methods of a run are compared with: generators that need no training over tasks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.baselines import adaptation
from lohp_jax.baselines.erm import erm
from lohp_jax.baselines.retrieval import nearest_task
from lohp_jax.baselines.ridge import ridge
from lohp_jax.evaluation import scores
from lohp_jax.runs.stage import Stage, key_of
from lohp_jax.trajectories.dataset import WindowDataset
from lohp_jax.types import Generator, PyTree, TaskFamily

Announce = Callable[[str], None]

_TUNING_TASKS = 64
_SUPPORT_DRAWS = 4
_MOST_NUMBERS = 2**26
"""End weights of all runs together, beyond which those of windows stay in their store."""
ADAM = "same_support_adam"
"""Tuned Adam on the support, whatever else there is."""
_NEAREST, _RIDGE, _ERM = "nearest_task", "ridge", "erm"
_MULTIPLES = (1, 4, 20)
"""Beside a generator that spends gradients stands Adam with so many times as many."""


def equal_gradients(stage: Stage, generators: dict[str, Generator]) -> dict[str, int]:
    """Rows of Adam on the support beside generators that spend gradients, and how many it has."""
    if stage.family.context_loss is None or not stage.config.evaluation.baselines:
        return {}
    spent = sorted({g.gradients for g in generators.values() if g.gradients})
    numbers = sorted({multiple * number for number in spent for multiple in _MULTIPLES})
    return {f"{ADAM}_{number}": number for number in numbers}


def baseline_names(stage: Stage) -> list[str]:
    """Rows of baselines, without those of `equal_gradients`, in the order they are made."""
    if not stage.config.evaluation.baselines:
        return []
    names = [] if stage.family.context_loss is None else [ADAM]
    names += [_ERM] if _labels_have_names(stage.family) else []
    return names if _too_large(stage) else [*names, _NEAREST, _RIDGE]


def make_baselines(
    stage: Stage, ends: jax.Array | None, equal: dict[str, int], announce: Announce
) -> tuple[dict[str, Generator], dict[str, Any]]:
    """Generators that need no training over tasks, and what results.json says of them.

    That is the settings that were tuned, and why some were left out.
    """
    generators, tuned = {}, {}
    if not stage.config.evaluation.baselines:
        return generators, tuned
    space = stage.gathered.space
    if stage.family.context_loss is not None:
        key = jax.random.fold_in(key_of(stage.config, "evaluate"), 1)
        tuning = scores.draw_tasks(stage.family, key, _TUNING_TASKS, "train")
        for name, num_steps in (equal | {ADAM: None}).items():
            announce(name)
            best = adaptation.tune(
                stage.family, space.theta_0, tuning.data, tuning.contexts, num_steps=num_steps
            )
            tuned[name] = best._asdict()
            generators[name] = adaptation.adam_on_support(stage.family, space.theta_0, best)
    if _labels_have_names(stage.family):
        announce(_ERM)
        training, key = (
            stage.config.training,
            jax.random.fold_in(key_of(stage.config, "evaluate"), 4),
        )
        generators[_ERM], rate = erm(
            stage.family,
            space.theta_0,
            key,
            updates=training.updates,
            batch_size=training.batch_size,
        )
        tuned[_ERM] = {"learning_rate": rate}
    if ends is None:
        reason = f"their end weights are more than {_MOST_NUMBERS} numbers"
        return generators, tuned | {"left_out": dict.fromkeys((_NEAREST, _RIDGE), reason)}
    contexts, ends = stored_contexts(stage), jnp.tile(ends, (_SUPPORT_DRAWS, 1, 1))
    weights = jax.jit(jax.vmap(space.codec.decode))(ends)
    generators[_NEAREST] = nearest_task(stage.family, contexts, weights)
    generators[_RIDGE] = ridge(stage.family, space.codec, contexts, ends)
    return generators, tuned


def stored_contexts(stage: Stage) -> PyTree:
    """Several contexts of every task of the imitated teacher; a leading axis."""
    dataset = stage.gathered.dataset
    rows = jnp.asarray(np.tile(_imitated(stage), _SUPPORT_DRAWS))
    data = jax.tree.map(lambda leaf: leaf[rows], dataset.data)
    key = jax.random.fold_in(key_of(stage.config, "evaluate"), 2)
    return jax.jit(jax.vmap(stage.family.context))(data, jax.random.split(key, len(rows)))


def _labels_have_names(family: TaskFamily) -> bool:
    """Whether a label means the same in every task, so that one network can serve all."""
    return family.num_classes > 0 and family.class_axes is None


def _too_large(stage: Stage) -> bool:
    """Whether the end weights of the imitated teacher's runs are too many to hold for baselines."""
    gathered = stage.gathered
    in_store = isinstance(gathered.dataset, WindowDataset)
    return in_store and len(_imitated(stage)) * gathered.space.codec.mask.size > _MOST_NUMBERS


def training_ends(stage: Stage) -> jax.Array | None:
    """`[S, length, channels]` end weights of the imitated teacher's runs; None if they are too many."""
    dataset, rows = stage.gathered.dataset, _imitated(stage)
    if _too_large(stage):
        return None
    if isinstance(dataset, WindowDataset):
        return jnp.asarray(dataset.read_ends(rows))
    return dataset.tokens[rows, -1]


def _imitated(stage: Stage) -> np.ndarray:
    """Rows of the trajectories of the imitated teacher."""
    return np.flatnonzero(
        np.asarray(stage.gathered.dataset.teacher) == stage.gathered.space.teacher
    )
