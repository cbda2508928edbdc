"""Curves of time from sines of time, by a small recurrent network: the tutorial's task, and HUB's."""

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import scipy.signal

from lohp_jax.checks import check_option
from lohp_jax.networks.classifiers import make_lstm
from lohp_jax.networks.ltc import auto_ncp, init_ltc, ltc
from lohp_jax.types import Params, TaskFamily
from lohp_jax.workloads.single import single_task

Network = Literal["ltc", "lstm"]
_NUM_STEPS = 48
_UNITS = {"ltc": 8, "lstm": 64}  # as in the HUB paper


def ltc_sine(units: int = 8, *, sparsity: float = 0.5, seed: int = 22222) -> TaskFamily:
    """Maps sine and cosine of one frequency to the sine of twice the frequency, by an LTC network.

    This is the task of the tutorial of ncps. The data are one sequence: `inputs` `[48, 2]`, sine and
    cosine over one and a half periods, and `targets` `[48, 1]`, the sine over three. The loss, and the
    objective, is the mean squared error.

    Args:
      units: neurons, at least 4.
      sparsity: of the wiring; 0.5 is that of the package.
      seed: of the wiring, see `auto_ncp`.

    Raises: what `auto_ncp` raises.
    """
    slow, fast = (np.linspace(0.0, k * np.pi, _NUM_STEPS) for k in (3, 6))
    inputs = np.stack([np.sin(slow), np.cos(slow)], axis=1)
    network = _liquid(units, inputs.shape[1], sparsity, seed)
    return _curve("ltc_sine", inputs, np.sin(fast), *network)


def hub_sines(
    network: Network = "ltc",
    *,
    units: int | None = None,
    sparsity: float = 0.75,
    seed: int = 22222,
) -> TaskFamily:
    """Maps three sines of different frequencies to one periodic curve (HUB, appendix, trajectories).

    The paper names neither frequencies nor curve; ours are sines of one, two and three periods in 48
    steps, and a triangle wave of one, which is no linear function of them. The data are one sequence:
    `inputs` `[48, 3]` and `targets` `[48, 1]`. The loss, and the objective, is the mean squared error.

    Args:
      network: "ltc", or "lstm".
      units: neurons of "ltc", at least 4, or size of the state of "lstm"; None for those of the paper, 8
        and 64.
      sparsity: of the wiring of "ltc", as in the paper.
      seed: of the same, see `auto_ncp`.

    Raises: ValueError for another network or too few units, and what `auto_ncp` raises.
    """
    check_option("hub_sines", "network", network, get_args(Network))
    units = _UNITS[network] if units is None else units
    phase = 2 * np.pi * np.arange(_NUM_STEPS) / _NUM_STEPS
    inputs = np.stack([np.sin(k * phase) for k in (1, 2, 3)], axis=1)
    targets = scipy.signal.sawtooth(phase + np.pi / 2, width=0.5)
    if network == "ltc":
        made = _liquid(units, inputs.shape[1], sparsity, seed)
    else:
        made = _long_short(units, inputs)
    return _curve(f"hub_sines_{network}", inputs, targets, *made)


def _curve(
    name: str,
    inputs: np.ndarray,
    targets: np.ndarray,
    init: Callable[[jax.Array], Params],
    apply: Callable[[Params, jax.Array], jax.Array],
) -> TaskFamily:
    """One sequence, `inputs` `[T, D]` to `targets` `[T]`, by a network."""
    data = {"inputs": jnp.float32(inputs), "targets": jnp.float32(targets[:, None])}

    def objective(params, data):
        return jnp.mean((apply(params, data["inputs"]) - data["targets"]) ** 2)

    return single_task(name, data, init=init, objective=objective)


def _liquid(units: int, inputs: int, sparsity: float, seed: int) -> tuple[Callable, Callable]:
    """`init` and `apply(params, inputs [T, D]) -> [T, 1]` of an LTC network."""
    wiring = auto_ncp(units, 1, inputs=inputs, sparsity=sparsity, seed=seed)
    return lambda key: init_ltc(key, wiring), lambda params, x: ltc(params, wiring, x)[0]


def _long_short(units: int, inputs: np.ndarray) -> tuple[Callable, Callable]:
    """The same of an LSTM."""
    if units < 1:
        raise ValueError(f"hub_sines: units must be at least 1, got {units}.")
    core, like = make_lstm(units), jnp.float32(inputs)
    return lambda key: core.init(key, like), lambda params, x: core.apply(params, x)[:, None]
