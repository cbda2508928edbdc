"""HUB: a learned and a hand-designed optimizer, blended parameter by parameter.

Both see the same gradient and propose an update; a rule says how much of which is taken. In the HUB
paper it is a softmax over the gradient's entries (equation numbers are the paper's). The modes "trust",
"spike" and "online" are ours: `hub_trust`, `hub_spike` and `hub_online` with their defaults.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lohp_jax.checks import check_option
from lohp_jax.optimizers.mixing import (
    Group,
    Guard,
    HubState,
    Mixed,
    Mixer,
    Scalars,
    blend,
    combine,
    group_of,
    mean_by_group,
    mix_optimizers,
)
from lohp_jax.optimizers.online import online_mixer
from lohp_jax.optimizers.spike import spike_mixer
from lohp_jax.optimizers.trees import Path, Tensors, by_path, keys
from lohp_jax.optimizers.trust import TrustSettings, trust_mixer
from lohp_jax.types import PyTree

Mode = Literal["vanilla", "invert", "trust", "spike", "online"]
Bounds = tuple[float, float]
_SOFTMAX = ("vanilla", "invert")


def hub(
    hand_designed: optax.GradientTransformation,
    learned: optax.GradientTransformation,
    *,
    mode: Mode | Callable[[Path], Mode] = "vanilla",
    clip: Bounds | Callable[[Path], Bounds | None] | None = None,
    group: Group = "tensor",
    guard: Guard | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Blends two optimizers by s_i = exp|g_i| / sum_j exp|g_j|, a softmax over a group's entries.

    As published the group is a layer; a tensor is our default, and what most benchmarks have measured.
    "vanilla" takes s of the hand-designed and 1 - s of the learned update (eq. 5), "invert" the other
    way round (eq. 13). The mean of s over a group of K entries is 1 / K whatever the gradient: small
    gradients give a constant blend, one that towers over the others by about log K or more gives its
    entry to one optimizer. So the blend depends on the scale of the loss. "trust", "spike" and
    "online" do not; see `hub_trust`, `hub_spike` and `hub_online`, which also set their numbers.

    One gradient and all extra arguments (`value`, `value_fn`, `grad_fn`, ...) reach both. Under
    `optax.inject_hyperparams`, which calls any function as a schedule, a `mode` or `clip` by path needs
    `static_args=("mode", "clip")`.

    Args:
      hand_designed: any optax transformation, learning rate included, e.g. `optax.adamw(1e-3)`. Its
        weight decay is blended with the rest of its update: vanilla HUB leaves about 1 / K of it; for
        the whole of it put `decay` after the blend.
      learned: the same, e.g. a learned optimizer.
      mode: for all parameters, or a function of the path of a tensor (its keys as strings), which is
        the block-wise form (eqs. 14 and 15), see `block_wise`.
      clip: bounds (low, high) of s (eqs. 16 and 17), for all or by path, in "vanilla" and "invert"; the
        shares of a group then no longer add up to 1. None leaves s alone.
      group: whose entries the softmax is over, or other modes judge together: every "tensor"; as
        published every "layer", all tensors whose paths agree but for the last key, such as the "w" and
        "b" of a Haiku module or the `weight` and `bias` of an Equinox one; or "global", all.
      guard: None, as published: a NaN of either optimizer stays. "finite", our extension: a tensor
        takes the hand-designed update where the learned one is not finite, none where the gradient or
        the hand-designed one is not; its state in the optimizer that failed starts anew (behind
        `optax.masked` or `optax.partition`, every array that is not finite), and a gradient that is not
        finite reaches both as zero. "trust", "spike" and "online" always have it.

    Returns: a transformation whose state is a `HubState`. Masked and None leaves stay out of the
      softmax; leaves without entries pass if both optimizers take them (of the learned rules: `celo2`).
      Under `jit` sums are over the whole of a sharded tensor, inside `jax.shard_map` over a shard.

    Raises: ValueError for an unknown mode, group or guard (with the nearest), bounds that are not
      0 <= low <= high <= 1, or bounds for a mode that has none; in `init` the same by path, and for
      parameters that are no floating-point or complex arrays, or share a path joined by slashes; in
      `update` for a missing `value` with "trust", and for other tensors than `init` saw.
    """
    check_option("hub", "group", group, get_args(Group))
    _check_constants(mode, clip)
    mode_of = mode if callable(mode) else lambda path: mode
    clip_of = clip if callable(clip) else lambda path: clip
    mixers = _make_mixers(mode_of, clip_of, group)

    def select(path):
        chosen = mode_of(path)
        _check_mode(chosen, clip_of(path))
        return "softmax" if chosen in _SOFTMAX else chosen

    return mix_optimizers(hand_designed, learned, mixers, select=select, guard=guard)


def block_wise(is_new: Callable[[Path], bool], *, literal: bool = False) -> Callable[[Path], Mode]:
    """Mode by block, for fine-tuning (eqs. 14 and 15).

    The paper's words lean on the learned optimizer in a new block ("vanilla") and protect pre-trained
    ones ("invert"); its equations say the opposite.

    Args:
      is_new: whether the tensor at a path is new, e.g. `lambda path: path[0] == "head"`.
      literal: follow the equations instead of the words.

    Raises: ValueError, by the function returned, for what is no path.
    """

    def mode(path):
        if not isinstance(path, tuple):
            raise ValueError(
                f"block_wise: expected the path of a tensor, got {path!r}; a schedule is what "
                'optax.inject_hyperparams takes it for without static_args=("mode", "clip").'
            )
        return "vanilla" if bool(is_new(path)) != literal else "invert"

    return mode


