"""Fitting a sine with a liquid time-constant network: the tutorial of ncps, close to a task of HUB."""

import jax.numpy as jnp
import numpy as np

from lohp_jax.networks.ltc import auto_ncp, init_ltc, ltc
from lohp_jax.types import TaskFamily
from lohp_jax.workloads.single import single_task

_NUM_STEPS = 48


def ltc_sine(units: int = 8, *, sparsity: float = 0.5, seed: int = 22222) -> TaskFamily:
    """Maps sine and cosine of one frequency to the sine of twice the frequency, by an LTC network.

    The data are one sequence: `inputs` `[48, 2]`, sine and cosine over one and a half periods, and
    `targets` `[48, 1]`, the sine over three. The loss, and the objective, is the mean squared error.
    The trajectory task of the HUB paper has three sines of different frequencies for inputs, and one
    periodic curve for target.

    Args:
      units: neurons, at least 4.
      sparsity: of the wiring. The HUB paper names 0.75, the package that it uses has 0.5.
      seed: of the wiring, see `auto_ncp`.

    Raises: what `auto_ncp` raises.
    """
    wiring = auto_ncp(units, 1, inputs=2, sparsity=sparsity, seed=seed)
    slow, fast = (np.linspace(0.0, k * np.pi, _NUM_STEPS) for k in (3, 6))
    inputs = np.stack([np.sin(slow), np.cos(slow)], axis=1)
    data = {"inputs": jnp.float32(inputs), "targets": jnp.float32(np.sin(fast)[:, None])}

    def objective(params, data):
        outputs, _ = ltc(params, wiring, data["inputs"])
        return jnp.mean((outputs - data["targets"]) ** 2)

    return single_task(
        "ltc_sine", data, init=lambda key: init_ltc(key, wiring), objective=objective
    )
