"""LGL2O: a learned optimizer behind a guard that compares losses (Premont-Schwarz et al., 2022).

arXiv 2201.12426. The rival of HUB: instead of blending two updates it tries both and keeps the better.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from lohp_jax.checks import check_num_steps, check_option
from lohp_jax.optimizers.extra_args import with_extra_args
from lohp_jax.optimizers.guard import branch
from lohp_jax.optimizers.trees import check_params, check_same_params, check_whole, fill
from lohp_jax.types import PyTree

Mode = Literal["race", "candidate"]


class Lgl2oState(NamedTuple):
    """State of `lgl2o`.

    Attributes:
      hand_designed: state of the hand-designed optimizer, the fallback.
      learned: state of the learned optimizer.
      rival: where the learned optimizer stands in a race, like the parameters; empty otherwise.
      step: int32, updates so far.
      follows_learned: bool, who won the last comparison.
      learned_wins: int32, comparisons that the learned optimizer has won.
      failures: int32, updates, of either optimizer, that were not taken because they were not finite.
    """

    hand_designed: optax.OptState
    learned: optax.OptState
    rival: PyTree
    step: jax.Array
    follows_learned: jax.Array
    learned_wins: jax.Array
    failures: jax.Array


def lgl2o(
    hand_designed: optax.GradientTransformation,
    learned: optax.GradientTransformation,
    *,
    mode: Mode = "race",
    num_steps: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Takes the learned update only where it leads to a smaller loss than the hand-designed one.

    "candidate": both propose an update from one gradient; every `num_steps` steps two evaluations of
    the loss decide whose updates are taken until the next. "race": both run on their own for
    `num_steps` steps, each on gradients where it stands, two a step; then both go on from where the
    better one is. Meanwhile the parameters are those of the hand-designed optimizer. The learned one
    sees the gradients of `grad_fn` as they are: clipping and the like belong inside both, not before
    `lgl2o` in a chain. A loss that is not finite loses, a tie goes to the hand-designed optimizer: by
    the losses compared nothing is worse than it.

    An optimizer whose update leads to what is not finite loses, too. It stays where it is and keeps its
    state, but for counts and keys, so that one bad gradient spoils nothing; if both fail, nothing moves.

    Args:
      hand_designed: the fallback, any optax transformation.
      learned: the guarded optimizer.
      mode: "race" or "candidate".
      num_steps: steps between comparisons.

    Returns: a transformation whose `update` needs `value_fn(params) -> loss`, on whatever examples are
      to decide, and in a race `grad_fn(params, i) -> gradient`; both optimizers get them too.

    Raises: ValueError for an unknown mode or a `num_steps` that is no positive whole number; `init` for
      parameters that are no floating-point or complex arrays; `update` for a missing `params`,
      `value_fn` or `grad_fn`, and for other tensors than `init` saw.
    """
    check_option("lgl2o", "mode", mode, get_args(Mode))
    check_num_steps("lgl2o", num_steps)
    hand_designed, learned = map(with_extra_args, (hand_designed, learned))
    racing = mode == "race"

    def init(params):
        check_params("lgl2o", params)
        check_whole("lgl2o", params)
        rival = jax.tree.map(jnp.array, params) if racing else ()  # copied, so it can be donated
        states = hand_designed.init(params), learned.init(params)
        step, wins, failures = (jnp.zeros((), jnp.int32) for _ in range(3))
        return Lgl2oState(*states, rival, step, jnp.zeros((), bool), wins, failures)

    def update(updates, state, params=None, *, value_fn=None, grad_fn=None, **extra):
        _check_given(params=params, value_fn=value_fn, **({"grad_fn": grad_fn} if racing else {}))
        check_same_params("lgl2o", init, updates, params, state)
        extra |= {"value_fn": value_fn, "grad_fn": grad_fn}
        here = state.rival if racing else params
        ours = _advance(hand_designed, updates, state.hand_designed, params, extra)
        gradient = grad_fn(here, 1) if racing else updates
        theirs = _advance(learned, gradient, state.learned, here, extra)
        due, taken, counts = _judge(racing, num_steps, state, ours, theirs, value_fn)
        chosen = optax.tree.where(taken, theirs.params, ours.params)
        kept = optax.tree.where(due, chosen, theirs.params) if racing else ()
        moved = jax.tree.map(lambda new, old: (new - old).astype(old.dtype), chosen, params)
        return moved, Lgl2oState(ours.state, theirs.state, kept, *counts)

    return optax.GradientTransformationExtraArgs(init, update)


class _Attempt(NamedTuple):
    """One step of an optimizer; `ok`: whether it was finite, and so taken."""

    params: PyTree
    state: optax.OptState
    ok: jax.Array


def _judge(
    racing: bool,
    num_steps: int,
    state: Lgl2oState,
    ours: _Attempt,
    theirs: _Attempt,
    value_fn: Callable[[PyTree], jax.Array],
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """Whether a comparison is due, whether `theirs` is taken, and the last fields of the state."""
    step = state.step + 1
    # a race is judged where it ends, a choice between candidates where it begins to count
    due = (step if racing else state.step) % num_steps == 0
    better = branch(
        due,
        lambda: _better(
            value_fn(theirs.params), jnp.where(ours.ok, value_fn(ours.params), jnp.inf)
        ),
        lambda: jnp.zeros((), bool),
    )
    won = theirs.ok & better
    follows = jnp.where(due, won, state.follows_learned)
    # between comparisons a candidate that fails makes way for the other one
    taken = won if racing else jnp.where(due, won, theirs.ok & (follows | ~ours.ok))
    failures = state.failures + ~ours.ok + ~theirs.ok
    return due, taken, (step, follows, state.learned_wins + won, failures)


def _advance(optimizer, gradient, state, params, extra) -> _Attempt:
    own = {"grad": gradient} if "grad" in extra else {}
    updates, new_state = optimizer.update(gradient, state, params, **(extra | own))
    new = optax.apply_updates(params, updates)
    ok = jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(new)], bool))

    def keep(x, old):
        return jnp.where(ok, x, old) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    kept = jax.tree.map(keep, new_state, fill(state, new_state))
    return _Attempt(optax.tree.where(ok, new, params), kept, ok)


def _better(theirs: jax.Array, ours: jax.Array) -> jax.Array:
    """Whether `theirs` is finite, and smaller than `ours` unless that is not finite."""
    return jnp.isfinite(theirs) & ((theirs < ours) | ~jnp.isfinite(ours))


def _check_given(**arguments) -> None:
    meaning = {
        "params": "the parameters",
        "value_fn": "value_fn=(params) -> loss, for the comparison",
        "grad_fn": "grad_fn=(params, i) -> gradient, for the learned optimizer's own position",
    }
    for name, value in arguments.items():
        if value is None:
            raise ValueError(f"lgl2o: update needs {meaning[name]}, got none.")
