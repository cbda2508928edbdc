"""What to do when a learned optimizer diverges: the baselines of the HUB paper's appendix A.2.

There a run is followed by another, which continues from "the final optimizer state" and has more steps
(`increase_steps`), or from "the min-Loss optimizer state" (`min_loss_reinit`). Here both are one optax
transformation, and a run that diverges ends at once: when the loss, the gradient, the update or what it
makes of the parameters is not finite. The next run continues from the parameters, and the state of the
learned optimizer, where all was well last, or where the loss was least.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lohp_jax.optimizers.extra_args import with_extra_args
from lohp_jax.optimizers.trees import check_params, check_same_params, fill
from lohp_jax.types import PyTree

_MOST_UPDATES = 3  # on the way back


class ReinitState(NamedTuple):
    """State of `increase_steps` and `min_loss_reinit`.

    Attributes:
      learned: state of the learned optimizer; of `increase_steps` a `Horizon`.
      kept: parameters and state of the learned optimizer to go back to.
      kept_loss: the loss there.
      restarts: int32, how many runs have followed the first.
      returning: int32, how many more updates may go back, if the last one did; 0 otherwise.
    """

    learned: optax.OptState
    kept: tuple[PyTree, optax.OptState]
    kept_loss: jax.Array
    restarts: jax.Array
    returning: jax.Array


class Horizon(NamedTuple):
    """State of the learned optimizer within `increase_steps`, and its number of updates, int32."""

    inner: optax.OptState
    step: jax.Array


def increase_steps(
    make_learned: Callable[[int], optax.GradientTransformation],
    num_steps: int,
    *,
    factor: int = 2,
    max_restarts: int = 3,
) -> optax.GradientTransformationExtraArgs:
    """Continues from the final state of a run, with `factor` times as many steps as that run had.

    A run is over when it has taken its steps, or diverges: its final state then is the last finite one.
    The next goes on from there as it is, parameters and the state of the learned optimizer: for `velo`
    and its relatives the step counter, accumulators, recurrent state and running means of the loss. With
    a larger `num_steps` the fraction of the run that it believes to be over shrinks, and the horizons of
    the running means lengthen, so that these are biased until they have caught up. As `num_steps` is
    static, all `max_restarts + 1` rules are compiled.

    Args:
      make_learned: the learned optimizer for a number of steps, e.g. `lambda n: velo(theta, n)`; the
        states for all numbers must be alike.
      num_steps: of the first run.
      factor: of `num_steps` from one run to the next, which counts the steps of all before it.
      max_restarts: from then on the last rule goes on beyond its steps, and after a divergence from the
        last finite state.

    Returns: a transformation whose `update` needs the parameters and `value`, the loss there; its state
      is a `ReinitState`.

    Raises: ValueError for a factor below 2 or a negative `max_restarts`; `init` for parameters that are
      no floating-point or complex arrays; `update` for what is missing, and for other tensors.
    """
    if factor < 2 or max_restarts < 0:
        raise ValueError(
            "increase_steps: expected factor >= 2 and max_restarts >= 0, got "
            f"factor {factor}, max_restarts {max_restarts}."
        )
    horizons = [num_steps * factor**k for k in range(max_restarts + 1)]
    rules = [with_extra_args(make_learned(n)) for n in horizons]

    def init(params):
        return Horizon(rules[0].init(params), jnp.zeros((), jnp.int32))

    def advance(updates, state, params, restarts, **extra):
        def use(rule):
            return lambda: rule.update(updates, state.inner, params, **extra)

        index = jnp.minimum(restarts, max_restarts)
        moved, inner = jax.lax.switch(index, [use(rule) for rule in rules])
        return moved, Horizon(inner, optax.safe_increment(state.step))

    def is_over(state, restarts):
        limits = jnp.int32([min(n, jnp.iinfo(jnp.int32).max) for n in horizons])
        in_time = state.step < limits[jnp.minimum(restarts, max_restarts)]
        return ~in_time & (restarts < max_restarts)

    return _returning("increase_steps", init, advance, is_over=is_over)


def min_loss_reinit(
    learned: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """On divergence continues from where the loss was least: the parameters and the optimizer's state.

    The state is the one that the optimizer had when it saw that loss, its step counter among it. So a
    deterministic optimizer of a deterministic loss takes the same way once more, and diverges again
    unless it has found a lower loss; on mini-batches, whose least loss is that of the luckiest one, the
    ways differ.

    Args:
      learned: the optimizer that may diverge.

    Returns: a transformation whose `update` needs the parameters and `value`, the loss there; its state
      is a `ReinitState`.

    Raises: ValueError in `init` for parameters that are no floating-point or complex arrays; in `update`
      for what is missing, and for other tensors.
    """
    learned = with_extra_args(learned)

    def advance(updates, state, params, restarts, **extra):
        del restarts
        return learned.update(updates, state, params, **extra)

    return _returning("min_loss_reinit", learned.init, advance, best=True)


def _returning(
    name: str,
    init_learned: Callable,
    advance: Callable,
    *,
    best: bool = False,
    is_over: Callable | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the best or the last finite place, and goes back to it on divergence.

    `is_over(learned_state, restarts)` says whether a run that is finite has ended all the same.
    """

    def init(params):
        check_params(name, params)
        # a copy, so that state and parameters can be donated
        kept = jax.tree.map(jnp.array, params), init_learned(params)
        restarts, returning = (jnp.zeros((), jnp.int32) for _ in range(2))
        learned = init_learned(params)
        return ReinitState(learned, kept, jnp.full((), jnp.inf, jnp.float32), restarts, returning)

    def update(updates, state, params=None, *, value=None, **extra):
        if params is None or value is None:
            missing = "the parameters" if params is None else "value=loss"
            raise ValueError(f"{name}: update needs {missing}, got None.")
        check_same_params(name, init, updates, params, state)
        there, there_state = state.kept
        moved, learned_state = advance(
            updates, state.learned, params, state.restarts, value=value, **extra
        )
        # next to a huge p, p + (p_0 - p) is not yet p_0 in floating point: go on, unless what stands
        # behind this keeps it from ever arriving
        under_way = (state.returning > 0) & ~_close(params, there)
        diverged = ~_finite((updates, optax.apply_updates(params, moved), value))
        back = under_way | diverged
        learned_state = optax.tree.where(back, fill(there_state, learned_state), learned_state)
        value = jnp.float32(value)
        keep = ~back & ((value < state.kept_loss) | (not best))
        here = params, state.learned
        kept = optax.tree.where(keep, here, fill(state.kept, here))
        kept_loss = jnp.where(keep, value, state.kept_loss)
        home = jax.tree.map(lambda q, p: (q - p).astype(p.dtype), there, params)
        starts = diverged & ~under_way
        returning = jnp.where(starts, _MOST_UPDATES, jnp.where(under_way, state.returning - 1, 0))
        updates = optax.tree.where(back, home, moved)
        if is_over is not None:
            starts |= ~back & is_over(learned_state, state.restarts)
        restarts = state.restarts + starts
        return updates, ReinitState(learned_state, kept, kept_loss, restarts, returning)

    return optax.GradientTransformationExtraArgs(init, update)


def _finite(tree: PyTree) -> jax.Array:
    return _all(jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), tree))


def _close(a: PyTree, b: PyTree) -> jax.Array:
    return _all(jax.tree.map(lambda x, y: jnp.allclose(x, y, rtol=1e-5), a, b))


def _all(flags: PyTree) -> jax.Array:
    return functools.reduce(jnp.logical_and, jax.tree.leaves(flags), jnp.ones((), bool))
