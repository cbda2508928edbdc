"""Stage 1 of Lo-Hp: trajectories of many tasks under several optimizers, kept on disk."""

import functools
import math
import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lohp_jax.optimizers import make_optimizer
from lohp_jax.tasks.support import name_canonically
from lohp_jax.trajectories.rollout import diverged, over_tasks, rollout
from lohp_jax.trajectories.store import Store, create
from lohp_jax.types import Params, TaskFamily

_LARGEST_SHARD = 256


def perturb(params: Params, key: jax.Array, *, scale: float) -> Params:
    """`params` plus independent Gaussian noise of standard deviation `scale`."""
    return optax.tree.add_scale(params, scale, optax.tree.random_like(key, params))


def prepare(
    family: TaskFamily,
    directory: str | os.PathLike,
    config: dict,
    *,
    theta_0: Params,
    optimizers: Sequence[str],
    num_tasks: int,
    num_steps: int,
    start: str,
    start_noise: float,
    key: jax.Array,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Store:
    """Runs every optimizer on every task and stores all states; resumes where it stopped.

    Labels are named canonically, see `lohp_jax.tasks.support`. Task i and its start depend on `key`
    and i alone, so all optimizers see the same ones and a resumed run repeats them. Runs that diverge
    are dropped and counted in the store.

    Args:
      family: the tasks; training tasks are sampled.
      directory: of the store.
      config: what decides the trajectories, kept in the store and compared when resuming.
      theta_0: the shared start.
      optimizers: names for `make_optimizer`; `optimizer` in the store is the index here.
      num_tasks: tasks per optimizer.
      num_steps: T.
      start: "shared": theta_0 plus noise; "independent": `family.init` for each task.
      start_noise: standard deviation of that noise.
      key: randomness of tasks, starts and inner losses.
      on_progress: called with trajectories done and wanted after each shard.

    Returns: the store; a trajectory holds `states` `[T + 1, ...]`, `losses` `[T + 1]`, `optimizer` and
      the task's `data`.

    Raises: ValueError for an unknown `start` or optimizer, for another config than that of a store that
      is there, or if every run of an optimizer diverged; OSError if the disk is full, with the shards
      before it intact.
    """
    if start not in ("shared", "independent"):
        raise ValueError(f"prepare: start must be 'shared' or 'independent', got {start!r}.")
    teachers = [make_optimizer(name) for name in optimizers]
    store = create(directory, config)
    begin = family.init
    if start == "shared":
        begin = functools.partial(perturb, theta_0, scale=start_noise)
    num_shards = math.ceil(num_tasks / _LARGEST_SHARD)
    size = math.ceil(num_tasks / num_shards)  # one for all shards: each teacher compiles once
    for index, (name, teacher) in enumerate(zip(optimizers, teachers, strict=True)):
        run = jax.jit(over_tasks(functools.partial(_run, family, teacher, begin, num_steps)))
        kept = 0
        for first in range(0, num_tasks, size):
            shard = f"{index:02d}-{name.partition(':')[0]}-{first:06d}"
            if shard not in store.shards():
                wanted = first + np.arange(size) < num_tasks
                tree, failed = jax.device_get(run(_keys(key, first, size)))
                tree["optimizer"] = np.full(size, index, np.int32)
                tree = jax.tree.map(lambda leaf, good=wanted & ~failed: leaf[good], tree)
                store.write(shard, tree, num_dropped=int((wanted & failed).sum()))
            kept += len(store.shard(shard)["losses"])
            done = index * num_tasks + min(first + size, num_tasks)
            on_progress(done, num_tasks * len(optimizers))
        if not kept:
            raise ValueError(
                f"prepare: all {num_tasks} runs of {name} diverged; lower its learning rate, "
                f"as in '{name.partition(':')[0]}:0.01'."
            )
    return store


@functools.partial(jax.jit, static_argnames="count")
def _keys(key: jax.Array, first: int, count: int) -> jax.Array:
    """Keys of tasks `first` and on; each depends on `key` and the number of its task alone."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(first + jnp.arange(count))


def _run(family, teacher, begin, num_steps, key):
    """One task under one optimizer: what the store keeps, and whether it is of no use."""
    task_key, start_key, loss_key, name_key = jax.random.split(key, 4)
    data = name_canonically(family, family.sample(task_key, "train"), name_key)
    trajectory = rollout(family, teacher, data, begin(start_key), loss_key, num_steps=num_steps)
    kept = {"states": trajectory.states, "losses": trajectory.losses, "data": data}
    return kept, diverged(trajectory)
