"""Stage 1 of Lo-Hp: trajectories of many tasks under several optimizers, kept on disk."""

import functools
import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.optimizers import make_optimizer
from lohp_jax.trajectories.rollout import diverged, rollout
from lohp_jax.trajectories.store import Store, create
from lohp_jax.types import Params, TaskFamily

_SHARD_SIZE = 256


def perturb(params: Params, key: jax.Array, scale: float) -> Params:
    """`params` plus independent Gaussian noise of standard deviation `scale`."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    noisy = [
        p + scale * jax.random.normal(k, p.shape, p.dtype)
        for p, k in zip(leaves, keys, strict=True)
    ]
    return treedef.unflatten(noisy)


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

    Task i and its start depend on `key` and i alone, so all optimizers see the same ones and a
    resumed run repeats them. Runs that diverge are dropped and counted in the store.

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

    Raises: ValueError if every run of an optimizer diverged.
    """
    store = create(directory, config)
    done, total = 0, num_tasks * len(optimizers)
    for index, name in enumerate(optimizers):
        run = jax.jit(
            jax.vmap(functools.partial(_run, family, name, theta_0, num_steps, start, start_noise))
        )
        kept = 0
        for first in range(0, num_tasks, _SHARD_SIZE):
            count = min(_SHARD_SIZE, num_tasks - first)
            shard = f"{index:02d}-{name.replace(':', '-')}-{first:06d}"
            if shard not in store.shards():
                keys = jax.vmap(functools.partial(jax.random.fold_in, key))(
                    first + jnp.arange(count)
                )
                tree, failed = jax.device_get(run(keys))
                tree["optimizer"] = np.full(count, index, np.int32)
                tree = jax.tree.map(lambda leaf, good=~failed: leaf[good], tree)
                store.write(shard, tree, num_dropped=int(failed.sum()))
            kept += store.shard(shard)["losses"].shape[0]
            done += count
            on_progress(done, total)
        if not kept:
            raise ValueError(
                f"prepare: all {num_tasks} runs of {name} diverged; lower its learning rate, "
                f"as in '{name.partition(':')[0]}:0.01'."
            )
    return store


def _run(family, name, theta_0, num_steps, start, start_noise, key):
    """One task under one optimizer: what the store keeps, and whether it failed."""
    task_key, start_key, loss_key = jax.random.split(key, 3)
    data = family.sample(task_key, "train")
    if start == "shared":
        params = perturb(theta_0, start_key, start_noise)
    else:
        params = family.init(start_key)
    trajectory = rollout(family, make_optimizer(name), data, params, loss_key, num_steps=num_steps)
    kept = {"states": trajectory.states, "losses": trajectory.losses, "data": data}
    return kept, diverged(trajectory)
