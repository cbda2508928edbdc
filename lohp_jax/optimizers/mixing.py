"""What all ways to mix a hand-designed and a learned optimizer share: running both, and the guard.

A `Mixer` is the rule that makes one update of two. It sees its tensors as dicts by path and holds a
state of its own; `mix_optimizers` makes an optax transformation of it.
"""

import functools
import operator
from collections.abc import Callable, Set
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from lohp_jax.checks import check_option
from lohp_jax.optimizers.extra_args import with_extra_args
from lohp_jax.optimizers.guard import not_finite, repair, replace
from lohp_jax.optimizers.trees import (
    Path,
    Tensors,
    by_path,
    check_params,
    check_same_params,
    wide,
)
from lohp_jax.types import PyTree

Group = Literal["tensor", "layer", "global"]
Guard = Literal["finite"]
Scalars = dict[str, jax.Array]


class HubState(NamedTuple):
    """State of `hub` and its relatives.

    Attributes:
      hand_designed: state of the hand-designed optimizer.
      learned: state of the learned optimizer.
      mean_weight: by group, the mean share of the hand-designed update in the last step.
      max_weight: by group, the largest such share.
      guard_events: int32, tensors that the guard has replaced so far.
      rules: by name, the state of every rule in use.
    """

    hand_designed: optax.OptState
    learned: optax.OptState
    mean_weight: Scalars
    max_weight: Scalars
    guard_events: jax.Array
    rules: dict[str, PyTree]


class Proposal(NamedTuple):
    """What a rule decides on: by path, gradients and both updates; the loss, None if not given."""

    gradients: Tensors
    ours: Tensors
    theirs: Tensors
    value: jax.Array | None


class Mixed(NamedTuple):
    """What a rule decides: updates by path; mean and largest share by group; its next state."""

    updates: Tensors
    mean_weight: Scalars
    max_weight: Scalars
    state: PyTree


class Mixer(NamedTuple):
    """A rule: `init(params by path) -> state` and `mix(proposal, state) -> Mixed`.

    If `guarded`, it always has the guard, so that it sees nothing that is not finite.
    """

    init: Callable[[Tensors], PyTree]
    mix: Callable[[Proposal, PyTree], Mixed]
    guarded: bool = False


def mix_optimizers(
    hand_designed: optax.GradientTransformation,
    learned: optax.GradientTransformation,
    mixers: dict[str, Mixer],
    *,
    select: Callable[[Path], str] | None = None,
    guard: Guard | None = None,
    name: str = "hub",
) -> optax.GradientTransformationExtraArgs:
    """Runs both optimizers on the same gradient and lets a rule mix every tensor.

    Args:
      hand_designed: any optax transformation.
      learned: the same.
      mixers: rules by name.
      select: name of the rule for the tensor at a path; None if there is one rule.
      guard: None or "finite", see `hub`.
      name: of the function that was called, for errors.

    Raises: ValueError for an unknown guard; `init` for parameters that are no floating-point or complex
      arrays, or have no names of their own; `update` for tensors that are not those `init` saw.
    """
    if guard is not None:
        check_option(name, "guard", guard, get_args(Guard))
    optimizers = with_extra_args(hand_designed), with_extra_args(learned)
    select = select or (lambda path: next(iter(mixers)))

    def choose(tensors):
        return {path: select(path) for path in tensors}

    def init_parts(params):
        tensors = by_path(params)
        rules = _init_rules(mixers, choose(tensors), tensors)
        states = (optimizer.init(params) for optimizer in optimizers)
        return HubState(*states, {}, {}, jnp.zeros((), jnp.int32), rules)

    def init(params):
        check_params(name, params)
        state, tensors = init_parts(params), by_path(params)
        proposal = Proposal(tensors, tensors, tensors, jnp.zeros(()))
        mix = functools.partial(_mix, mixers, choose(tensors))
        weights = jax.eval_shape(mix, proposal, state.rules)[1:3]
        mean, largest = jax.tree.map(lambda w: jnp.zeros(w.shape, w.dtype), weights)
        rules = jax.tree.map(jnp.array, state.rules)  # a buffer each, so that it can be donated
        return state._replace(mean_weight=mean, max_weight=largest, rules=rules)

    def update(updates, state, params=None, **extra):
        parts = state._replace(mean_weight={}, max_weight={})
        check_same_params(name, init_parts, updates, params, parts)
        chosen = choose(by_path(updates))
        guarded = [path for path in chosen if guard or mixers[chosen[path]].guarded]
        proposal, state, still = _propose(optimizers, updates, state, params, guarded, extra)
        mixed, mean, largest, rules = _mix(mixers, chosen, proposal, state.rules)
        _check_same_groups(name, state.mean_weight.keys(), mean.keys())
        mixed = replace(mixed, still)
        mixed = jax.tree.structure(updates).unflatten([mixed[path] for path in chosen])
        return mixed, state._replace(mean_weight=mean, max_weight=largest, rules=rules)

    return optax.GradientTransformationExtraArgs(init, update)


def _init_rules(
    mixers: dict[str, Mixer], chosen: dict[Path, str], tensors: Tensors
) -> dict[str, PyTree]:
    """The state of every rule in use, on its tensors."""
    return {
        rule: mixers[rule].init({path: tensors[path] for path in tensors if chosen[path] == rule})
        for rule in dict.fromkeys(chosen.values())
    }


