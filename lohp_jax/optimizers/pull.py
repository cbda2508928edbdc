"""Pulls on the parameters themselves, put after a blend: decoupled weight decay, and an anchor.

Both are links of an `optax.chain` that add to an update, whatever made it:

    optax.chain(hub(optax.adam(1e-3), learned), decay(1e-5), anchor(1e-3, where=is_pretrained))
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lohp_jax.checks import check_fraction
from lohp_jax.optimizers.trees import (
    Path,
    by_path,
    check_params,
    check_same_params,
    keys,
    name_of,
)
from lohp_jax.types import PyTree


class AnchorState(NamedTuple):
    """State of `anchor` (and `decay`).

    Attributes:
      step: int32, updates so far.
      origin: by name of the tensor, the parameters that `init` saw; nothing for `decay`.
    """

    step: jax.Array
    origin: dict[str, jax.Array]


def decay(
    rate: optax.ScalarOrSchedule, *, where: Callable[[Path], bool] = lambda path: True
) -> optax.GradientTransformation:
    """Decoupled weight decay: adds -rate * p to every update.

    With AdamW inside, the decay is blended like the rest of its update, so that vanilla HUB leaves 1 / K
    of it. Here all of it acts; that of `optax.adamw(learning_rate, weight_decay=w)` has the rate
    learning_rate * w.

    Args:
      rate: in [0, 1], the share of a parameter that goes in a step, or a schedule of it.
      where: which tensors, by path.

    Raises: ValueError for a rate out of range; `init` for parameters that are no floating-point or
      complex arrays; `update` for missing parameters, and for others than `init` saw.
    """
    return _pull("decay", rate, where, anchored=False)


def anchor(
    rate: optax.ScalarOrSchedule, *, where: Callable[[Path], bool] = lambda path: True
) -> optax.GradientTransformation:
    """Adds rate * (p_0 - p) to every update, p_0 being the parameters that `init` saw.

    For fine-tuning, with `where` naming the pre-trained blocks: what the data do not ask for stays as it
    was (L2-SP, Li et al., 2018, decoupled). Keeps one copy of the tensors it holds.

    Args:
      rate: in [0, 1], the share of the way back that a step goes, or a schedule of it.
      where: which tensors, by path.

    Raises: ValueError for a rate out of range; `init` for parameters that are no floating-point or
      complex arrays; `update` for missing parameters, and for others than `init` saw.
    """
    return _pull("anchor", rate, where, anchored=True)


def _pull(name: str, rate, where: Callable, *, anchored: bool) -> optax.GradientTransformation:
    """Adds rate * (p_0 - p), with p_0 = 0 unless anchored."""
    if not callable(rate):
        check_fraction(name, "rate", rate)

    def init(params: PyTree) -> AnchorState:
        held = jax.tree.map_with_path(lambda path, p: p if where(keys(path)) else None, params)
        check_params(name, held)
        origin = {name_of(path): jnp.array(p) for path, p in by_path(held).items() if anchored}
        return AnchorState(jnp.zeros((), jnp.int32), origin)

    def update(updates, state, params=None):
        if params is None:
            raise ValueError(f"{name}: update needs the parameters, got None.")
        check_same_params(name, init, updates, params, state)
        share = rate(state.step) if callable(rate) else rate

        def pulled(path, u, p):
            path = keys(path)
            if not where(path):
                return u
            origin = state.origin[name_of(path)] if anchored else 0.0
            return (u + share * (origin - p)).astype(u.dtype)

        pulled = jax.tree.map_with_path(pulled, updates, params)
        return pulled, AnchorState(optax.safe_increment(state.step), state.origin)

    return optax.GradientTransformation(init, update)
