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

from lohp_jax.checks import check_num_steps
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
from lohp_jax.optimizers.theta import Rule, check_theta
from lohp_jax.types import Params

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
      summary: what the recurrent network will see of the accumulators in the next step, which need not
        be read again: for VeLO `[tensors, 2, 4]`, see `_summarise`; empty for Celo.
      losses: `LossBuffer`.
      hidden: `[tensors, H]` of the recurrent network.
      cell: the same.
    """

    step: jax.Array
    accumulators: Accumulators
    summary: jax.Array
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

    Nothing is to be tuned, no learning rate is set. Weight decay w is a part of the loss: give w
    times the sum of squares with `value`, and its gradient (1e-6 is a start). Beyond `num_steps` it
    goes on, for which it was not trained, nor was it for more than 150,000 steps: there accumulate
    gradients, `optax.MultiSteps(velo(theta, num_steps // k), k)`; `value` is then the last of k losses.

    A loss of NaN stays in the running means of the loss, a gradient of NaN in the accumulators of its
    tensor, and after that every update is NaN; `hub(..., guard="finite")` starts them anew.

    Args:
      theta: its weights, see `load_theta`.
      num_steps: T, updates to plan for.

    Raises: ValueError for weights of another rule, or a `num_steps` that is no positive whole number;
      `init` for parameters that are not floating-point or have no entries; `update` for a missing
      `value`, and for gradients or parameters that are missing or unlike those of `init`.
    """

    def see(summary, power, shapes, common):
        common = jnp.broadcast_to(jnp.concatenate(common), (len(shapes), 18))
        return jnp.concatenate([common, *_describe_tensors(summary, power, shapes)], axis=1)

    def control(outputs, banks):
        rows, paces = outputs
        mixed = jax.tree.map(lambda bank: 100.0 * _mix(rows, bank), banks)
        return mixed, paces

    return _recurrent("velo", theta, num_steps, see, control, _summarise)


def celo(theta: Params, num_steps: int) -> optax.GradientTransformationExtraArgs:
    """Celo: VeLO whose recurrent network sees time and loss only, and sets nothing but the pace.

    Args and errors are those of `velo`.
    """

    def see(summary, power, shapes, common):
        return jnp.broadcast_to(jnp.concatenate(common), (len(shapes), 18))

    def control(outputs, banks):
        rows, paces = outputs
        rows = jax.nn.softmax(rows, axis=-1)
        mixed = jax.tree.map(lambda bank: _mix(rows, bank), banks)
        return mixed, 0.1 * jnp.exp(paces)

    return _recurrent("celo", theta, num_steps, see, control, lambda accumulators: ())


def celo_adam(theta: Params, num_steps: int) -> optax.GradientTransformationExtraArgs:
    """Celo's recurrent network as the learning-rate schedule, by tensor, of Adam.

    Args and errors are those of `velo`.
    """
    check_theta(theta, "celo_adam")
    check_num_steps("celo_adam", num_steps)
    network = _fold(theta["rnn_params"])
    adam = optax.scale_by_adam(eps=1e-8, eps_root=1e-10)

    def init(params):
        check_tensors("celo_adam", params)
        hidden, cell = _start(theta, params)
        step = jnp.zeros((), jnp.int32)
        adam_state = adam.init(optax.tree.cast(params, jnp.float32))
        return CeloAdamState(step, adam_state, _init_losses(), hidden, cell)

    def update(updates, state, params=None, *, value=None, **_):
        value = _check_value("celo_adam", value)
        check_like("celo_adam", state.adam.mu, gradients=updates)
        if not jax.tree.leaves(updates):
            return updates, state
        clipped = jax.tree.map(lambda g: clip_gradient(jnp.float32(g)), updates)
        losses = _update_losses(state.losses, value, num_steps)
        common = _fraction_left(state.step, num_steps), _loss_features(losses, num_steps)
        seen = jnp.broadcast_to(jnp.concatenate(common), (len(state.hidden), 18))
        _, paces, hidden, cell = _lstm(network, seen, state.hidden, state.cell)
        directions, adam_state = adam.update(clipped, state.adam, params)
        leaves, structure = jax.tree.flatten(directions)
        rates = 0.1 * jnp.exp(paces) * _STEP
        steps = [-rate * leaf for rate, leaf in zip(rates, leaves, strict=True)]
        cast = jax.tree.map(lambda s, g: s.astype(g.dtype), structure.unflatten(steps), updates)
        return cast, CeloAdamState(state.step + 1, adam_state, losses, hidden, cell)

    return optax.GradientTransformationExtraArgs(init, update)


