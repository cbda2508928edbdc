"""What HUB competes with: a constant blend, and the size of one update on the direction of another."""

from typing import Literal, get_args

import jax.numpy as jnp
import optax

from lohp_jax.checks import check_fraction, check_option
from lohp_jax.optimizers.mixing import (
    Group,
    Guard,
    Mixed,
    Mixer,
    blend,
    group_of,
    mix_optimizers,
    norm_ratios,
    sizes_by_group,
)


def constant_blend(
    hand_designed: optax.GradientTransformation,
    learned: optax.GradientTransformation,
    weight: float | Literal["size"],
    *,
    group: Group = "tensor",
    guard: Guard | None = None,
) -> optax.GradientTransformationExtraArgs:
    """U = w U_H + (1 - w) U_L.

    Args:
      hand_designed: any optax transformation.
      learned: the same.
      weight: w in [0, 1], or "size": 1 / K in a group of K entries, which is the mean share of vanilla
        HUB, and its whole share where all gradients of a group are of one size.
      group: whose entries "size" counts.
      guard: as in `hub`.

    Raises: ValueError for a weight out of range or an unknown option.
    """
    check_option("constant_blend", "group", group, get_args(Group))
    if isinstance(weight, str):
        check_option("constant_blend", "weight", weight, ("size",))
    else:
        check_fraction("constant_blend", "weight", weight)

    def mix(proposal, state):
        sizes = sizes_by_group(proposal.ours, group)
        weights = {
            name: jnp.float32(1.0 / size if isinstance(weight, str) else weight)
            for name, size in sizes.items()
        }
        updates = {
            path: blend(weights.get(group_of(path, group), 1.0), hand, proposal.theirs[path])
            for path, hand in proposal.ours.items()
        }
        return Mixed(updates, weights, weights, state)

    rule = {"constant": Mixer(lambda params: (), mix)}
    return mix_optimizers(hand_designed, learned, rule, guard=guard, name="constant_blend")


def graft(
    magnitude: optax.GradientTransformation,
    direction: optax.GradientTransformation,
    *,
    group: Group = "tensor",
    guard: Guard | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Grafting (Agarwal et al., 2020): U = |U_m| U_d / |U_d|, one's norm and the other's direction.

    Where the direction is zero, so is the update; where a norm is beyond float32 it is U_m.

    Args:
      magnitude: says how far, e.g. `optax.adam(1e-3)`.
      direction: says where to, e.g. a learned optimizer.
      group: what a norm is over: every "tensor", "layer" or "global"; see `hub`.
      guard: as in `hub`, with `magnitude` in the part of the hand-designed optimizer.

    Raises: ValueError for an unknown option.
    """
    check_option("graft", "group", group, get_args(Group))

    def mix(proposal, state):
        _, ours, theirs, _ = proposal
        scales, updates = norm_ratios(ours, theirs, group), {}
        for path, leaf in theirs.items():
            scale = scales.get(group_of(path, group), jnp.float32(0.0))  # if without entries
            grafted = (scale * leaf).astype(leaf.dtype)
            updates[path] = jnp.where(jnp.isinf(scale), ours[path], grafted)
        return Mixed(updates, {}, {}, state)

    rule = {"graft": Mixer(lambda params: (), mix)}
    return mix_optimizers(magnitude, direction, rule, guard=guard, name="graft")
