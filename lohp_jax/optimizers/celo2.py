"""Celo2: a learned direction, with learning rate, schedule and weight decay left to the user.

No recurrent network, no loss, no number of steps: about 330 weights look at each parameter and its
accumulators and say where it goes; how far is the learning rate's part.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lohp_jax.optimizers.features import (
    Accumulators,
    channels,
    clip_gradient,
    init_accumulators,
    perceptron,
    update_accumulators,
)
from lohp_jax.optimizers.theta import check_theta
from lohp_jax.types import Params

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NUM_ITERATIONS = 5
_RMS_DECAY = 0.95


class Celo2State(NamedTuple):
    """State of `scale_by_celo2`: `Accumulators` of pytrees like the parameters."""

    accumulators: Accumulators


def celo2(
    theta: Params,
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    orthogonalise: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Celo2 for matrices and larger tensors, AdamW (0.9, 0.95) for vectors and scalars.

    Args:
      theta: its weights, see `load_theta`.
      learning_rate: of both, a number or a schedule; the root mean square of a tensor's update.
      weight_decay: decoupled, of both.
      orthogonalise: as in `scale_by_celo2`.
    """
    learned = optax.chain(
        scale_by_celo2(theta, orthogonalise=orthogonalise),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    plain = optax.adamw(learning_rate, b1=0.9, b2=0.95, weight_decay=weight_decay)

    def label(params):
        return jax.tree.map(lambda p: "learned" if jnp.ndim(p) >= 2 else "plain", params)

    return optax.partition({"learned": learned, "plain": plain}, label)


def scale_by_celo2(theta: Params, *, orthogonalise: bool = True) -> optax.GradientTransformation:
    """The learned direction, of root mean square 1 in every matrix; points uphill as a gradient does.

    Args:
      theta: its weights.
      orthogonalise: send the direction of matrices through five Newton-Schulz iterations (Muon,
        Jordan et al., 2024); of larger tensors, the matrices of their last two axes.
    """
    check_theta(theta, "celo2")
    weights = theta["ff_mod_stack"]["~"]

    def init(params):
        leaves, structure = jax.tree.flatten(params)
        built = [init_accumulators(jnp.atleast_1d(leaf)) for leaf in leaves]
        columns = zip(*built, strict=True) if built else [()] * len(Accumulators._fields)
        return Celo2State(Accumulators(*map(structure.unflatten, columns)))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("celo2: update needs the parameters, got None.")
        leaves, structure = jax.tree.flatten(updates)
        if not leaves:  # vectors only, which are not ours
            return updates, state
        columns = [jax.tree.leaves(tree) for tree in state.accumulators]
        results = [
            _step(Accumulators(*row), gradient, param, weights, orthogonalise)
            for *row, gradient, param in zip(*columns, leaves, jax.tree.leaves(params), strict=True)
        ]
        directions, built = zip(*results, strict=True)
        accumulators = Accumulators(*map(structure.unflatten, zip(*built, strict=True)))
        return structure.unflatten(directions), Celo2State(accumulators)

    return optax.GradientTransformation(init, update)


def _step(
    old: Accumulators,
    gradient: jax.Array,
    param: jax.Array,
    weights: dict[str, jax.Array],
    orthogonalise: bool,
) -> tuple[jax.Array, Accumulators]:
    """Direction and accumulators of one tensor."""
    shape, dtype = gradient.shape, gradient.dtype
    gradient, param = (jnp.atleast_1d(jnp.float32(x)) for x in (gradient, param))
    gradient = clip_gradient(gradient)
    accumulators = update_accumulators(old, gradient, rms_decay=_RMS_DECAY)
    groups = channels(accumulators, gradient, param, rms_floor=1e-8)
    axes = tuple(range(gradient.ndim))[-2:]
    direction, *_ = perceptron(groups, weights, normalise_over=axes, normalise_floor=1e-9)
    if orthogonalise and gradient.ndim >= 2:
        direction = newton_schulz(direction)
    direction *= jax.lax.rsqrt(jnp.mean(direction**2, axes, keepdims=True) + 1e-9)
    return direction.reshape(shape).astype(dtype), accumulators


def newton_schulz(matrix: jax.Array) -> jax.Array:
    """Pushes the singular values of `[..., m, n]` towards 1 (five quintic iterations)."""
    wide = matrix.shape[-2] <= matrix.shape[-1]
    x = matrix if wide else jnp.swapaxes(matrix, -1, -2)
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_NUM_ITERATIONS):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else jnp.swapaxes(x, -1, -2)
