"""The numbers behind the plots of the report."""

from typing import Any

import jax
import numpy as np

from lohp_jax.codec import Codec
from lohp_jax.evaluation.scores import TaskBatch
from lohp_jax.types import Generator, Params, TaskFamily, Trajectory

_SHOWN_TASKS = 6


def figures(
    family: TaskFamily,
    generator: Generator,
    tasks: TaskBatch,
    *,
    codec: Codec,
    teacher: str,
    taught: Trajectory,
    compression: int,
) -> dict[str, Any]:
    """Generated against stored trajectories on held-out tasks.

    Args:
      family: the tasks.
      generator: with a `path`.
      tasks: held-out tasks, leading axis R.
      codec: standardised tokens.
      teacher: name of the imitated teacher's row.
      taught: its trajectories on the tasks, leading axis R.
      compression: k, optimizer steps per generated step.

    Returns: `projection`, paths of a few tasks in the two principal components of all teacher states;
      `cosine`, of every generated step with the teacher's at the same place; `accuracy_by_step`.
    """
    path = jax.jit(jax.vmap(lambda c, k: generator.path(generator.params, c, k)))
    generated = path(tasks.contexts, tasks.keys)
    matched = jax.tree.map(lambda leaf: leaf[:, ::compression], taught.states)
    ours, theirs = (_tokens(codec, states) for states in (generated, matched))
    num_steps = ours.shape[1] - 1
    steps = (np.arange(num_steps + 1) * compression).tolist()
    return {
        "schema": 1,
        "projection": _project({"lohp": ours, teacher: theirs}, theirs),
        "cosine": {"lohp": _cosines(ours, theirs).tolist()},
        "accuracy_by_step": {
            "lohp": _by_step(family, generated, tasks, steps),
            teacher: _by_step(family, matched, tasks, steps),
        },
    }


def _tokens(codec: Codec, states: Params) -> np.ndarray:
    """`[R, N + 1, D]` standardised weights."""
    tokens = np.asarray(jax.jit(jax.vmap(jax.vmap(codec.encode)))(states))
    return tokens.reshape(*tokens.shape[:2], -1)[..., np.flatnonzero(codec.mask)]


def _project(paths: dict[str, np.ndarray], basis: np.ndarray) -> dict[str, Any]:
    flat = basis.reshape(-1, basis.shape[-1])
    mean = flat.mean(axis=0)
    _, singular, directions = np.linalg.svd(flat - mean, full_matrices=False)
    explained = singular**2 / (singular**2).sum()
    return {
        "explained": explained[:2].tolist(),
        "paths": [
            {"method": method, "task": task, "points": ((p - mean) @ directions[:2].T).tolist()}
            for method, states in paths.items()
            for task, p in enumerate(states[:_SHOWN_TASKS])
        ],
    }


def _cosines(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """`[R * N]` cosine of each generated step with the teacher's."""
    a, b = np.diff(ours, axis=1), np.diff(theirs, axis=1)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return ((a * b).sum(axis=-1) / np.maximum(norms, np.finfo(np.float32).tiny)).reshape(-1)


def _by_step(family, states: Params, tasks: TaskBatch, steps: list[int]) -> dict[str, list]:
    over_steps = jax.vmap(lambda p, d: family.evaluate(p, d)["accuracy"], (0, None))
    scores = np.asarray(jax.jit(jax.vmap(over_steps))(states, tasks.data))
    return {"step": steps, "mean": scores.mean(axis=0).tolist(), "std": scores.std(axis=0).tolist()}
