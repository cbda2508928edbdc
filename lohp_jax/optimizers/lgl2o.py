"""LGL2O: a learned optimizer behind a guard that compares losses (Premont-Schwarz et al., 2022).

arXiv 2201.12426. The rival of HUB: instead of blending two updates it tries both and keeps the better.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from lohp_jax.checks import check_option
from lohp_jax.optimizers.mixing import check_inexact
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
    """

    hand_designed: optax.OptState
    learned: optax.OptState
    rival: PyTree
    step: jax.Array
    follows_learned: jax.Array
    learned_wins: jax.Array


def lgl2o(
    hand_designed: optax.GradientTransformation,
    learned: optax.GradientTransformation,
    *,
    mode: Mode = "race",
    num_steps: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Takes the learned update only where it leads to a smaller loss than the hand-designed one.

    "candidate": both propose an update from one gradient; every `num_steps` steps two evaluations of
    the loss decide whose updates are taken until the next comparison. "race": both run on their own
    for `num_steps` steps, the learned one on gradients where it stands, so that a step costs two
    gradients; then both go on from where the better one is. Meanwhile the parameters are those of the
    hand-designed optimizer. A loss that is not finite loses, and a tie goes to the hand-designed
    optimizer, so that nothing is ever worse than it by the losses compared.

    Args:
      hand_designed: the fallback, any optax transformation.
      learned: the guarded optimizer.
      mode: "race" or "candidate".
      num_steps: steps between comparisons.

    Returns: a transformation whose `update` needs `value_fn(params) -> loss`, on whatever examples are
      to decide, and in a race `grad_fn(params, i) -> gradient`; both optimizers get them too.

    Raises: ValueError for an unknown mode or a `num_steps` that is not positive; `update` for a missing
      `params`, `value_fn` or `grad_fn`.
    """
    check_option("lgl2o", "mode", mode, get_args(Mode))
    if not num_steps > 0:
        raise ValueError(f"lgl2o: num_steps must be positive, got {num_steps}.")
    hand_designed = optax.with_extra_args_support(hand_designed)
    learned = optax.with_extra_args_support(learned)
    racing = mode == "race"

    def init(params):
        check_inexact("lgl2o", params)
        # a copy, so that parameters and state can be donated
        rival = jax.tree.map(jnp.array, params) if racing else ()
        states = hand_designed.init(params), learned.init(params)
        step, wins = (jnp.zeros((), jnp.int32) for _ in range(2))
        return Lgl2oState(*states, rival, step, jnp.zeros((), bool), wins)

    def update(updates, state, params=None, *, value_fn=None, grad_fn=None, **extra):
        _check_given(params=params, value_fn=value_fn, **({"grad_fn": grad_fn} if racing else {}))
        extra |= {"value_fn": value_fn, "grad_fn": grad_fn}
        ours, hand_state = hand_designed.update(updates, state.hand_designed, params, **extra)
        here = state.rival if racing else params
        gradient = grad_fn(here, 1) if racing else updates
        theirs, learned_state = learned.update(gradient, state.learned, here, **extra)
        fallback, rival = optax.apply_updates(params, ours), optax.apply_updates(here, theirs)

        step = state.step + 1
        # a race is judged where it ends, a choice between candidates where it begins to count
        due = (step if racing else state.step) % num_steps == 0
        won = jax.lax.cond(
            due, lambda: _better(value_fn(rival), value_fn(fallback)), lambda: jnp.zeros((), bool)
        )
        follows = jnp.where(due, won, state.follows_learned)
        taken = due & won if racing else follows
        chosen = _where(taken, rival, fallback)
        if racing:
            rival = _where(due, chosen, rival)
        wins = state.learned_wins + won
        moved = jax.tree.map(lambda new, old: (new - old).astype(old.dtype), chosen, params)
        kept = rival if racing else ()
        return moved, Lgl2oState(hand_state, learned_state, kept, step, follows, wins)

    return optax.GradientTransformationExtraArgs(init, update)


def _better(theirs: jax.Array, ours: jax.Array) -> jax.Array:
    """Whether `theirs` is finite, and smaller than `ours` unless that is not finite."""
    return jnp.isfinite(theirs) & ((theirs < ours) | ~jnp.isfinite(ours))


def _where(condition: jax.Array, yes: PyTree, no: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _check_given(**arguments) -> None:
    meaning = {
        "params": "the parameters",
        "value_fn": "value_fn=(params) -> loss, for the comparison",
        "grad_fn": "grad_fn=(params, i) -> gradient, for the learned optimizer's own position",
    }
    for name, value in arguments.items():
        if value is None:
            raise ValueError(f"lgl2o: update needs {meaning[name]}, got none.")
