"""Liquid time-constant networks (Hasani et al., 2021) with the sparse wiring of NCPs (Lechner, 2020).

The wiring is a constant of the architecture, made on the host; the forward pass is one `lax.scan` over
time for one sequence. Both agree with the package `ncps`, from the same seed and the same weights.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

_EPSILON = 1e-8


class Wiring(NamedTuple):
    """Which synapses an LTC network has, and the sign each starts with.

    Attributes:
      adjacency: `[units, units]` int32 in {-1, 0, 1}, from row to column; 0 for no synapse. The first
        `outputs` units are the motor neurons, then come command and inter neurons.
      sensory_adjacency: `[inputs, units]`, the same from the inputs.
      outputs: number of motor neurons.
    """

    adjacency: np.ndarray
    sensory_adjacency: np.ndarray
    outputs: int


def auto_ncp(
    units: int, outputs: int, *, inputs: int, sparsity: float = 0.5, seed: int = 22222
) -> Wiring:
    """Draws a sparse feed-forward wiring: inputs, inter, command (recurrent) and motor neurons.

    With density d = 1 - sparsity, a fraction d of the next layer is what each input and each inter
    neuron reaches, and of the layer before what each motor neuron hears of. A neuron that nobody has
    reached is then linked to about as many neurons as its neighbours are.

    Args:
      units: neurons in all.
      outputs: motor neurons among them; at most `units - 3`.
      inputs: size of the input.
      sparsity: between 0.1 and 0.9.
      seed: of NumPy's `RandomState`; the same seed gives the same wiring for ever.

    Raises: ValueError for sizes that leave no room for inter and command neurons, or a sparsity
      outside its range.
    """
    if inputs < 1 or not 1 <= outputs <= units - 3:
        raise ValueError(
            "auto_ncp: expected inputs >= 1 and 1 <= outputs <= units - 3, got "
            f"inputs={inputs}, outputs={outputs} and units={units}; use more units."
        )
    if not 0.1 <= sparsity <= 0.9:
        raise ValueError(f"auto_ncp: sparsity must be in [0.1, 0.9], got {sparsity}.")
    density, hidden = 1.0 - sparsity, units - outputs
    num_command = max(int(0.4 * hidden), 1)
    num_inter = hidden - num_command
    motor = np.arange(outputs)
    command = outputs + np.arange(num_command)
    inter = outputs + num_command + np.arange(num_inter)
    fan = max(int(num_command * density), 1)  # of an inter neuron, and of a motor neuron

    rng = np.random.RandomState(seed)
    adjacency = np.zeros((units, units), np.int32)
    sensory = np.zeros((inputs, units), np.int32)
    _link(rng, sensory, np.arange(inputs), inter, max(int(num_inter * density), 1))
    _link(rng, adjacency, inter, command, fan)
    for _ in range(max(int(2 * num_command * density), 1)):
        start, end = rng.choice(command), rng.choice(command)
        adjacency[start, end] = _sign(rng)
    _link(rng, adjacency.T, motor, command, fan)
    return Wiring(adjacency, sensory, outputs)


def init_ltc(key: jax.Array, wiring: Wiring) -> dict[str, jax.Array]:
    """Random weights of an LTC network, those of `ncps`.

    Args:
      key: randomness.
      wiring: of `auto_ncp`, or one's own.

    Returns: float32 arrays. By neuron, `[units]`: `gleak`, `vleak`, `cm`. By synapse, `[units, units]`
      and with the prefix `sensory_` `[inputs, units]`: `w`, `sigma`, `mu`, `erev`; entries without a
      synapse have no effect. `input_w`, `input_b` `[inputs]`, `output_w`, `output_b` `[outputs]`.
    """
    inputs, units = wiring.sensory_adjacency.shape
    neuron_key, key, sensory_key = jax.random.split(key, 3)
    neuron = {"gleak": (0.001, 1.0), "vleak": (-0.2, 0.2), "cm": (0.4, 0.6)}
    synapse = {"w": (0.001, 1.0), "sigma": (3.0, 8.0), "mu": (0.3, 0.8)}

    def draw(key, ranges, shape, prefix=""):
        uniform = jax.random.uniform(key, (len(ranges), *shape), jnp.float32)
        return {
            prefix + name: low + (high - low) * numbers
            for numbers, (name, (low, high)) in zip(uniform, ranges.items(), strict=True)
        }

    return {
        **draw(neuron_key, neuron, (units,)),
        **draw(key, synapse, (units, units)),
        **draw(sensory_key, synapse, (inputs, units), "sensory_"),
        "erev": jnp.asarray(wiring.adjacency, jnp.float32),
        "sensory_erev": jnp.asarray(wiring.sensory_adjacency, jnp.float32),
        "input_w": jnp.ones(inputs, jnp.float32),
        "input_b": jnp.zeros(inputs, jnp.float32),
        "output_w": jnp.ones(wiring.outputs, jnp.float32),
        "output_b": jnp.zeros(wiring.outputs, jnp.float32),
    }


def ltc(
    params: dict[str, jax.Array],
    wiring: Wiring,
    inputs: jax.Array,
    state: jax.Array | None = None,
    *,
    unfolds: int = 6,
    dt: jax.Array | float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Runs an LTC network over one sequence, by the fused (semi-implicit Euler) solver.

    Conductances a_ij = pos(w_ij) sigmoid(σ_ij (v_i - μ_ij)) pull unit j towards erev_ij, the leak
    towards vleak_j, and the capacitance c towards its present value. So each of the `unfolds` steps is
    a weighted mean, and |v| <= max(|v_0|, |vleak|, |erev|), with pos = softplus:
    v_j <- (c v_j + g vleak_j + Σ_i a_ij erev_ij + sensory) / (c + g + Σ_i a_ij + sensory).

    Args:
      params: as from `init_ltc`.
      wiring: masks the synapses.
      inputs: `[T, inputs]` real numbers of any type; it computes in float32 at least.
      state: `[units]` v before the first input; None for zeros.
      unfolds: solver steps per input.
      dt: time between two inputs; scalar, or `[T]`, that before each input.

    Returns: outputs `[T, outputs]` and the last state `[units]`.

    Raises: ValueError for a `dt` of another shape, or inputs that are no real numbers.
    """
    chex.assert_shape(inputs, (None, wiring.sensory_adjacency.shape[0]))
    pos, dtype = jax.nn.softplus, _type_of(inputs, params)
    dt = _every_dt(dt, len(inputs), dtype)
    weight = pos(params["w"]) * jnp.asarray(wiring.adjacency != 0, dtype)
    sensory_weight = pos(params["sensory_w"]) * jnp.asarray(wiring.sensory_adjacency != 0, dtype)
    capacity, leak = pos(params["cm"]), pos(params["gleak"])

    def synapses(v, prefix, weight):
        """Driving current and conductance `[units]` of the synapses that start at potentials v."""
        gate = jax.nn.sigmoid(params[prefix + "sigma"] * (v[:, None] - params[prefix + "mu"]))
        conductance = weight * gate
        return jnp.sum(conductance * params[prefix + "erev"], 0), jnp.sum(conductance, 0)

    def step(v, now):
        x, dt = now
        drive, conductance = synapses(x, "sensory_", sensory_weight)
        drive = drive + leak * params["vleak"]
        inertia = capacity * (unfolds / dt)
        conductance = conductance + inertia + leak + _EPSILON

        def unfold(v, _):
            current, total = synapses(v, "", weight)
            return (inertia * v + drive + current) / (conductance + total), None

        v, _ = jax.lax.scan(unfold, v, length=unfolds, unroll=True)
        return v, v[: wiring.outputs]

    if state is None:
        state = jnp.zeros(wiring.adjacency.shape[0], dtype)
    x = inputs.astype(dtype) * params["input_w"][None] + params["input_b"][None]
    state, motor = jax.lax.scan(step, state.astype(dtype), (x, dt))
    return motor * params["output_w"][None] + params["output_b"][None], state


