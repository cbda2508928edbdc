"""The online mix: a share for each tensor that follows which update the next gradient likes better."""

from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from lohp_jax.checks import check_option, check_positive
from lohp_jax.optimizers.mixing import (
    Group,
    Mixed,
    Mixer,
    Scalars,
    blend,
    group_of,
    inner,
    mix_optimizers,
)
from lohp_jax.optimizers.trees import Tensors, name_of, wide


class OnlineState(NamedTuple):
    """State of the online mix.

    Attributes:
      alpha: by group, the share of the hand-designed update.
      difference: by name of the tensor, U_H - U_L of the last step.
    """

    alpha: Scalars
    difference: Tensors

    def readings(self) -> dict[str, Scalars]:
        """For `hub_diagnostics`."""
        return {"alpha": self.alpha}


def hub_online(
    hand_designed: optax.GradientTransformation,
    learned: optax.GradientTransformation,
    *,
    alpha: float = 0.5,
    rate: float = 0.1,
    bounds: tuple[float, float] = (0.0, 1.0),
    group: Group = "tensor",
) -> optax.GradientTransformationExtraArgs:
    """U = a U_H + (1 - a) U_L, where a descends on the next loss: no gradient beyond the usual one.

    Our extension of HUB. The slope of the loss after a step with respect to the a of that step is
    <g_{t+1}, D_t> with D = U_H - U_L, so that a <- a - rate <g_{t+1}, D_t> / (|g_{t+1}| |D_t|) moves it
    by the cosine between the two. Costs one more array like the parameters.

    Args:
      hand_designed: any optax transformation.
      learned: the same.
      alpha: a at the start, in `bounds`.
      rate: the most that a moves in a step.
      bounds: (low, high) of a.
      group: what shares an a: every "tensor", "layer" or "global"; see `hub`.

    Returns: a transformation whose guard is always on: see `hub`.

    Raises: ValueError for numbers out of range or an unknown option.
    """
    rule = online_mixer(alpha=alpha, rate=rate, bounds=bounds, group=group)
    return mix_optimizers(hand_designed, learned, {"online": rule}, name="hub_online")


def online_mixer(
    *,
    alpha: float = 0.5,
    rate: float = 0.1,
    bounds: tuple[float, float] = (0.0, 1.0),
    group: Group = "tensor",
) -> Mixer:
    """The rule of `hub_online`."""
    check_option("hub_online", "group", group, get_args(Group))
    low, high = bounds
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"hub_online: bounds must be (low, high), 0 <= low <= high <= 1, got {bounds}."
        )
    if not isinstance(alpha, jax.Array) and not low <= alpha <= high:
        raise ValueError(f"hub_online: alpha must be in bounds {bounds}, got {alpha}.")
    check_positive("hub_online", "rate", rate)

    def init(params):
        names = {group_of(path, group) for path, p in params.items() if p.size}
        shares = {name: jnp.clip(jnp.float32(alpha), low, high) for name in sorted(names)}
        return OnlineState(
            shares, {name_of(path): wide(jnp.zeros_like(p)) for path, p in params.items()}
        )

    def mix(proposal, state):
        gradients, ours, theirs, _ = proposal
        last = {path: state.difference[name_of(path)] for path in ours}
        slope = inner(gradients, last, group)
        scale = inner(gradients, gradients, group), inner(last, last, group)
        shares = {}
        for name, old in state.alpha.items():
            norm = jnp.sqrt(scale[0][name]) * jnp.sqrt(scale[1][name])
            known = (norm > 0.0) & jnp.isfinite(norm) & jnp.isfinite(slope[name])
            cosine = jnp.where(known, slope[name], 0.0) / jnp.where(known, norm, 1.0)
            shares[name] = jnp.where(known, jnp.clip(old - rate * cosine, low, high), old)
        updates, difference = {}, {}
        for path, hand in ours.items():
            share = shares[group_of(path, group)] if hand.size else 1.0
            updates[path] = blend(share, hand, theirs[path])
            difference[name_of(path)] = wide(hand) - wide(theirs[path])
        return Mixed(updates, shares, shares, OnlineState(shares, difference))

    return Mixer(init, mix, guarded=True)
