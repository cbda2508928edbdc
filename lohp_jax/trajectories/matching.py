"""Which optimizer states the steps of a generator stand for."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from lohp_jax.checks import check_option
from lohp_jax.types import Trajectory

Matching = Literal["uniform", "arc_length", "loss", "curvature"]


def match(trajectory: Trajectory, num_states: int, *, how: Matching = "uniform") -> jax.Array:
    """Picks `num_states` states of a trajectory, its start and its end among them.

    States are spread evenly over a quantity that grows along the trajectory: the number of steps
    ("uniform", the choice of Lo-Hp), the distance travelled in weight space ("arc_length"), the
    total change of the loss ("loss"), or the distance travelled plus its turning angle, each as a
    share of its total ("curvature"). Each is the state nearest to its even share, or the next one
    that keeps the order strict.

    Args:
      trajectory: `T + 1` states.
      num_states: N + 1, between 2 and T + 1.
      how: the quantity.

    Returns: `[num_states]` int32 indices, strictly increasing from 0 to T.

    Raises: ValueError for `num_states` out of range or an unknown `how`.
    """
    check_option("match", "how", how, get_args(Matching))
    total = trajectory.losses.shape[0] - 1
    if not 2 <= num_states <= total + 1:
        raise ValueError(
            f"match: num_states must be between 2 and {total + 1}, the number of states of the "
            f"trajectory; got {num_states}."
        )
    progress = _progress(trajectory, how)
    share = _divide(progress, progress[-1])
    rank = jnp.arange(num_states)
    targets = jnp.linspace(0, 1, num_states)
    nearest = jnp.argmin(jnp.abs(share[None, :] - targets[:, None]), axis=1)
    spread = jax.lax.cummax(nearest - rank) + rank
    index = jnp.minimum(spread, total - rank[::-1])
    return index.at[0].set(0).at[-1].set(total).astype(jnp.int32)


def _progress(trajectory: Trajectory, how: Matching) -> jax.Array:
    """`[T + 1]` non-decreasing from 0."""
    total = trajectory.losses.shape[0] - 1
    if how == "uniform":
        return jnp.arange(total + 1.0)
    if how == "loss":
        return _accumulate(jnp.abs(jnp.diff(trajectory.losses)))
    leaves = jax.tree.leaves(trajectory.states)
    moves = jnp.concatenate([jnp.diff(x, axis=0).reshape(total, -1) for x in leaves], axis=1)
    lengths = jnp.linalg.norm(moves, axis=1)
    if how == "arc_length":
        return _accumulate(lengths)
    angles = _turning_angles(_divide(moves, lengths[:, None]))
    return _accumulate(_divide(lengths, lengths.sum()) + _divide(angles, angles.sum()))


def _turning_angles(directions: jax.Array) -> jax.Array:
    """`[T]` angles in radians between each of `[T, D]` unit moves and the move before it.

    The first has none before it, and a move of length zero, given as zeros, turns nowhere.
    """
    moved = jnp.any(directions != 0, axis=1)
    cosines = jnp.clip(jnp.sum(directions[1:] * directions[:-1], axis=1), -1.0, 1.0)
    return jnp.pad(jnp.where(moved[1:] & moved[:-1], jnp.arccos(cosines), 0.0), (1, 0))


def _divide(x: jax.Array, total: jax.Array) -> jax.Array:
    """`x / total` for 0 <= total, and 0 where the total is 0."""
    return jnp.where(total > 0, x / jnp.where(total > 0, total, 1), 0)


def _accumulate(increments: jax.Array) -> jax.Array:
    return jnp.pad(jnp.cumsum(increments), (1, 0))
