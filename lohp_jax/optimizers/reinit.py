"""What to do when a learned optimizer diverges: the baselines of the HUB paper's appendix A.2.

Both remember a place where all was well and go back to it when the loss, the gradient, the update or
what it makes of the parameters is not finite: `increase_steps` to the last one, with a longer horizon,
`min_loss_reinit` to the best one.
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
      learned: state of the learned optimizer.
      kept: parameters and state of the learned optimizer to go back to.
      kept_loss: the loss there.
      restarts: int32, how often it went back.
      returning: int32, how many more updates may go back, if the last one did; 0 otherwise.
    """

    learned: optax.OptState
    kept: tuple[PyTree, optax.OptState]
    kept_loss: jax.Array
    restarts: jax.Array
    returning: jax.Array


def increase_steps(
    make_learned: Callable[[int], optax.GradientTransformation],
    num_steps: int,
    *,
    factor: int = 2,
    max_restarts: int = 3,
) -> optax.GradientTransformationExtraArgs:
    """On divergence continues from the last finite state, with `factor` times as many steps to go.

    For `velo` and its relatives the state goes on as it is (step counter, accumulators, recurrent
    state, running means of the loss) under a rule with a larger `num_steps`: the fraction of the run
    that it believes to be over shrinks, and the horizons of the running means lengthen, so that these
    are biased until they have caught up. As `num_steps` is static, all `max_restarts + 1` rules are
    compiled.

    Args:
      make_learned: the learned optimizer for a number of steps, e.g. `lambda n: velo(theta, n)`; the
        states for all numbers must be alike.
      num_steps: of the first attempt.
      factor: of `num_steps` from one attempt to the next.
      max_restarts: from then on it goes back to the last finite state without a longer horizon.

    Returns: a transformation whose `update` needs the parameters and `value`, the loss there.

    Raises: ValueError for a factor below 2 or a negative `max_restarts`; `init` for parameters that are
      no floating-point or complex arrays; `update` for what is missing, and for other tensors.
    """
    if factor < 2 or max_restarts < 0:
        raise ValueError(
            "increase_steps: expected factor >= 2 and max_restarts >= 0, got "
            f"factor {factor}, max_restarts {max_restarts}."
        )
    attempts = [
        with_extra_args(make_learned(num_steps * factor**k)) for k in range(max_restarts + 1)
    ]

    def advance(updates, state, params, restarts, **extra):
        def use(attempt):
            return lambda: attempt.update(updates, state, params, **extra)

        return jax.lax.switch(jnp.minimum(restarts, max_restarts), [use(a) for a in attempts])

    return _returning("increase_steps", attempts[0].init, advance, best=False)


def min_loss_reinit(
    learned: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """On divergence goes back to the parameters of the least loss and starts the optimizer anew there.

    Args:
      learned: the optimizer that may diverge.

    Returns: a transformation whose `update` needs the parameters and `value`, the loss there. On
      mini-batches the least loss is that of the luckiest one.

    Raises: ValueError in `init` for parameters that are no floating-point or complex arrays; in `update`
      for what is missing, and for other tensors.
    """
    learned = with_extra_args(learned)

    def advance(updates, state, params, restarts, **extra):
        del restarts
        return learned.update(updates, state, params, **extra)

    return _returning("min_loss_reinit", learned.init, advance, best=True)


def _returning(
    name: str, init_learned: Callable, advance: Callable, *, best: bool
) -> optax.GradientTransformationExtraArgs:
    """Keeps the best or the last finite place, and goes back to it on divergence."""

    def init(params):
        check_params(name, params)
        # a copy, so that state and parameters can be donated
        here = jax.tree.map(jnp.array, params)
        kept = here, () if best else init_learned(params)
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
        restarted = init_learned(there) if best else there_state
        learned_state = optax.tree.where(back, fill(restarted, learned_state), learned_state)
        value = jnp.float32(value)
        keep = ~back & ((value < state.kept_loss) | (not best))
        here = params, () if best else state.learned
        kept = optax.tree.where(keep, here, fill(state.kept, here))
        kept_loss = jnp.where(keep, value, state.kept_loss)
        home = jax.tree.map(lambda q, p: (q - p).astype(p.dtype), there, params)
        starts = diverged & ~under_way
        returning = jnp.where(starts, _MOST_UPDATES, jnp.where(under_way, state.returning - 1, 0))
        updates = optax.tree.where(back, home, moved)
        restarts = state.restarts + starts
        return updates, ReinitState(learned_state, kept, kept_loss, restarts, returning)

    return optax.GradientTransformationExtraArgs(init, update)


def _finite(tree: PyTree) -> jax.Array:
    return _all(jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), tree))


def _close(a: PyTree, b: PyTree) -> jax.Array:
    return _all(jax.tree.map(lambda x, y: jnp.allclose(x, y, rtol=1e-5), a, b))


def _all(flags: PyTree) -> jax.Array:
    return functools.reduce(jnp.logical_and, jax.tree.leaves(flags), jnp.ones((), bool))