def hub_diagnostics(state: optax.OptState) -> dict[str, Any]:
    """What the `HubState` somewhere in a state tells of the blend.

    Returns: "mean_weight" and "max_weight", the hand-designed share by group in the last step;
      "guard_events"; and what the modes in use add: "ratio", "trust" and "failures" of "trust", "alpha"
      of "online".

    Raises: ValueError if there is no `HubState`, or more than one.
    """
    found = [
        leaf
        for leaf in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, HubState))
        if isinstance(leaf, HubState)
    ]
    if len(found) != 1:
        raise ValueError(
            f"hub_diagnostics: expected one HubState in the state, got {len(found)}; "
            "pass the state of one `hub`."
        )
    names = ("mean_weight", "max_weight", "guard_events")
    out = {name: getattr(found[0], name) for name in names}
    for rule in found[0].rules.values():
        out |= rule.readings() if hasattr(rule, "readings") else {}
    return out


# --- the softmax of the paper


def softmax_mixer(
    *, mode_of: Callable[[Path], Mode], clip_of: Callable[[Path], Bounds | None], group: Group
) -> Mixer:
    """The rule of "vanilla" and "invert"; arguments as in `hub_shares`."""

    def mix(proposal, state):
        shares, mean, largest = _softmax_shares(proposal.gradients, mode_of, clip_of, group)
        updates = {
            path: blend(share, proposal.ours[path], proposal.theirs[path])
            for path, share in shares.items()
        }
        return Mixed(updates, mean, largest, state)

    return Mixer(lambda params: (), mix)


def hand_shares(
    gradients: PyTree,
    *,
    mode_of: Callable[[Path], Mode] = lambda path: "vanilla",
    clip_of: Callable[[Path], Bounds | None] = lambda path: None,
    group: Group = "tensor",
) -> PyTree:
    """Share of the hand-designed update in every entry, float32, shaped like `gradients`.

    Args:
      gradients: as both optimizers see them.
      mode_of: "vanilla" or "invert", by path.
      clip_of: bounds of s by path, or None.
      group: what the softmax is over.

    Raises: ValueError for another mode, or bounds that are not 0 <= low <= high <= 1.
    """
    for path in by_path(gradients):
        check_option("hand_shares", "mode", mode_of(path), _SOFTMAX)
        _check_bounds(clip_of(path))
    shares, *_ = _softmax_shares(by_path(gradients), mode_of, clip_of, group)
    return jax.tree.map_with_path(lambda path, _: shares[keys(path)], gradients)


def _softmax_shares(
    gradients: Tensors, mode_of: Callable, clip_of: Callable, group: Group
) -> tuple[Tensors, Scalars, Scalars]:
    """Shares by path, and their mean and largest by group.

    The mean and the largest follow from the sums that the softmax needs, without another look at the
    entries, unless bounds clip them.
    """
    size = {path: jnp.abs(g).astype(jnp.float32) for path, g in gradients.items()}
    held = {path: leaf for path, leaf in size.items() if leaf.size}
    high = {path: jnp.max(leaf) for path, leaf in held.items()}
    top = combine(high, group, jnp.maximum)
    part = {path: jnp.sum(jnp.exp(held[path] - top[group_of(path, group)])) for path in held}
    total = combine(part, group)
    shares, sums, largest = {path: leaf for path, leaf in size.items() if not leaf.size}, {}, {}
    for path, leaf in held.items():
        name, bounds, inverted = group_of(path, group), clip_of(path), mode_of(path) == "invert"

        def share(x, name=name, bounds=bounds, inverted=inverted):
            s = jnp.exp(x - top[name]) * (1.0 / total[name])
            s = s if bounds is None else jnp.clip(s, *bounds)
            return 1.0 - s if inverted else s

        shares[path] = share(leaf)
        largest[path] = share(jnp.min(leaf) if inverted else high[path])
        s = part[path] / total[name]
        sums[path] = leaf.size - s if inverted else s
        if bounds is not None:
            sums[path] = jnp.sum(shares[path])
    return shares, mean_by_group(sums, held, group), combine(largest, group, jnp.maximum)


def _make_mixers(mode_of: Callable, clip_of: Callable, group: Group) -> dict[str, Mixer]:
    """The rules that modes choose from, by name; "softmax" serves `_SOFTMAX`."""
    return {
        "softmax": softmax_mixer(mode_of=mode_of, clip_of=clip_of, group=group),
        "trust": trust_mixer(TrustSettings(group=group)),
        "spike": spike_mixer(group=group),
        "online": online_mixer(group=group),
    }


def _check_constants(mode: Any, clip: Any) -> None:
    """Checks what does not depend on the path."""
    bounds = None if callable(clip) else clip
    if callable(mode):
        _check_bounds(bounds)
    else:
        _check_mode(mode, bounds)


def _check_mode(mode: Any, bounds: Bounds | None) -> None:
    check_option("hub", "mode", mode, get_args(Mode))
    _check_bounds(bounds)
    if bounds is not None and mode not in _SOFTMAX:
        raise ValueError(
            f"hub: clip bounds the softmax of {_SOFTMAX}, got {bounds} with mode {mode!r}; leave it out."
        )


def _check_bounds(bounds: Bounds | None) -> None:
    if bounds is None:
        return
    if np.shape(bounds) != (2,) or not 0 <= bounds[0] <= bounds[1] <= 1:
        raise ValueError(f"hub: clip must be (low, high) with 0 <= low <= high <= 1, got {bounds}.")
