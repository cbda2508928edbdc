"""What the methods of a run are compared with: what a user would try first, and rivals asked for."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.baselines import adaptation
from lohp_jax.baselines.erm import erm
from lohp_jax.baselines.heads import linear_head
from lohp_jax.baselines.mean_weights import mean_weights
from lohp_jax.baselines.retrieval import nearest_task
from lohp_jax.baselines.ridge import ridge
from lohp_jax.baselines.ridge_probe import ridge_probe, tune_probe
from lohp_jax.evaluation import scores
from lohp_jax.runs.rivals import make_rival
from lohp_jax.runs.stage import Stage, key_of
from lohp_jax.trajectories.dataset import WindowDataset
from lohp_jax.types import Generator, PyTree, TaskFamily

Announce = Callable[[str], None]

_TUNING_TASKS = 64
_SUPPORT_DRAWS = 4
_MOST_NUMBERS = 2**26
"""End weights of all runs together, beyond which those of windows stay in their store."""
ADAM, _ADAMW = "same_support_adam", "same_support_adamw"
"""Tuned on the support, whatever else there is."""
_PROBE, _MEAN, _NEAREST, _RIDGE = "ridge_probe", "mean_weights", "nearest_task", "ridge"
_ERM = "erm"
_FROM_ENDS = (_MEAN, _NEAREST, _RIDGE)
_MULTIPLES = (1, 4, 20)
"""Beside a generator that spends gradients stand Adam and AdamW with so many times as many."""


def equal_gradients(stage: Stage, generators: dict[str, Generator]) -> dict[str, int]:
    """Rows of Adam and AdamW beside generators that spend gradients, and how many they have."""
    if stage.family.context_loss is None or not stage.config.evaluation.baselines:
        return {}
    spent = sorted({g.gradients for g in generators.values() if g.gradients})
    numbers = sorted({multiple * number for number in spent for multiple in _MULTIPLES})
    return {f"{name}_{number}": number for name in (ADAM, _ADAMW) for number in numbers}


def baseline_names(stage: Stage) -> list[str]:
    """Rows of baselines, without those of `equal_gradients`, in the order they are made."""
    rivals = list(stage.config.evaluation.rivals)
    if not stage.config.evaluation.baselines:
        return rivals
    names = [] if stage.family.context_loss is None else [ADAM, _ADAMW]
    names += [] if linear_head(stage.family) is None else [_PROBE]
    names += [_ERM] if _labels_have_names(stage.family) else []
    return names + ([] if _too_large(stage) else list(_FROM_ENDS)) + rivals


def make_baselines(
    stage: Stage, ends: jax.Array | None, equal: dict[str, int], announce: Announce
) -> tuple[dict[str, Generator], dict[str, Any]]:
    """Generators to compare with, and what results.json says of them.

    That is the settings that were tuned, seconds of training over tasks, and why some were left out.
    """
    generators: dict[str, Generator] = {}
    about: dict[str, Any] = {}
    settings, key = stage.config.evaluation, key_of(stage.config, "evaluate")
    if not settings.baselines and not settings.rivals:
        return generators, about
    tuning = scores.draw_tasks(stage.family, jax.random.fold_in(key, 1), _TUNING_TASKS, "train")
    if settings.baselines:
        generators, about = _on_support(stage, tuning, equal, announce)
        if _labels_have_names(stage.family):
            announce(_ERM)
            generators[_ERM], about[_ERM] = _pooled(stage, jax.random.fold_in(key, 5))
        if ends is None:
            reason = f"their end weights are more than {_MOST_NUMBERS} numbers"
            about["left_out"] = dict.fromkeys(_FROM_ENDS, reason)
        else:
            generators |= _from_ends(stage, ends)
    for name in settings.rivals:
        announce(name)
        generators[name], about[name] = make_rival(
            stage.family, name, jax.random.fold_in(key, 4), settings.rival_updates, tuning
        )
    return generators, about


def _on_support(
    stage: Stage, tuning: scores.TaskBatch, equal: dict[str, int], announce: Announce
) -> tuple[dict[str, Generator], dict[str, Any]]:
    """What fits each task's support, and what was tuned."""
    family, theta_0 = stage.family, stage.gathered.space.theta_0
    generators: dict[str, Generator] = {}
    tuned: dict[str, Any] = {}
    wanted = {} if family.context_loss is None else equal | {ADAM: None, _ADAMW: None}
    for name, num_steps in wanted.items():
        announce(name)
        decays = adaptation.WEIGHT_DECAYS if name.startswith(_ADAMW) else (0.0,)
        best = adaptation.tune(
            family,
            theta_0,
            tuning.data,
            tuning.contexts,
            num_steps=num_steps,
            weight_decays=decays,
        )
        tuned[name] = best._asdict()
        generators[name] = adaptation.adam_on_support(family, theta_0, best)
    if (head := linear_head(family)) is not None:
        announce(_PROBE)
        probe = tune_probe(family, head, theta_0, tuning.data, tuning.contexts)
        tuned[_PROBE] = probe._asdict()
        generators[_PROBE] = ridge_probe(family, head, theta_0, probe)
    return generators, tuned


def _pooled(stage: Stage, key: jax.Array) -> tuple[Generator, dict[str, Any]]:
    """One network of all training tasks, with the updates of a method, and its setting."""
    training, theta_0 = stage.config.training, stage.gathered.space.theta_0
    sizes = {"updates": training.updates, "batch_size": training.batch_size}
    generator, best = erm(stage.family, theta_0, key, **sizes)
    return generator, best._asdict()


def _from_ends(stage: Stage, ends: jax.Array) -> dict[str, Generator]:
    """What is made of the end weights of training tasks."""
    family, codec = stage.family, stage.gathered.space.codec
    mean = mean_weights(family, codec, ends)
    contexts, ends = stored_contexts(stage), jnp.tile(ends, (_SUPPORT_DRAWS, 1, 1))
    weights = jax.jit(jax.vmap(codec.decode))(ends)
    return {
        _MEAN: mean,
        _NEAREST: nearest_task(family, contexts, weights),
        _RIDGE: ridge(family, codec, contexts, ends),
    }


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
