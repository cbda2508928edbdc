"""VeLO and Celo: a recurrent network sets the pace of every tensor, a small one moves its parameters.

VeLO: Metz et al., 2022 (arXiv 2211.09760). Celo and Celo-Adam differ in what the recurrent network sees
and in what it controls. All three work on gradients and the training loss alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lohp_jax.optimizers.features import (
    Accumulators,
    channels,
    clip_gradient,
    init_accumulators,
    perceptron,
    update_accumulators,
)
from lohp_jax.optimizers.theta import Rule, check_theta
from lohp_jax.types import Params, PyTree

_NUM_HORIZONS = 10
_FRACTIONS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
_NEVER = 999999999999.0
_STEP = 0.001
_MOST_RANKS = 5


class LossBuffer(NamedTuple):
    """Running means of the loss over ten horizons, and the least that each has been."""

    mean: jax.Array
    least: jax.Array
    count: jax.Array


class VeloState(NamedTuple):
    """State of `velo` and `celo`; `accumulators` holds pytrees like the parameters.

    Attributes:
      step: int32, updates so far.
      accumulators: `Accumulators` of pytrees like the parameters.
      losses: `LossBuffer`.
      hidden: `[tensors, H]` of the recurrent network.
      cell: the same.
    """

    step: jax.Array
    accumulators: Accumulators
    losses: LossBuffer
    hidden: jax.Array
    cell: jax.Array


class CeloAdamState(NamedTuple):
    """State of `celo_adam`."""

    step: jax.Array
    adam: optax.OptState
    losses: LossBuffer
    hidden: jax.Array
    cell: jax.Array


def velo(theta: Params, num_steps: int) -> optax.GradientTransformationExtraArgs:
    """VeLO as an optax transformation; its `update` needs `value=`, the training loss.

    Nothing is to be tuned, no learning rate is set. Beyond `num_steps` it goes on at the pace it
    ended with, for which it was not trained.

    Args:
      theta: its weights, see `load_theta`.
      num_steps: T, updates to plan for.

    Raises: ValueError for weights of another rule, or a `num_steps` that is not positive; `update` for
      a missing `value` or missing parameters.
    """

    def see(old, params, common):
        tensors = [
            _describe_tensor(*pair) for pair in zip(_tensors(old, params), params, strict=True)
        ]
        return jnp.stack([jnp.concatenate([*common, *own]) for own in tensors])

    def control(outputs, banks):
        rows, paces = outputs
        mixed = jax.tree.map(lambda bank: 100.0 * _mix(rows, bank), banks)
        return mixed, paces

    return _recurrent("velo", theta, num_steps, see, control)


def celo(theta: Params, num_steps: int) -> optax.GradientTransformationExtraArgs:
    """Celo: VeLO whose recurrent network sees time and loss only, and sets nothing but the pace.

    Args and errors are those of `velo`.
    """

    def see(old, params, common):
        return jnp.broadcast_to(jnp.concatenate(common), (len(params), 18))

    def control(outputs, banks):
        rows, paces = outputs
        rows = jax.nn.softmax(rows, axis=-1)
        mixed = jax.tree.map(lambda bank: _mix(rows, bank), banks)
        return mixed, 0.1 * jnp.exp(paces)

    return _recurrent("celo", theta, num_steps, see, control)


def celo_adam(theta: Params, num_steps: int) -> optax.GradientTransformationExtraArgs:
    """Celo's recurrent network as the learning-rate schedule, by tensor, of Adam.

    Args and errors are those of `velo`.
    """
    check_theta(theta, "celo_adam")
    _check_num_steps("celo_adam", num_steps)
    adam = optax.scale_by_adam(eps=1e-8, eps_root=1e-10)

    def init(params):
        hidden, cell = _start(theta, params)
        step = jnp.zeros((), jnp.int32)
        adam_state = adam.init(optax.tree.cast(params, jnp.float32))
        return CeloAdamState(step, adam_state, _init_losses(), hidden, cell)

    def update(updates, state, params=None, *, value=None, **_):
        value = _check_value("celo_adam", value)
        clipped = jax.tree.map(lambda g: clip_gradient(jnp.float32(g)), updates)
        losses = _update_losses(state.losses, value, num_steps)
        common = _fraction_left(state.step, num_steps), _loss_features(losses, num_steps)
        seen = jnp.broadcast_to(jnp.concatenate(common), (len(state.hidden), 18))
        _, paces, hidden, cell = _lstm(theta["rnn_params"], seen, state.hidden, state.cell)
        directions, adam_state = adam.update(clipped, state.adam, params)
        leaves, structure = jax.tree.flatten(directions)
        rates = 0.1 * jnp.exp(paces) * _STEP
        steps = [-rate * leaf for rate, leaf in zip(rates, leaves, strict=True)]
        cast = jax.tree.map(lambda s, g: s.astype(g.dtype), structure.unflatten(steps), updates)
        return cast, CeloAdamState(state.step + 1, adam_state, losses, hidden, cell)

    return optax.GradientTransformationExtraArgs(init, update)


def _recurrent(
    rule: Rule, theta: Params, num_steps: int, see: Callable, control: Callable
) -> optax.GradientTransformationExtraArgs:
    """What VeLO and Celo share; they differ in what the network sees and how its outputs are read."""
    check_theta(theta, rule)
    _check_num_steps(rule, num_steps)
    banks = theta["ff_mod_stack"]["~"]

    def init(params):
        hidden, cell = _start(theta, params)
        accumulators = _like_params(init_accumulators, params)
        step = jnp.zeros((), jnp.int32)
        return VeloState(step, accumulators, _init_losses(), hidden, cell)

    def update(updates, state, params=None, *, value=None, **_):
        value = _check_value(rule, value)
        if params is None:
            raise ValueError(f"{rule}: update needs the parameters, got None.")
        leaves, structure = jax.tree.flatten(params)
        flat = [jnp.atleast_1d(jnp.float32(p)) for p in leaves]
        gradients = [
            clip_gradient(jnp.atleast_1d(jnp.float32(g))) for g in jax.tree.leaves(updates)
        ]
        losses = _update_losses(state.losses, value, num_steps)
        common = _fraction_left(state.step, num_steps), _loss_features(losses, num_steps)
        seen = see(state.accumulators, flat, common)
        *outputs, hidden, cell = _lstm(theta["rnn_params"], seen, state.hidden, state.cell)
        weights, paces = control(outputs, banks)
        old = _tensors(state.accumulators, flat)
        new = [update_accumulators(a, g) for a, g in zip(old, gradients, strict=True)]
        steps = []
        for j, (accumulators, gradient, param, leaf) in enumerate(
            zip(new, gradients, flat, leaves, strict=True)
        ):
            own = jax.tree.map(lambda w, j=j: w[j], weights)
            step = _parameter_step(accumulators, gradient, param, own, paces[j])
            steps.append(step.reshape(leaf.shape).astype(leaf.dtype))
        accumulators = Accumulators(
            *(structure.unflatten(column) for column in zip(*new, strict=True))
        )
        state = VeloState(state.step + 1, accumulators, losses, hidden, cell)
        return structure.unflatten(steps), state

    return optax.GradientTransformationExtraArgs(init, update)


def _parameter_step(accumulators, gradient, param, weights, pace):
    """The update of one tensor."""
    groups = channels(accumulators, gradient, param, rms_floor=1e-6)
    direction, magnitude, _ = perceptron(groups, weights, normalise_over=None, normalise_floor=1e-5)
    size = jnp.sqrt(jnp.mean(param**2) + 1e-9)
    return -pace * _STEP * direction * jnp.exp(_STEP * magnitude) * size


def _mix(rows: jax.Array, bank: jax.Array) -> jax.Array:
    """`[N, P]` controls and a bank `[P, ...]` -> `[N, ...]`, the mean over the bank."""
    flat = rows @ bank.reshape(len(bank), -1) / len(bank)
    return flat.reshape(len(rows), *bank.shape[1:])


def _lstm(weights, seen, hidden, cell):
    """One step of the recurrent network over tensors: controls, paces, and its new state."""

    def linear(name, x):
        return x @ weights[name]["w"] + weights[name]["b"][None]

    shared = jnp.max(jax.nn.relu(linear("linear_1", seen)), axis=0, keepdims=True)
    mixed = linear("linear_2", seen) + shared
    gates = linear("rnn/linear", jnp.concatenate([mixed, hidden], axis=-1))
    i, g, f, o = jnp.split(gates, 4, axis=-1)
    cell = jax.nn.sigmoid(f + 1.0) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
    controls = linear("rnn_to_controls", hidden) if "rnn_to_controls" in weights else None
    return controls, linear("step_size", hidden)[:, 0], hidden, cell


def _start(theta, params):
    """Recurrent state of every tensor."""
    count = len(jax.tree.leaves(params))
    initial = theta["lstm_init_state"]
    return tuple(jnp.tile(initial[name], (count, 1)) for name in ("hidden", "cell"))


def _like_params(init: Callable, params: PyTree) -> Accumulators:
    """`Accumulators` of pytrees like the parameters."""
    leaves, structure = jax.tree.flatten(params)
    built = [init(jnp.atleast_1d(leaf)) for leaf in leaves]
    return Accumulators(*(structure.unflatten(column) for column in zip(*built, strict=True)))


def _tensors(accumulators: Accumulators, params: list) -> list[Accumulators]:
    """One `Accumulators` for each tensor."""
    columns = [jax.tree.leaves(tree) for tree in accumulators]
    return [Accumulators(*row) for row in zip(*columns, strict=True)]


# --- what the recurrent network sees


def _horizon_decays(num_steps: int) -> np.ndarray:
    return np.exp(-1.0 / np.logspace(1, np.log10(num_steps), _NUM_HORIZONS)).astype(np.float32)


def _init_losses() -> LossBuffer:
    least = jnp.full(_NUM_HORIZONS, _NEVER, jnp.float32)
    return LossBuffer(jnp.zeros(_NUM_HORIZONS, jnp.float32), least, jnp.zeros((), jnp.int32))


def _update_losses(old: LossBuffer, loss: jax.Array, num_steps: int) -> LossBuffer:
    """Adds a loss, at most twice the largest running mean in size."""
    decays = _horizon_decays(num_steps)
    correction = 1.0 - decays ** (old.count + 1.0)
    largest = jnp.where(old.count == 0, loss, jnp.max(old.mean / correction))
    loss = jnp.minimum(2.0 * jnp.abs(largest), loss)
    mean = decays * old.mean + (1.0 - decays) * loss
    return LossBuffer(mean, jnp.minimum(old.least, mean / correction), old.count + 1)


def _loss_features(losses: LossBuffer, num_steps: int) -> jax.Array:
    """`[9]` how each horizon's mean stands to the next one's, above the least of the shorter."""
    decays = _horizon_decays(num_steps)
    current = losses.mean / (1.0 - decays ** losses.count.astype(jnp.float32))
    above = current[:-1] - losses.least[:-1]
    ratio = above / jnp.maximum(1e-8, current[1:] - losses.least[:-1])
    return jnp.where(losses.count <= 2, 0.0, jnp.clip(ratio - 1.0, -1.0, 1.0))


def _fraction_left(step: jax.Array, num_steps: int) -> jax.Array:
    """`[9]` where the run stands between its start and its planned end."""
    return jnp.tanh(10.0 * (step / jnp.float32(num_steps) - np.float32(_FRACTIONS)))


def _describe_tensor(accumulators: Accumulators, param: jax.Array) -> tuple[jax.Array, ...]:
    """Mean of the second moment, rank, and two spreads of the momenta, in log units."""
    scale = jax.lax.rsqrt(jnp.maximum(1e-9, jnp.mean(param**2)))
    momentum, rms = accumulators.momentum * scale, accumulators.rms * scale
    axes = tuple(range(param.ndim))
    center = jnp.mean(momentum, axes, keepdims=True)
    rank = jax.nn.one_hot(sum(n > 1 for n in param.shape), _MOST_RANKS)
    spread = jnp.mean((momentum - center) ** 2, axes)
    # the mean of the momentum, not of rms: a slip that the published weights were trained with
    rms_spread = jnp.mean((rms - center) ** 2, axes)
    return _squash(jnp.mean(rms, axes)), rank, _squash(spread), _squash(rms_spread)


def _squash(x: jax.Array) -> jax.Array:
    return 0.5 * jnp.clip(jnp.log(1e-8 + jnp.abs(10.0 * x)), -5.0, 5.0)


def _check_num_steps(rule: str, num_steps: int) -> None:
    if not num_steps > 0:
        raise ValueError(f"{rule}: num_steps must be positive, got {num_steps}.")


def _check_value(rule: str, value) -> jax.Array:
    if value is None:
        raise ValueError(
            f"{rule}: update needs the training loss, got none; pass it as "
            "update(gradients, state, params, value=loss)."
        )
    return jnp.float32(value)
