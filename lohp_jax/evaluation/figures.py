"""The numbers behind the plots of the report."""

import functools
from typing import Any

import jax
import numpy as np

from lohp_jax.evaluation.scores import TaskBatch
from lohp_jax.tasks.door import describe_family
from lohp_jax.types import Codec, Generator, Params, TaskFamily, Trajectory

_SHOWN_TASKS = 6


def figures(
    family: TaskFamily,
    generators: dict[str, Generator],
    tasks: TaskBatch,
    *,
    main: str,
    codec: Codec,
    teacher: str,
    taught: Trajectory,
    compression: int,
) -> dict[str, Any]:
    """Generated against stored trajectories on held-out tasks.

    Args:
      family: the tasks.
      generators: by name; of those with a `path`, `main` and what spends gradients are drawn.
      tasks: held-out tasks, leading axis R.
      main: name of the generator of which more is drawn than the score by step.
      codec: standardised tokens.
      teacher: name of the imitated teacher's row.
      taught: its trajectories on the tasks, leading axis R.
      compression: k, optimizer steps per generated step.

    Returns: `projection`, paths of a few tasks in the two principal components of all teacher states;
      `cosine`, of every generated step with the teacher's at the same place, of generators that make
      as many; `score_by_step`, the accuracy or objective, and the `gradients` spent so far.
    """
    matched = jax.tree.map(lambda leaf: leaf[:, ::compression], taught.states)
    theirs = _tokens(codec, matched)
    paths, cosines = {teacher: theirs}, {}
    last = (theirs.shape[1] - 1) * compression
    by_step = {teacher: _by_step(family, matched, tasks, last)}
    for name, generator in generators.items():
        if generator.path is None or (name != main and not generator.gradients):
            continue
        path = jax.jit(jax.vmap(functools.partial(generator.path, generator.params)))
        generated = path(tasks.contexts, tasks.keys)
        by_step[name] = _by_step(family, generated, tasks, last)
        num_states = len(by_step[name]["step"])
        by_step[name]["gradients"] = np.linspace(0, generator.gradients, num_states).tolist()
        if name == main:
            paths[name] = _tokens(codec, generated)
            if paths[name].shape == theirs.shape:
                cosines[name] = _cosines(paths[name], theirs).tolist()
    return {
        "projection": _project(paths, theirs),
        "cosine": cosines,
        "score_by_step": by_step,
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


def _by_step(family, states: Params, tasks: TaskBatch, last: int) -> dict[str, list]:
    """Scores at the states of walks, whose end stands for `last` steps of the optimizer."""
    measure = describe_family(family).measure
    over_steps = jax.vmap(lambda p, d: family.evaluate(p, d)[measure], (0, None))
    scores = np.asarray(jax.jit(jax.vmap(over_steps))(states, tasks.data))
    steps = np.linspace(0, last, scores.shape[1]).tolist()
    return {"step": steps, "mean": scores.mean(axis=0).tolist(), "std": scores.std(axis=0).tolist()}
