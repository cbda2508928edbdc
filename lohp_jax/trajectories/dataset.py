"""Stored trajectories as a method is trained on them: coordinates, matched states, tokens."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.codec import make_codec, standard_scale
from lohp_jax.trajectories.matching import Matching, match
from lohp_jax.trajectories.store import Store, take_states
from lohp_jax.types import Codec, Params, PyTree, Space, TaskFamily, Trajectory


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
      tokens: `[R, N + 1, length, channels]`.
      teacher: `[R]` int32.
      data: the tasks, a pytree.
    """

    tokens: jax.Array
    teacher: jax.Array
    data: PyTree


def make_coordinates(store: Store, theta_0: Params) -> Coordinates:
    """The coordinates that fit a store: the unit is how far its trajectories went, root mean square.

    The teacher to imitate is the one that reached the lowest mean inner loss.
    """
    ends = store.load(
        lambda shard: {
            "end": jax.tree.map(lambda leaf: leaf[:, -1], shard["states"]),
            "loss": shard["losses"][:, -1],
            "teacher": shard["teacher"],
        }
    )
    kinds = np.unique(ends["teacher"])
    final = [ends["loss"][ends["teacher"] == kind].mean() for kind in kinds]
    best = jnp.asarray(kinds[int(np.argmin(final))], jnp.int32)
    return Coordinates(theta_0, standard_scale(ends["end"], theta_0), best)


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
    matched = jax.jit(jax.vmap(lambda t: match(t, num_states, how=matching)))

    def select(shard):
        states = shard["states"] if matching in ("arc_length", "curvature") else {}
        indices = np.asarray(matched(Trajectory(states, shard["losses"], None)))
        return {**shard, "states": take_states(shard["states"], indices)}

    loaded = store.load(select)
    tokens = jax.jit(jax.vmap(jax.vmap(codec.encode)))(loaded["states"])
    return Dataset(
        tokens, jnp.asarray(loaded["teacher"]), jax.tree.map(jnp.asarray, loaded["data"])
    )