def _recurrent(
    rule: Rule, theta: Params, num_steps: int, see: Callable, control: Callable, summarise: Callable
) -> optax.GradientTransformationExtraArgs:
    """What VeLO and Celo share.

    They differ in what the network sees, how its outputs are read, and what of the accumulators it
    will see in the next step.
    """
    check_theta(theta, rule)
    check_num_steps(rule, num_steps)
    network, banks = _fold(theta["rnn_params"]), theta["ff_mod_stack"]["~"]

    def init(params):
        check_tensors(rule, params)
        hidden, cell = _start(theta, params)
        step = jnp.zeros((), jnp.int32)
        accumulators = init_tensors(params)
        rows = [summarise(tensor) for tensor in split_tensors(accumulators)]
        summary = jax.tree.map(lambda *rows: jnp.stack(rows), *rows) if rows else ()
        return VeloState(step, accumulators, summary, _init_losses(), hidden, cell)

    def update(updates, state, params=None, *, value=None, **_):
        value = _check_value(rule, value)
        check_like(rule, state.accumulators.rms, gradients=updates, parameters=params)
        if not jax.tree.leaves(updates):
            return updates, state
        leaves, structure = jax.tree.flatten(params)
        flat = [jnp.atleast_1d(jnp.float32(p)) for p in leaves]
        gradients = [jnp.atleast_1d(jnp.float32(g)) for g in jax.tree.leaves(updates)]
        _, power = map_tensors(lambda p, _: ((), jnp.mean(p**2)), flat)
        losses = _update_losses(state.losses, value, num_steps)
        common = _fraction_left(state.step, num_steps), _loss_features(losses, num_steps)
        seen = see(state.summary, power, [p.shape for p in flat], common)
        *outputs, hidden, cell = _lstm(network, seen, state.hidden, state.cell)
        old = split_tensors(state.accumulators)
        new = [update_accumulators(a, g) for a, g in zip(old, gradients, strict=True)]
        tensors = list(zip(new, gradients, flat, strict=True))
        steps, summary = map_tensors(step_tensor, tensors, (power, *control(outputs, banks)))
        steps = [s.reshape(p.shape).astype(p.dtype) for s, p in zip(steps, leaves, strict=True)]
        accumulators = join_tensors(new, structure)
        state = VeloState(state.step + 1, accumulators, summary, losses, hidden, cell)
        return structure.unflatten(steps), state

    def step_tensor(tensor, row):
        (accumulators, gradient, param), (power, weights, pace) = tensor, row
        direction, magnitude, _ = perceptron(
            accumulators,
            clip_gradient(gradient),
            param,
            weights,
            rms_floor=1e-6,
            axes=tuple(range(param.ndim)),
            mean_floor=1e-5,
        )
        size = -pace * _STEP * jnp.sqrt(power + 1e-9)
        # exp(x) as 1 / exp(-x) for the sake of `map_tensors`
        shrink = jnp.maximum(jnp.exp(-_STEP * magnitude), np.finfo(np.float32).tiny)
        return direction * size / shrink, summarise(accumulators)

    return optax.GradientTransformationExtraArgs(init, update)


def _summarise(accumulators: Accumulators) -> jax.Array:
    """`[2, 4]` mean and variance over the parameters of each momentum and of `rms`."""

    def describe(x):
        behind = tuple(range(1, x.ndim))
        mean = jnp.mean(x, behind, keepdims=True)
        return jnp.stack([mean.ravel(), jnp.mean((x - mean) ** 2, behind)])

    return jnp.concatenate(
        [describe(accumulators.momentum), describe(accumulators.rms[None])], axis=1
    )


