"""Celo2: a learned direction, with learning rate, schedule and weight decay left to the user.

No recurrent network, no loss, no number of steps: about 330 weights look at each parameter and its
accumulators and say where it goes; how far is the learning rate's part.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lohp_jax.checks import check_positive
from lohp_jax.optimizers.features import (
    Accumulators,
    check_like,
    check_tensors,
    clip_gradient,
    init_tensors,
    join_tensors,
    map_tensors,
    perceptron,
    split_tensors,
    update_accumulators,
)
from lohp_jax.optimizers.theta import check_theta
from lohp_jax.optimizers.trees import check_params, check_same_params, wide
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

    All moments are at least float32, whatever types parameters and gradients have.

    A gradient of NaN stays in the accumulators of its tensor, and after that every update of it is NaN;
    so does an infinite one of a vector or scalar. `hub(..., guard="finite")` starts them anew.

    Args:
      theta: its weights, see `load_theta`.
      learning_rate: of both, a number or a schedule; the root mean square of a tensor's update.
      weight_decay: decoupled, of both.
      orthogonalise: as in `scale_by_celo2`.

    Raises: ValueError for weights of another rule, or a `learning_rate` that is not positive and finite;
      `init` for parameters that are no floating-point arrays (complex ones only as vectors and scalars);
      `update` for missing parameters, and for other tensors than `init` saw.
    """
    if not callable(learning_rate):
        check_positive("celo2", "learning_rate", learning_rate)
    learned = optax.chain(
        scale_by_celo2(theta, orthogonalise=orthogonalise),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    adamw = optax.adamw(learning_rate, b1=0.9, b2=0.95, weight_decay=weight_decay)

    def label(params):
        return jax.tree.map(
            lambda p: "learned" if jnp.ndim(p) >= 2 and jnp.size(p) else "plain", params
        )

    both = optax.partition({"learned": learned, "plain": _in_float32(adamw)}, label)

    def init(params):
        check_params("celo2", params)
        return both.init(params)

    def update(updates, state, params=None, **extra):
        check_same_params("celo2", both.init, updates, params, state)
        return both.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def _in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps at least float32 inside: squares of small gradients are zero in half precision."""

    def init(params):
        return optimizer.init(jax.tree.map(wide, params))

    def update(updates, state, params=None):
        params = jax.tree.map(wide, params)
        moved, state = optimizer.update(jax.tree.map(wide, updates), state, params)
        return jax.tree.map(lambda m, u: m.astype(u.dtype), moved, updates), state

    return optax.GradientTransformation(init, update)


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
        check_tensors("celo2", params)
        return Celo2State(init_tensors(params))

    def update(updates, state, params=None):
        check_like("celo2", state.accumulators.rms, gradients=updates, parameters=params)
        leaves, structure = jax.tree.flatten(updates)
        flat = [jnp.atleast_1d(jnp.float32(p)) for p in jax.tree.leaves(params)]
        gradients = [jnp.atleast_1d(jnp.float32(g)) for g in leaves]
        new = [
            update_accumulators(old, g, rms_decay=_RMS_DECAY)
            for old, g in zip(split_tensors(state.accumulators), gradients, strict=True)
        ]
        directions, _ = map_tensors(step_tensor, list(zip(new, gradients, flat, strict=True)))
        steps = [
            s.reshape(g.shape).astype(g.dtype) for s, g in zip(directions, leaves, strict=True)
        ]
        return structure.unflatten(steps), Celo2State(join_tensors(new, structure))

    def step_tensor(tensor, _):
        accumulators, gradient, param = tensor
        axes = tuple(range(gradient.ndim))[-2:]
        direction, *_ = perceptron(
            accumulators,
            clip_gradient(gradient),
            param,
            weights,
            rms_floor=1e-8,
            axes=axes,
            mean_floor=1e-9,
        )
        if orthogonalise and gradient.ndim >= 2:
            direction = newton_schulz(direction)
        size = jnp.sqrt(jnp.mean(direction**2, axes, keepdims=True) + 1e-9)
        return direction / size, ()

    return optax.GradientTransformation(init, update)


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