def _type_of(inputs: jax.Array, params: dict[str, jax.Array]) -> np.dtype:
    """What a network computes in: float32, or more if inputs or weights have more."""
    dtype = jnp.result_type(jnp.float32, inputs, *params.values())
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"ltc: expected inputs and weights of real numbers, got {dtype}.")
    return dtype


def _every_dt(dt: jax.Array | float, num_inputs: int, dtype: np.dtype) -> jax.Array:
    """`[T]` from one dt or T of them."""
    if jnp.shape(dt) not in ((), (num_inputs,)):
        raise ValueError(
            f"ltc: expected a scalar dt, or one for each of {num_inputs} inputs, got shape "
            f"{list(jnp.shape(dt))}."
        )
    return jnp.broadcast_to(jnp.asarray(dt, dtype), (num_inputs,))


def _link(
    rng: np.random.RandomState,
    matrix: np.ndarray,
    sources: np.ndarray,
    targets: np.ndarray,
    fan: int,
) -> None:
    """Links every source to `fan` targets, then every target left out to its fair share of sources.

    Writes random signs into `matrix[source, target]`, in place.
    """
    for source in sources:
        for target in rng.choice(targets, fan, replace=False):
            matrix[source, target] = _sign(rng)
    share = int(np.clip(len(sources) * fan // len(targets), 1, len(sources)))
    missed = targets[~matrix[np.ix_(sources, targets)].any(0)]
    for target in missed:
        for source in rng.choice(sources, share, replace=False):
            matrix[source, target] = _sign(rng)


def _sign(rng: np.random.RandomState) -> int:
    return rng.choice((-1, 1))
