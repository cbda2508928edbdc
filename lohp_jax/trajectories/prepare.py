"""The weight preparation of Lo-Hp: trajectories of many tasks under several teachers."""

import functools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lohp_jax.checks import check_num_steps, check_option
from lohp_jax.tasks.support import name_canonically
from lohp_jax.trajectories.rollout import diverged, over_tasks, rollout
from lohp_jax.trajectories.store import Store, create
from lohp_jax.trajectories.teachers import Asked, Teacher, make_teachers
from lohp_jax.types import Params, PyTree, TaskFamily

Start = Literal["shared", "independent"]
_LARGEST_SHARD = 256
_MOST_BYTES = 2**28
"""Of the trajectories of a shard, which are in memory together when they are made."""


def perturb(params: Params, key: jax.Array, *, scale: float) -> Params:
    """`params` plus independent Gaussian noise of standard deviation `scale`."""
    return optax.tree.add_scale(params, scale, optax.tree.random_like(key, params))


def prepare(
    family: TaskFamily,
    teachers: Asked | Iterable[Asked],
    *,
    theta_0: Params,
    num_tasks: int,
    num_steps: int,
    record_every: int = 1,
    start: Start = "shared",
    start_noise: float = 0.01,
    key: jax.Array,
    directory: str | os.PathLike | None = None,
    config: dict[str, Any] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Store:
    """Runs every teacher on every task and keeps all states; on disk it resumes where it stopped.

    Labels are named canonically, see `lohp_jax.tasks.support`. Task i and its start depend on `key`
    and i alone, so all teachers see the same ones and a resumed run repeats them. Runs that diverge
    are dropped and counted in the store.

    Args:
      family: the tasks; training tasks are sampled.
      teachers: for `make_teachers`: names, optax transformations, or pairs of both.
      theta_0: the shared start.
      num_tasks: tasks per teacher.
      num_steps: T.
      record_every: steps from one kept state to the next, a divisor of `num_steps`.
      start: "shared": theta_0 plus noise; "independent": `family.init` for each task.
      start_noise: standard deviation of that noise.
      key: randomness of tasks, starts and inner losses.
      directory: of the store; None keeps it in memory.
      config: what else decides the trajectories, as JSON values; kept in the store and compared when
        resuming, as are the arguments above but for the family, theta_0 and what a transformation is.
      on_progress: called with trajectories done and wanted after each shard.

    Returns: the store, verified, with `template` for its trajectories.

    Raises: ValueError for an unknown `start` or teacher, numbers that are not positive, a store that is
      there with another config or structure or with damage, data with PRNG keys, or a teacher all of
      whose runs diverged; FileNotFoundError for missing weights of a learned one; OSError if the disk is
      full, with the shards before it intact.
    """
    check_option("prepare", "start", start, get_args(Start))
    check_num_steps("prepare", num_steps)
    if num_tasks < 1:
        raise ValueError(f"prepare: num_tasks must be at least 1, got {num_tasks}.")
    teachers = make_teachers(teachers, num_steps, theta_0)
    settings = _settings(teachers, num_tasks, num_steps, record_every, start, start_noise, key)
    like = template(family, theta_0, num_steps, record_every)
    store = create(directory, {**(config or {}), **settings}, like)
    store.verify()
    shared = functools.partial(perturb, theta_0, scale=start_noise)
    begin = shared if start == "shared" else family.init
    for index, teacher in enumerate(teachers):
        one = functools.partial(_run, family, teacher, begin, num_steps, record_every)
        todo = index, teacher, num_tasks, key, largest_shard(like)
        for done in _add_shards(store, jax.jit(over_tasks(one)), *todo):
            on_progress(index * num_tasks + done, num_tasks * len(teachers))
    return store


def _settings(
    teachers, num_tasks, num_steps, record_every, start, start_noise, key
) -> dict[str, Any]:
    """What of the arguments decides the trajectories, as JSON values."""
    thinned = {} if record_every == 1 else {"record_every": record_every}
    return thinned | {
        "teachers": [teacher.spec for teacher in teachers],
        "num_tasks": num_tasks,
        "num_steps": num_steps,
        "start": start,
        "start_noise": start_noise,
        "key": np.asarray(jax.random.key_data(key)).tolist(),
    }


def largest_shard(like: PyTree) -> int:
    """Trajectories of a shard, of which one is like `like`: few where they are large."""
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
    return max(1, min(_LARGEST_SHARD, _MOST_BYTES // max(size, 1)))


def template(family: TaskFamily, theta_0: Params, num_steps: int, record_every: int = 1) -> PyTree:
    """Shapes of one stored trajectory, for `open_store`.

    Raises: ValueError for a `record_every` that does not divide `num_steps`.

    Returns: dict of `states` `[T + 1, ...]`, like theta_0; `losses` `[T + 1]`; `teacher`, the index of
      the optimizer; and the task's `data`.
    """
    if record_every < 1 or num_steps % record_every:
        raise ValueError(
            f"prepare: record_every must divide num_steps={num_steps}, got {record_every}."
        )
    count = num_steps // record_every + 1

    def stored(theta_0, key):
        data = name_canonically(family, family.sample(key, "train"), key)
        state = {"states": theta_0, "losses": family.loss(theta_0, data, key)}
        repeated = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), state)
        return repeated | {"teacher": jnp.int32(0), "data": data}

    return jax.eval_shape(stored, theta_0, jax.eval_shape(lambda: jax.random.key(0)))


def _add_shards(
    store: Store,
    run: Callable[[jax.Array], tuple[PyTree, jax.Array]],
    index: int,
    teacher: Teacher,
    num_tasks: int,
    key: jax.Array,
    largest: int,
) -> Iterator[int]:
    """Adds the shards of one teacher that are not there yet; after each yields the tasks so far."""
    kept, label = 0, re.sub(r"[^A-Za-z0-9._-]", "-", teacher.name.partition(":")[0])
    num_shards = math.ceil(num_tasks / largest)
    size = math.ceil(num_tasks / num_shards)  # one for all shards: each teacher compiles once
    for first in range(0, num_tasks, size):
        shard = f"{index:02d}-{label}-{first:06d}"
        if shard not in store.shards():
            wanted = first + np.arange(size) < num_tasks
            tree, failed = jax.device_get(run(_keys(key, first, size)))
            tree["teacher"] = np.full(size, index, np.int32)
            if not (good := wanted & ~failed).all():
                tree = jax.tree.map(lambda leaf, good=good: leaf[good], tree)
            store.write(shard, tree, num_dropped=int((wanted & failed).sum()))
        kept += len(store.shard(shard)["losses"])
        yield min(first + size, num_tasks)
    if not kept:
        raise ValueError(
            f"prepare: all {num_tasks} runs of teacher {teacher.name!r} diverged; lower its learning "
            "rate (in a name after a colon, as in 'adam:0.01') and prepare into another directory. "
            "What was prepared so far is kept."
        )


@functools.partial(jax.jit, static_argnames="count")
def _keys(key: jax.Array, first: int, count: int) -> jax.Array:
    """Keys of tasks `first` and on; each depends on `key` and the number of its task alone."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(first + jnp.arange(count))


def _run(family, teacher, begin, num_steps, record_every, key):
    """One task under one teacher: what the store keeps, and whether it is of no use."""
    task_key, start_key, loss_key, name_key = jax.random.split(key, 4)
    data = name_canonically(family, family.sample(task_key, "train"), name_key)
    counts = {"num_steps": num_steps, "record_every": record_every}
    trajectory = rollout(family, teacher.optimizer, data, begin(start_key), loss_key, **counts)
    kept = {"states": trajectory.states, "losses": trajectory.losses, "data": data}
    return kept, diverged(trajectory)
