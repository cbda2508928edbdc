"""HUB: a learned and a hand-designed optimizer, blended parameter by parameter.

Both see the same gradient and propose an update; a softmax over the gradient's entries says how much
of which is taken. Equation numbers are those of the HUB paper.
"""

import difflib
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from lohp_jax.types import PyTree

Mode = Literal["vanilla", "invert"]
Group = Literal["tensor", "module", "global"]
Path = tuple[str, ...]
Bounds = tuple[float, float]


class HubState(NamedTuple):
    """State of `hub`.

    Attributes:
      hand_designed: state of the hand-designed optimizer.
      learned: state of the learned optimizer.
      mean_weight: by group, the mean share of the hand-designed update in the last step.
      max_weight: by group, the largest such share.
      guard_events: int32, tensors that the guard has replaced so far.
    """

    hand_designed: optax.OptState
    learned: optax.OptState
    mean_weight: dict[str, jax.Array]
    max_weight: dict[str, jax.Array]
    guard_events: jax.Array


def hub(
    hand_designed: optax.GradientTransformation,
    learned: optax.GradientTransformation,
    *,
    mode: Mode | Callable[[Path], Mode] = "vanilla",
    clip: Bounds | Callable[[Path], Bounds | None] | None = None,
    group: Group = "tensor",
    guard: Literal["finite"] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Blends two optimizers with s_i = exp|g_i| / sum_j exp|g_j| over the entries of a group.

    "vanilla" takes s of the hand-designed and 1 - s of the learned update (eq. 5), "invert" the other
    way round (eq. 13). The mean of s over a group of K entries is 1 / K whatever the gradient: small
    gradients give a constant blend, one that towers over the others by more than about log K gives
    its entry to one optimizer alone. So the blend depends on the scale of the loss.

    One gradient serves both. Extra arguments (`value`, `value_fn`, `grad_fn`, ...) reach both.

    Args:
      hand_designed: any optax transformation, learning rate included, e.g. `optax.adamw(1e-3)`. Its
        weight decay is blended with the rest of its update: vanilla HUB leaves about 1 / K of it.
      learned: the same, e.g. a learned optimizer.
      mode: for all parameters, or a function of the path of a tensor (its keys as strings), which is
        the block-wise form (eqs. 14 and 15), see `block_wise`.
      clip: bounds (low, high) of s (eqs. 16 and 17), for all or by path; shares then no longer add up
        to 1 over a group. None leaves s alone.
      group: what the softmax is over: every "tensor", every "module" (tensors whose paths agree but
        for the last key) or "global", all entries.
      guard: None, as published: a NaN of either optimizer stays. "finite", our extension: a tensor
        whose blend is not finite takes the hand-designed update, or none if that is not finite
        either; the learned optimizer's state of the tensor starts anew.

    Returns: a transformation whose state is a `HubState`. Masked and None leaves stay out of the
      softmax; leaves without entries pass.

    Raises: ValueError for an unknown mode, group or guard (with the nearest), bounds that are not
      0 <= low <= high <= 1, and, in `init`, for parameters that are not floating-point or complex.
    """
    _check_option("group", group, get_args(Group))
    if guard is not None:
        _check_option("guard", guard, ("finite",))
    mode_of = mode if callable(mode) else lambda path: mode
    clip_of = clip if callable(clip) else lambda path: clip
    if not callable(mode):
        _check_option("mode", mode, get_args(Mode))
    if not callable(clip):
        _check_bounds(clip)
    hand_designed = optax.with_extra_args_support(hand_designed)
    learned = optax.with_extra_args_support(learned)

    def init(params):
        _check_inexact(params)
        names = sorted({name for name, leaf in _named(params, group) if leaf.size})
        zeros = {name: jnp.zeros((), jnp.float32) for name in names}
        states = hand_designed.init(params), learned.init(params)
        return HubState(*states, zeros, dict(zeros), jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra):
        ours, hand_state = hand_designed.update(updates, state.hand_designed, params, **extra)
        theirs, learned_state = learned.update(updates, state.learned, params, **extra)
        shares = hand_shares(updates, mode_of=mode_of, clip_of=clip_of, group=group)
        blended = jax.tree.map(_blend, shares, ours, theirs)
        events = state.guard_events
        if guard:
            blended, bad = _guarded(blended, ours)
            fresh = learned.init(updates if params is None else params)
            learned_state = _restart(learned_state, fresh, bad)
            events += sum(flag.astype(jnp.int32) for flag in jax.tree.leaves(bad))
        described = _describe(shares, group)
        return blended, HubState(hand_state, learned_state, *described, events)

    return optax.GradientTransformationExtraArgs(init, update)


def block_wise(is_new: Callable[[Path], bool], *, literal: bool = False) -> Callable[[Path], Mode]:
    """Mode by block, for fine-tuning (eqs. 14 and 15).

    The paper's words lean on the learned optimizer in a new block ("vanilla") and protect pre-trained
    ones ("invert"); its equations say the opposite.

    Args:
      is_new: whether the tensor at a path is new, e.g. `lambda path: path[0] == "head"`.
      literal: follow the equations instead of the words.
    """
    return lambda path: "vanilla" if bool(is_new(path)) != literal else "invert"


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
      mode_of: mode by path.
      clip_of: bounds of s by path, or None.
      group: what the softmax is over.

    Raises: ValueError for an unknown mode, or bounds that are not 0 <= low <= high <= 1.
    """
    size = jax.tree.map(lambda g: jnp.abs(g).astype(jnp.float32), gradients)
    named = [(name, leaf) for name, leaf in _named(size, group) if leaf.size]
    largest = _reduce(jnp.maximum, named, jnp.max)
    scaled = [(name, jnp.exp(leaf - largest[name])) for name, leaf in named]
    total = _reduce(jnp.add, scaled, jnp.sum)

    def share(path, leaf):
        path = _keys(path)
        chosen, bounds = mode_of(path), clip_of(path)
        _check_option("mode", chosen, get_args(Mode))
        _check_bounds(bounds)
        if not leaf.size:
            return leaf
        name = _group_name(path, group)
        softmax = jnp.exp(leaf - largest[name]) / total[name]
        if bounds is not None:
            softmax = jnp.clip(softmax, *bounds)
        return softmax if chosen == "vanilla" else 1.0 - softmax

    return jax.tree.map_with_path(share, size)


def hub_diagnostics(state: optax.OptState) -> dict[str, Any]:
    """Mean and largest share by group, and guard events, of the `HubState` somewhere in a state.

    Raises: ValueError if there is none, or more than one.
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
    return {name: getattr(found[0], name) for name in names}


def _blend(share: jax.Array, ours: jax.Array, theirs: jax.Array) -> jax.Array:
    return (share * ours + (1.0 - share) * theirs).astype(ours.dtype)


def _guarded(blended: PyTree, ours: PyTree) -> tuple[PyTree, PyTree]:
    """Finite updates, and which tensors had to be replaced."""

    def finite(leaf):
        return jnp.all(jnp.isfinite(leaf))

    def repair(mixed, hand):
        fallback = jnp.where(finite(hand), hand, jnp.zeros_like(hand))
        return jnp.where(finite(mixed), mixed, fallback)

    return jax.tree.map(repair, blended, ours), jax.tree.map(lambda u: ~finite(u), blended)


def _restart(state: PyTree, fresh: PyTree, bad: PyTree) -> PyTree:
    """Fresh state for the tensors that were replaced, and for what all tensors share if not finite."""
    structure = jax.tree.structure(bad)

    def mirrors_params(node):
        return jax.tree.structure(node) == structure

    def restart(node, new):
        if mirrors_params(node):
            return jax.tree.map(functools.partial(jnp.where), bad, new, node)
        if not jnp.issubdtype(jnp.result_type(node), jnp.inexact):  # a count, or a key
            return node
        return jnp.where(jnp.all(jnp.isfinite(node)), node, new)

    return jax.tree.map(restart, state, fresh, is_leaf=mirrors_params)


def _describe(shares: PyTree, group: Group) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Mean and largest share by group."""
    named = [(name, leaf) for name, leaf in _named(shares, group) if leaf.size]
    sizes: dict[str, int] = {}
    for name, leaf in named:
        sizes[name] = sizes.get(name, 0) + leaf.size
    total, largest = _reduce(jnp.add, named, jnp.sum), _reduce(jnp.maximum, named, jnp.max)
    return {name: total[name] / sizes[name] for name in sorted(sizes)}, largest


def _reduce(combine, named, reduce_leaf) -> dict[str, jax.Array]:
    """`reduce_leaf` of every leaf, combined within its group; arrays are never joined."""
    out: dict[str, jax.Array] = {}
    for name, leaf in named:
        value = reduce_leaf(leaf)
        out[name] = combine(out[name], value) if name in out else value
    return dict(sorted(out.items()))


def _named(tree: PyTree, group: Group) -> list[tuple[str, jax.Array]]:
    return [
        (_group_name(_keys(path), group), leaf) for path, leaf in jax.tree.leaves_with_path(tree)
    ]


def _keys(path: tuple) -> Path:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _group_name(path: Path, group: Group) -> str:
    if group == "global":
        return "all"
    return "/".join(path if group == "tensor" else path[:-1])


def _check_option(name: str, value: Any, options: tuple[str, ...]) -> None:
    if value not in options:
        nearest = difflib.get_close_matches(str(value), options, 1, 0)[0]
        raise ValueError(
            f"hub: {name} must be one of {options}, got {value!r}; did you mean {nearest!r}?"
        )


def _check_bounds(bounds: Bounds | None) -> None:
    if bounds is None:
        return
    low, high = bounds
    if not 0 <= low <= high <= 1:
        raise ValueError(f"hub: clip must be (low, high) with 0 <= low <= high <= 1, got {bounds}.")


def _check_inexact(params: PyTree) -> None:
    for path, leaf in jax.tree.leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise ValueError(
                f"hub: expected floating-point or complex parameters, got {jnp.result_type(leaf)} at "
                f"{'/'.join(_keys(path)) or 'the root'}; leave it out with optax.masked."
            )