def _propose(
    optimizers: tuple[optax.GradientTransformationExtraArgs, optax.GradientTransformationExtraArgs],
    updates: PyTree,
    state: HubState,
    params: PyTree | None,
    guarded: list[Path],
    extra: dict[str, Any],
) -> tuple[Proposal, HubState, dict[Path, jax.Array]]:
    """Runs both optimizers on one gradient; the guard repairs the updates and states of both.

    Returns: what they propose; the state with theirs, and the guard's events counted; by path of the
      guarded tensors, whether one must stay as it is.
    """
    hand_designed, learned = optimizers
    structure, gradients = jax.tree.structure(updates), by_path(updates)
    unusable = not_finite(gradients, guarded)
    gradients = replace(gradients, unusable)
    seen = structure.unflatten(gradients.values())
    ours, hand_state = hand_designed.update(seen, state.hand_designed, params, **extra)
    theirs, learned_state = learned.update(seen, state.learned, params, **extra)
    ours, theirs = by_path(ours), by_path(theirs)
    broken, failed = not_finite(ours, guarded), not_finite(theirs, guarded)
    start = updates if params is None else params
    repaired = functools.partial(repair, start, structure)
    ours, hand_state = repaired(hand_designed, ours, hand_state, broken, None)
    theirs, learned_state = repaired(learned, theirs, learned_state, failed, ours)
    proposal = Proposal(gradients, ours, theirs, extra.get("value"))
    still = {path: unusable[path] | broken[path] for path in guarded}
    events = sum((still[path] | failed[path]).astype(jnp.int32) for path in guarded)
    events += state.guard_events
    state = state._replace(hand_designed=hand_state, learned=learned_state, guard_events=events)
    return proposal, state, still


def _mix(
    mixers: dict[str, Mixer], chosen: dict[Path, str], proposal: Proposal, states: dict[str, PyTree]
) -> tuple[Tensors, Scalars, Scalars, dict[str, PyTree]]:
    """Every rule on its tensors: updates, mean and largest shares, and states."""
    updates, mean, largest, rules = {}, {}, {}, {}
    for rule, state in states.items():
        paths = [path for path in chosen if chosen[path] == rule]
        trees = ({path: tree[path] for path in paths} for tree in proposal[:3])
        mixed = mixers[rule].mix(Proposal(*trees, proposal.value), state)
        updates |= mixed.updates
        names = {name: f"{name} ({rule})" if name in mean else name for name in mixed.mean_weight}
        mean |= {names[name]: weight for name, weight in mixed.mean_weight.items()}
        largest |= {names[name]: weight for name, weight in mixed.max_weight.items()}
        rules[rule] = mixed.state
    return updates, mean, largest, rules


def _check_same_groups(name: str, old: Set[str], new: Set[str]) -> None:
    if old != new:
        raise ValueError(
            f"{name}: the parameters have changed since init saw them (new: {sorted(new - old)}, gone: "
            f"{sorted(old - new)}); call init again."
        )


# --- scalars by group


def group_of(path: Path, group: Group) -> str:
    """Name of the group that a tensor belongs to: its path, that of its layer, or "all".

    A layer is what holds the tensor: its path is that of the tensor without the last key, and empty for
    tensors at the top of the tree.
    """
    if group == "global":
        return "all"
    return "/".join(path if group == "tensor" else path[:-1])


def combine(values: Tensors, group: Group, operation: Callable = jnp.add) -> Scalars:
    """Scalars by path, combined within their groups; arrays are never joined."""
    out: Scalars = {}
    for path, value in values.items():
        name = group_of(path, group)
        out[name] = operation(out[name], value) if name in out else value
    return dict(sorted(out.items()))


def mean_by_group(sums: Tensors, tensors: Tensors, group: Group) -> Scalars:
    """Sums over the entries of tensors, by path -> means over the entries of groups."""
    total, sizes = combine(sums, group), sizes_by_group(tensors, group)
    return {name: total[name] / sizes[name] for name in total}


def sizes_by_group(tensors: Tensors, group: Group) -> dict[str, int]:
    """Entries of every group; a group without any is left out."""
    return combine(
        {path: leaf.size for path, leaf in tensors.items() if leaf.size}, group, operator.add
    )


def inner(a: Tensors, b: Tensors, group: Group) -> Scalars:
    """Real part of the inner product, by group, in float32; empty tensors stay out."""
    products = {path: wide(a[path]) * jnp.conj(wide(b[path])) for path in a if a[path].size}
    sums = {path: jnp.float32(jnp.sum(product.real)) for path, product in products.items()}
    return combine(sums, group)


def norm_ratios(a: Tensors, b: Tensors, group: Group) -> Scalars:
    """|a| / |b| by group, 0 where b is 0, infinite where a square overflows."""
    squares, ratios = inner(a, a, group), {}
    for name, square in inner(b, b, group).items():
        overflow = jnp.isinf(squares[name]) | jnp.isinf(square)
        known = (square > 0.0) & ~overflow
        size = jnp.sqrt(jnp.where(overflow, 0.0, squares[name]))
        ratio = size * jax.lax.rsqrt(jnp.where(known, square, jnp.inf))
        ratios[name] = jnp.where(overflow, jnp.inf, ratio)
    return ratios


def blend(share: jax.Array, ours: jax.Array, theirs: jax.Array) -> jax.Array:
    """The share of one update and the rest of the other, in the type of the update."""
    return (share * ours + (1.0 - share) * theirs).astype(ours.dtype)