def _mix(rows: jax.Array, bank: jax.Array) -> jax.Array:
    """`[N, P]` controls and a bank `[P, ...]` -> `[N, ...]`, the mean over the bank."""
    flat = rows @ bank.reshape(len(bank), -1) / len(bank)
    return flat.reshape(len(rows), *bank.shape[1:])


def _fold(weights: Params) -> Params:
    """The recurrent network with `linear_2` and its gates made one layer; "linear" is never used."""
    outer, inner = jnp.split(jnp.asarray(weights["rnn/linear"]["w"]), 2)
    mixed = weights["linear_2"]
    folded = {
        "gates_of_seen": jnp.dot(mixed["w"], outer, precision="highest"),
        "gates_of_shared": outer,
        "gates_of_hidden": inner,
        "shared_bias": mixed["b"],
        "gates_bias": weights["rnn/linear"]["b"],
    }
    names = ("linear_1", "step_size", "rnn_to_controls")
    return folded | {name: weights[name] for name in names if name in weights}


def _lstm(weights, seen, hidden, cell):
    """One step of the recurrent network over tensors: controls, paces, and its new state."""

    def linear(name, x):
        return x @ weights[name]["w"] + weights[name]["b"][None]

    shared = jnp.max(jax.nn.relu(linear("linear_1", seen)), axis=0) + weights["shared_bias"]
    gates = seen @ weights["gates_of_seen"] + hidden @ weights["gates_of_hidden"]
    gates += (shared @ weights["gates_of_shared"] + weights["gates_bias"])[None]
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


# --- what the recurrent network sees


def _horizon_decays(num_steps: int) -> np.ndarray:
    return np.exp(-1.0 / np.logspace(1, np.log10(num_steps), _NUM_HORIZONS)).astype(np.float32)


def _init_losses() -> LossBuffer:
    least = jnp.full(_NUM_HORIZONS, _NEVER, jnp.float32)
    return LossBuffer(jnp.zeros(_NUM_HORIZONS, jnp.float32), least, jnp.zeros((), jnp.int32))


def _update_losses(old: LossBuffer, loss: jax.Array, num_steps: int) -> LossBuffer:
    """Adds a loss, at most twice the largest running mean in size.

    The count starts anew with the means: a guard that resets what is not finite leaves integers alone.
    """
    decays = _horizon_decays(num_steps)
    first = (old.mean[0] == 0.0) & (old.least[0] >= _NEVER)
    count = jnp.where(first, 0, old.count)
    correction = 1.0 - decays ** (count + 1.0)
    largest = jnp.where(first, loss, jnp.max(old.mean / correction))
    loss = jnp.minimum(2.0 * jnp.abs(largest), loss)
    mean = decays * old.mean + (1.0 - decays) * loss
    return LossBuffer(mean, jnp.minimum(old.least, mean / correction), count + 1)


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


def _describe_tensors(summary: jax.Array, power: jax.Array, shapes: list[tuple]) -> list[jax.Array]:
    """Mean of the second moment, rank, and two spreads of the momenta, each with a row for a tensor.

    Args:
      summary: `[N, 2, 4]` of the accumulators before this step.
      power: `[N]` mean square of the parameters, which the accumulators are seen relative to.
      shapes: of the tensors.
    """
    scale = jax.lax.rsqrt(jnp.maximum(1e-9, power))[:, None]
    mean, variance = summary[:, 0] * scale, summary[:, 1] * scale**2
    ranks = np.array([sum(n > 1 for n in shape) for shape in shapes])
    # about the mean of the momentum, not of rms: a slip that the published weights were trained with
    rms_spread = variance[:, 3:] + (mean[:, 3:] - mean[:, :3]) ** 2
    rank = jax.nn.one_hot(ranks, _MOST_RANKS, dtype=jnp.float32)
    return [_squash(mean[:, 3:]), rank, _squash(variance[:, :3]), _squash(rms_spread)]


def _squash(x: jax.Array) -> jax.Array:
    return 0.5 * jnp.clip(jnp.log(1e-8 + jnp.abs(10.0 * x)), -5.0, 5.0)


def _check_value(rule: str, value) -> jax.Array:
    if value is None:
        raise ValueError(
            f"{rule}: update needs the training loss, got none; pass it as "
            "update(gradients, state, params, value=loss)."
        )
    return jnp.float32(value)
