"""The trust region: the learned update where, and as far as, loss and gradients bear it out."""

import functools
import math
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from lohp_jax.checks import check_fraction, check_option, check_positive
from lohp_jax.optimizers.mixing import (
    Group,
    Mixed,
    Mixer,
    Proposal,
    Scalars,
    group_of,
    inner,
    mix_optimizers,
)
from lohp_jax.optimizers.trees import Tensors, name_of, wide

_MEMORY = 0.95  # of running sums: about twenty steps
_LOSS_MEMORY = 0.9
_SHARPNESS = 3.0  # of the switch from one update to the other
_SIGNIFICANT = 1.0  # the score from which on it counts
_RETREAT, _RETURN = 0.9, 1.02  # factors of the ratio
_RISING = 2.5  # score of the loss's trend from which on it fails
_LARGEST = 1e18  # of a number: a sum of its squares is still a float32
_JUMP, _WARM_UP = 5.0, 5  # rise in usual changes that is a failure, after so many losses


class Tally(NamedTuple):
    """Running sums of numbers and of their squares; `_score` tells whether their mean is not 0."""

    total: jax.Array
    square: jax.Array


class LossTrend(NamedTuple):
    """What the losses so far tell.

    Attributes:
      mean: running mean.
      trend: of the changes, each against the running mean before it.
      step: int32, finite losses so far.
      failed: bool, whether the last one was not finite or rose beyond the noise.
      falling: bool, whether the loss falls by more than the noise.
    """

    mean: jax.Array
    trend: Tally
    step: jax.Array
    failed: jax.Array
    falling: jax.Array


class TrustState(NamedTuple):
    """State of the trust region; `[G]` arrays have an entry for every group, sorted by name.

    Attributes:
      ratio: by group, rho.
      failures: int32, steps whose loss failed.
      used: `[G]` |U_L| / |U_H| of the last step.
      size: `[G]` |U_H| + |U~_L| of the last step.
      before: `[G]` <g_t, D_t> of the last step.
      evidence: of `[G]`, the costs of D_t; below 0 for the learned update.
      overshoot: the same by the later gradient alone.
      difference: D_t of the last step, by name of the tensor.
      loss: what the losses tell.
    """

    ratio: Scalars
    failures: jax.Array
    used: jax.Array
    size: jax.Array
    before: jax.Array
    evidence: Tally
    overshoot: Tally
    difference: Tensors
    loss: LossTrend

    def readings(self) -> dict[str, Scalars | jax.Array]:
        """For `hub_diagnostics`."""
        return {"ratio": self.ratio, "failures": self.failures}


def hub_trust(
    hand_designed: optax.GradientTransformation,
    learned: optax.GradientTransformation,
    *,
    ratio: float = 2.0,
    bounds: tuple[float, float] = (1.0, 20.0),
    grow: float = 1.1,
    shrink: float = 0.5,
    caution: float = 1.0,
    optimism: float = 0.0,
    fall_back: bool = True,
    group: Group = "tensor",
) -> optax.GradientTransformationExtraArgs:
    """U = w U~_L + (1 - w) U_H with U~_L = U_L min(1, rho |U_H| / |U_L|), in each tensor.

    Our extension of HUB. Two questions are asked of every step once its gradient and loss are known:

    Is the learned update better? By the next gradient the difference D_t = U~_L,t - U_H,t costs
    e = <g_{t+1} + optimism g_t, D_t> / (|g_{t+1}| (|U~_L,t| + |U_H,t|)), whichever of the two was taken.
    Without the second term the smaller step is favoured, as g_{t+1} sees twice what the curvature takes
    away; with it, under mini-batches, the update that follows the noise of its own batch. With z the sum
    of e over about the last twenty steps in units of its own root mean square, w = sigmoid(-3 (z +
    caution)): the hand-designed update without evidence, the learned one where it is better by more than
    noise. z ignores the scale of loss and gradients.

    How far may it go? rho grows where it binds, <g_{t+1}, D_t> says that further is better, and the
    loss falls. It is set a tenth below |U_L| / |U_H| where that says the opposite, and returns to its
    start while w < 1/2, so that an update of another size is judged as well. It shrinks where the loss
    fails: is not finite, rises by more than five times its usual change, or rises steadily (its trend
    against a running mean is beyond 2.5 of its own root mean squares). A rise within the noise of
    mini-batches is no failure. After a failure trust is to be earned anew.

    What this guarantees: no step of a tensor is longer than the larger of rho |U_H| and |U_H|, with rho
    in its bounds; what is not finite never reaches the parameters; nothing depends on the scale of the
    loss while float32 holds the squares of gradients and updates, of entries from about 1e-19 to 1e19
    (beyond that a gradient is no evidence, and U_H stands in for a larger update). What it does not: it
    judges one step ahead, so that of two optimizers that descend it may prefer the one that is faster
    now to the one that is better in the end (with a larger or an annealed learning rate); and as all
    sizes are relative to U_H, a learning rate that is far too small for it holds the learned update
    back, too, and where U_H is zero nothing moves. Costs one more float32 array like the parameters.

    Args:
      hand_designed: any optax transformation; sets the scale of the steps.
      learned: the same.
      ratio: rho at the start, in `bounds`.
      bounds: (low, high) of rho, 0 < low <= high.
      grow: factor of rho on success, >= 1.
      shrink: factor of rho on failure, in (0, 1].
      caution: by how many units the learned update must be better.
      optimism: weight of the gradient that both updates were made from, in [0, 1]; for full batches.
      fall_back: False for the plain trust region: w = 1, rho moved by the loss alone.
      group: whose entries share w and rho: every "tensor", "layer" or "global"; see `hub`.

    Returns: a transformation whose `update` needs `value`, the loss. Its guard is always on: see `hub`.

    Raises: ValueError for numbers out of range or an unknown group; `update` for a missing `value`.
    """
    settings = TrustSettings(ratio, bounds, grow, shrink, caution, optimism, fall_back, group)
    rules = {"trust": trust_mixer(settings)}
    return mix_optimizers(hand_designed, learned, rules, name="hub_trust")


