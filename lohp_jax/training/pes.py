"""Training by persistent evolution strategies (PES), without a gradient; see `optimizers.meta`."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lohp_jax.optimizers.meta import Pair, Unroll, advance_pair
from lohp_jax.training.distributed import all_rows, own_rows
from lohp_jax.types import PyTree


class MetaState(NamedTuple):
    """Everything that a meta-update changes.

    Attributes:
      meta: the meta-parameters.
      opt_state: of the optimizer of the meta-parameters.
      pairs: for each kind of unroll, a `Pair` with a leading axis of pairs.
      step: int32 scalar, meta-updates so far.
    """

    meta: PyTree
    opt_state: optax.OptState
    pairs: tuple[Pair, ...]
    step: jax.Array


def make_meta_update(
    unrolls: Sequence[Unroll], optimizer: optax.GradientTransformation, *, sigma: float
) -> Callable[..., tuple[MetaState, dict[str, jax.Array]]]:
    """Builds `update(state, keys, axis_name=None) -> (state, metrics)`, pure.

    One truncation of every pair, with the key `keys[i]` for the i-th pair of each kind, then one step.
    The gradient is the mean over kinds of unroll of the means over pairs. Metrics: `loss`, `losses`
    `[kinds]` and `gradient_norm`, before the optimizer.
    """

    def advance_kind(index, meta, pairs, keys):
        def advance(pair, key):
            key = jax.random.fold_in(key, index)
            return advance_pair(unrolls[index], meta, pair, key, sigma=sigma)

        pairs, gradients, losses = jax.vmap(advance)(pairs, keys)
        return pairs, jax.tree.map(lambda g: g.mean(axis=0), gradients), losses.mean()

    def update(state, keys, axis_name=None):
        own = own_rows(state.pairs, len(keys), axis_name)
        moved = [advance_kind(i, state.meta, pairs, keys) for i, pairs in enumerate(own)]
        pairs, gradients, losses = zip(*moved, strict=True)
        gradient, losses = jax.tree.map(lambda *g: sum(g) / len(g), *gradients), jnp.stack(losses)
        if axis_name is not None:
            gradient, losses = jax.lax.pmean((gradient, losses), axis_name)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.meta)
        meta, pairs = optax.apply_updates(state.meta, updates), all_rows(pairs, axis_name)
        metrics = {
            "loss": losses.mean(),
            "losses": losses,
            "gradient_norm": optax.tree.norm(gradient),
        }
        return MetaState(meta, opt_state, pairs, state.step + 1), metrics

    return update
