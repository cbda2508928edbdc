"""Stored trajectories as a method is trained on them: coordinates, matched states, tokens.

A `Dataset` holds all tokens in memory. A `WindowDataset` leaves them in the store, which on disk is
memory-mapped, and reads the windows that an update needs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.checks import check_option
from lohp_jax.codec import floored, make_codec, standard_scale
from lohp_jax.trajectories.matching import Matching, match
from lohp_jax.trajectories.store import Store, take_states
from lohp_jax.types import MIXED, Codec, Params, PyTree, Space, TaskFamily, Trajectory, Windows
from lohp_jax.windows import flat_leaves, join_tokens, make_windows, spans_in, standardise

_MOST_ENDS = 2**26
"""Numbers of all end weights together beyond which their scale is taken run by run."""


class Coordinates(NamedTuple):
    """The coordinates in which weights are generated; saved in every checkpoint.

    Attributes:
      theta_0: the shared start, the origin.
      scale: one number per leaf, the unit.
      teacher: int32 scalar, the kind of trajectory to imitate.
    """

    theta_0: Params
    scale: PyTree
    teacher: jax.Array


class Dataset(NamedTuple):
    """All stored trajectories at their matched states; leading axis R.

    Attributes:
      tokens: `[R, N + 1, length, channels]`; None where they are left in a store.
      teacher: `[R]` int32.
      data: the tasks, a pytree.
    """

    tokens: jax.Array | None
    teacher: jax.Array
    data: PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class WindowDataset:
    """Stored trajectories whose weights stay in their store.

    Attributes:
      store: of `prepare`.
      codec: of a `Space`.
      matched: `[R, N + 1]` which states of each trajectory are meant.
      ends: `[shards]` number of the trajectories in each shard and those before it.
      rows: teachers and tasks, without tokens.
    """

    store: Store
    codec: Codec
    matched: np.ndarray
    ends: np.ndarray
    rows: Dataset

    @property
    def teacher(self) -> jax.Array:
        """`[R]` int32, as of a `Dataset`."""
        return self.rows.teacher

    @property
    def data(self) -> PyTree:
        """The tasks, as of a `Dataset`."""
        return self.rows.data

    def read(self, windows: Windows, row: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Windows of trajectories, standardised; nothing else is read, or stays mapped.

        Args:
          windows: how the tokens are cut.
          row: `[B]` trajectories.
          index: `[B]` windows, one of each trajectory.

        Returns: `[B, N + 1, size, channels]`.
        """
        channels, num_states = self.codec.mask.shape[1], self.matched.shape[1]
        dtype = jnp.result_type(jnp.float32, *(leaf.dtype for leaf in self.codec.leaves))
        found = np.zeros((len(row), num_states, windows.size * channels), dtype)
        owner = np.searchsorted(self.ends, row, side="right")
        for shard in np.unique(owner):
            name = self.store.shards()[shard]
            leaves = flat_leaves(jax.tree.leaves(self.store.shard(name)["states"]), 2)
            for i in np.flatnonzero(owner == shard):
                within = int(row[i]) - int(self.ends[shard])  # from the end of the shard
                for span in spans_in(windows, index[i]):
                    values = _at(leaves[span.leaf.number], within, self.matched[row[i]], span.index)
                    values = standardise(self.codec, span, values.astype(dtype))
                    found[i, :, span.start : span.stop] = values
        return found.reshape(len(row), num_states, windows.size, channels)

    def read_whole(self, row: np.ndarray) -> np.ndarray:
        """`[B, N + 1, length, channels]` trajectories, standardised and whole."""
        codec, num_states = self.codec, self.matched.shape[1]
        blocks = codec.shared_length, (codec.length - codec.shared_length)
        windows = make_windows(codec, max(blocks[0], blocks[1] // max(codec.num_classes, 1)))
        tokens = np.zeros((len(row), num_states, *codec.mask.shape), np.float32)
        for i, r in enumerate(row):
            pieces = self.read(windows, np.full(windows.count, r), np.arange(windows.count))
            for state in range(num_states):
                tokens[i, state] = join_tokens(windows, pieces[:, state])
        return tokens

    def read_ends(self, row: np.ndarray) -> np.ndarray:
        """`[B, length, channels]` end weights of trajectories, standardised and whole."""
        return dataclasses.replace(self, matched=self.matched[:, -1:]).read_whole(row)[:, 0]


def _at(leaf: np.ndarray, row: int, times: np.ndarray, index: slice | np.ndarray) -> np.ndarray:
    """`[N + 1, n]` numbers of a trajectory `[R, T + 1, size]` at some times."""
    if isinstance(index, slice):
        return np.asarray(leaf[row, times, index])
    return np.asarray(leaf[row, times[:, None], index[None]])


def make_coordinates(store: Store, theta_0: Params) -> Coordinates:
    """The coordinates that fit a store: the unit is how far its trajectories went, root mean square.

    The teacher to imitate is the one that reached the lowest mean inner loss.
    """
    runs = store.load(lambda shard: {"loss": shard["losses"][:, -1], "teacher": shard["teacher"]})
    kinds = np.unique(runs["teacher"])
    final = [runs["loss"][runs["teacher"] == kind].mean() for kind in kinds]
    best = jnp.asarray(kinds[int(np.argmin(final))], jnp.int32)
    return Coordinates(theta_0, _scale_of(store, theta_0), best)


def _scale_of(store: Store, theta_0: Params) -> PyTree:
    """`standard_scale` of the ends of all trajectories; of large ones, run by run."""
    if len(store) * sum(leaf.size for leaf in jax.tree.leaves(theta_0)) > _MOST_ENDS:
        return _scale_run_by_run(store, theta_0)
    ends = store.load(lambda shard: jax.tree.map(lambda leaf: leaf[:, -1], shard["states"]))
    return standard_scale(ends, theta_0)


def _scale_run_by_run(store: Store, theta_0: Params) -> PyTree:
    """`standard_scale`, up to rounding, with one leaf of one trajectory in memory."""
    starts, structure = jax.tree.flatten(jax.tree.map(np.asarray, theta_0))
    total = np.zeros(len(starts))
    for name in store.shards():
        for row in range(len(store.shard(name)["losses"])):
            ends = jax.tree.leaves(store.shard(name)["states"])
            for i, (end, start) in enumerate(zip(ends, starts, strict=True)):
                moved = end[row, -1].astype(np.float64) - start
                total[i] += np.sum(np.square(moved)) / max(moved.size, 1)
    rms = np.sqrt(total / len(store))
    return structure.unflatten(list(floored(jnp.asarray(rms, jnp.float32))))


def make_space(
    family: TaskFamily,
    coordinates: Coordinates,
    *,
    channels: int,
    num_steps: int,
    num_teachers: int,
) -> Space:
    """What a method may know of `family` in these coordinates.

    Args:
      family: the tasks.
      coordinates: of `make_coordinates`.
      channels: weights per token.
      num_steps: N, steps of a walk.
      num_teachers: how many kinds of trajectories there are.
    """
    codec = make_codec(
        coordinates.theta_0,
        channels=channels,
        reference=coordinates.theta_0,
        scale=coordinates.scale,
        class_axes=family.class_axes,
    )
    teacher = int(coordinates.teacher)
    return Space(family, codec, coordinates.theta_0, num_steps, num_teachers, teacher)


def imitating(space: Space, imitate: str, teachers: Sequence[str]) -> Space:
    """The space in which walks follow some teacher.

    Args:
      space: of trajectories of these teachers.
      imitate: the name of one; "best", the one that reached the lowest mean inner loss; or "mixed",
        any of them, drawn anew for every walk.
      teachers: their names.

    Raises: ValueError for another name.
    """
    check_option("imitate", "a teacher", imitate, ("best", "mixed", *teachers))
    if imitate == "best":
        return space
    kinds = {"mixed": MIXED} | {name: number for number, name in enumerate(teachers)}
    return space._replace(teacher=kinds[imitate])


def make_dataset(
    store: Store, codec: Codec, num_states: int, *, matching: Matching = "uniform"
) -> Dataset:
    """Encodes the matched states of every stored trajectory; reads no others.

    Args:
      store: of `prepare`.
      codec: of a `Space`.
      num_states: N + 1.
      matching: how the matched states are spread over a trajectory.
    """
    matched = _matcher(num_states, matching)

    def select(shard):
        return {**shard, "states": take_states(shard["states"], matched(shard))}

    loaded = store.load(select)
    tokens = jax.jit(jax.vmap(jax.vmap(codec.encode)))(loaded["states"])
    return Dataset(
        tokens, jnp.asarray(loaded["teacher"]), jax.tree.map(jnp.asarray, loaded["data"])
    )


def make_window_dataset(
    store: Store, codec: Codec, num_states: int, *, matching: Matching = "uniform"
) -> WindowDataset:
    """Finds the matched states of every stored trajectory; their weights stay in the store.

    Args: as of `make_dataset`.
    """
    matched = _matcher(num_states, matching)
    loaded = store.load(
        lambda shard: {
            "matched": matched(shard),
            **{name: shard[name] for name in ("teacher", "data")},
        }
    )
    data = jax.tree.map(jnp.asarray, loaded["data"])
    rows = Dataset(None, jnp.asarray(loaded["teacher"]), data)
    ends = np.cumsum([len(store.shard(name)["losses"]) for name in store.shards()])
    return WindowDataset(store, codec, loaded["matched"], ends, rows)


def _matcher(num_states: int, matching: Matching) -> Callable[[PyTree], np.ndarray]:
    """`(shard) -> [R, num_states]` indices of the matched states."""
    matched = jax.jit(jax.vmap(lambda t: match(t, num_states, how=matching)))

    def of(shard):
        states = shard["states"] if matching in ("arc_length", "curvature") else {}
        return np.asarray(matched(Trajectory(states, shard["losses"], None)))

    return of