class TrustSettings(NamedTuple):
    """Of the trust region; each as in `hub_trust`."""

    ratio: float = 2.0
    bounds: tuple[float, float] = (1.0, 20.0)
    grow: float = 1.1
    shrink: float = 0.5
    caution: float = 1.0
    optimism: float = 0.0
    fall_back: bool = True
    group: Group = "tensor"


def trust_mixer(settings: TrustSettings) -> Mixer:
    """The rule of `hub_trust`."""
    _check(settings)
    init, mix = (functools.partial(function, settings) for function in (_init, _mix))
    return Mixer(init, mix, guarded=True)


def _init(settings: TrustSettings, params: Tensors) -> TrustState:
    names = sorted({group_of(path, settings.group) for path, p in params.items() if p.size})
    zeros, zero = jnp.zeros(len(names), jnp.float32), jnp.zeros((), jnp.float32)
    start = jnp.clip(jnp.float32(settings.ratio), *settings.bounds)
    difference = {name_of(path): wide(jnp.zeros_like(p)) for path, p in params.items()}
    none, no = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
    loss = LossTrend(zero, Tally(zero, zero), none, no, no)
    tally = Tally(zeros, zeros)
    ratios = dict.fromkeys(names, start)
    return TrustState(ratios, none, zeros, zeros, zeros, tally, tally, difference, loss)


def _mix(settings: TrustSettings, proposal: Proposal, state: TrustState) -> Mixed:
    gradients, ours, theirs, value = proposal
    group = settings.group
    loss = _follow_loss(state.loss, value)
    trust, further, evidence, overshoot = _judge(settings, state, gradients, loss.failed)
    rho = _next_ratio(settings, state, trust, further, loss)
    hand, learned = _norm(ours, group), _norm(theirs, group)
    known = jnp.isfinite(hand + learned)  # or a square has overflowed: U_H then
    trust = jnp.where(known, trust, 0.0)
    scale = jnp.where(known, jnp.minimum(1.0, rho * _quotient(hand, learned)), 0.0)
    updates, move = {}, {}
    factors = dict(zip(state.ratio, zip(scale, trust, strict=True), strict=True))
    for path, u in ours.items():
        reduced, share = factors.get(group_of(path, group), (1.0, 1.0))  # if without entries
        move[path] = reduced * wide(theirs[path]) - wide(u)
        updates[path] = (wide(u) + share * move[path]).astype(u.dtype)
    shares = dict(zip(state.ratio, 1.0 - trust, strict=True))
    before = _stack(inner(gradients, move, group))
    known &= jnp.isfinite(before)  # or the step is no evidence: of size 0
    state = TrustState(
        ratio=dict(zip(state.ratio, rho, strict=True)),
        failures=state.failures + loss.failed,
        used=jnp.where(known, _quotient(learned, hand), state.used),
        size=jnp.where(known, hand + scale * learned, 0.0),
        before=jnp.where(known, before, 0.0),
        evidence=evidence,
        overshoot=overshoot,
        difference={name_of(path): leaf for path, leaf in move.items()},
        loss=loss,
    )
    return Mixed(updates, shares, shares, state)


