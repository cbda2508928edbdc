"""Which optimizer states the steps of a generator stand for."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from lohp_jax.types import Trajectory

Matching = Literal["uniform", "arc_length", "loss", "curvature"]


def match(trajectory: Trajectory, num_states: int, *, how: Matching = "uniform") -> jax.Array:
    """Picks `num_states` states of a trajectory, its start and its end among them.

    States are spread evenly over a quantity that grows along the trajectory: the number of steps
    ("uniform", the choice of Lo-Hp), the distance travelled in weight space ("arc_length"), the total
    change of the loss ("loss"), or the distance travelled plus its turning angle, each as a share of
    its total ("curvature"). Steps are never skipped over backwards and none is picked twice.

    Args:
      trajectory: `T + 1` states.
      num_states: N + 1, between 2 and T + 1.
      how: the quantity.

    Returns: `[num_states]` int32 indices, strictly increasing from 0 to T.

    Raises: ValueError for `num_states` out of range or an unknown `how`.
    """
    if how not in get_args(Matching):
        raise ValueError(f"match: how must be one of {get_args(Matching)}, got {how!r}.")
    total = trajectory.losses.shape[0] - 1
    if not 2 <= num_states <= total + 1:
        raise ValueError(
            f"match: num_states must be between 2 and {total + 1}, the number of states of the "
            f"trajectory; got {num_states}."
        )
    progress = _progress(trajectory, how)
    share = progress / jnp.maximum(progress[-1], jnp.finfo(progress.dtype).tiny)
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
    moves = [jnp.diff(leaf, axis=0).reshape(total, -1) for leaf in jax.tree.leaves(trajectory.states)]
    move = jnp.concatenate(moves, axis=1)
    length = jnp.linalg.norm(move, axis=1)
    if how == "arc_length":
        return _accumulate(length)
    tiny = jnp.finfo(length.dtype).tiny
    cosine = jnp.sum(move[1:] * move[:-1], axis=1) / jnp.maximum(length[1:] * length[:-1], tiny)
    angle = jnp.pad(jnp.arccos(jnp.clip(cosine, -1.0, 1.0)), (1, 0))
    return _accumulate(length / jnp.maximum(length.sum(), tiny) + angle / jnp.maximum(angle.sum(), tiny))


def _accumulate(increments: jax.Array) -> jax.Array:
    return jnp.pad(jnp.cumsum(increments), (1, 0))