def _judge(
    settings: TrustSettings, state: TrustState, gradients: Tensors, failed: jax.Array
) -> tuple[jax.Array, jax.Array, Tally, Tally]:
    """By group: the share w of the learned update, and whether (> 0) further would be better.

    Returns: `[G]` both, and the evidence and overshoot of the next state.
    """
    last = {path: state.difference[name_of(path)] for path in gradients}
    cost = _stack(inner(gradients, last, settings.group))
    size = _norm(gradients, settings.group) * state.size
    evidence = _add(state.evidence, _quotient(cost + settings.optimism * state.before, size))
    evidence = jax.tree.map(lambda x: jnp.where(failed, 0.0, x), evidence)
    overshoot = _add(state.overshoot, _quotient(cost, size))
    trust = jax.nn.sigmoid(-_SHARPNESS * (_score(evidence) + settings.caution))
    further = -_score(overshoot)
    if not settings.fall_back:
        trust, further = jnp.ones_like(trust), jnp.full_like(further, jnp.inf)
    return trust, further, evidence, overshoot


def _next_ratio(
    settings: TrustSettings,
    state: TrustState,
    trust: jax.Array,
    further: jax.Array,
    loss: LossTrend,
) -> jax.Array:
    """`[G]` rho of this step."""
    ratio, bounds, grow, shrink, *_ = settings
    old = _stack(state.ratio)
    success = loss.falling & (further > _SIGNIFICANT) & (state.used > old)
    rho = jnp.where(success, old * grow, old)
    rho = jnp.where(further < -_SIGNIFICANT, jnp.minimum(old, state.used) * _RETREAT, rho)
    rho = jnp.where(trust < 0.5, jnp.clip(ratio, old / _RETURN, old * _RETURN), rho)
    return jnp.clip(jnp.where(loss.failed, rho * shrink, rho), *bounds)


def _follow_loss(old: LossTrend, value: jax.Array | None) -> LossTrend:
    """Takes in a loss; one that is not finite has failed and leaves no trace in the means."""
    if value is None:
        raise ValueError(
            'hub_trust (mode="trust"): update needs the loss, got none; pass it as '
            "update(gradients, state, params, value=loss)."
        )
    value = jnp.float32(value)
    finite = jnp.isfinite(value)
    change = jnp.where(finite & (old.step > 0), value - old.mean, 0.0)
    weight = (1.0 - jnp.float32(_MEMORY) ** jnp.float32(old.step)) / (1.0 - _MEMORY)
    most = _JUMP * jnp.sqrt(_quotient(old.trend.square, weight))
    jumped = (old.step > _WARM_UP) & (change > most)
    change = jnp.where(jumped, most, change)  # an outlier must not hide what comes after it
    trend = _add(old.trend, change)
    failed = ~finite | jumped | (_score(trend) > _RISING)
    falling = ~failed & (_score(trend) < -_SIGNIFICANT)
    trend = Tally(jnp.where(failed, 0.0, trend.total), trend.square)
    moved = jnp.where(old.step > 0, old.mean + (1.0 - _LOSS_MEMORY) * change, value)
    mean = jnp.where(finite, moved, old.mean)
    return LossTrend(mean, trend, old.step + finite, failed, falling)


def _add(tally: Tally, number: jax.Array) -> Tally:
    number = jnp.where(jnp.isfinite(number), jnp.clip(number, -_LARGEST, _LARGEST), 0.0)
    return Tally(_MEMORY * tally.total + number, _MEMORY * tally.square + number**2)


def _score(tally: Tally) -> jax.Array:
    """The sum in units of its root mean square if the numbers were independent and of mean 0."""
    return _quotient(tally.total, jnp.sqrt(tally.square))


def _quotient(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(b > 0.0, a / jnp.where(b > 0.0, b, 1.0), 0.0)


def _norm(tensors: Tensors, group: Group) -> jax.Array:
    return jnp.sqrt(_stack(inner(tensors, tensors, group)))


def _stack(scalars: Scalars) -> jax.Array:
    return jnp.stack(list(scalars.values())) if scalars else jnp.zeros(0, jnp.float32)


def _check(settings: TrustSettings) -> None:
    ratio, bounds, grow, shrink, caution, optimism, _, group = settings
    check_option("hub_trust", "group", group, get_args(Group))
    check_positive("hub_trust", "ratio", ratio)
    check_positive("hub_trust", "shrink", shrink)
    check_fraction("hub_trust", "shrink", shrink)
    check_fraction("hub_trust", "optimism", optimism)
    low, high = bounds
    if not 0 < low <= high < math.inf:
        raise ValueError(f"hub_trust: bounds must be (low, high), 0 < low <= high, got {bounds}.")
    if not isinstance(ratio, jax.Array) and not low <= ratio <= high:
        raise ValueError(f"hub_trust: ratio must be in bounds {bounds}, got {ratio}.")
    if not isinstance(caution, jax.Array) and not math.isfinite(caution):
        raise ValueError(f"hub_trust: caution must be finite, got {caution}.")
    if not isinstance(grow, jax.Array) and not 1 <= grow < math.inf:
        raise ValueError(f"hub_trust: grow must be at least 1 and finite, got {grow}.")
