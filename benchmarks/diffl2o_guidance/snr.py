"""The signal-to-noise ratio of gradients by noise level, and how well a few probes tell it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.diffusion.guidance import GRADIENTS, LARGEST_LOG_SNR, gradients_at
from lohp_jax.diffusion.schedule import alpha_sigma
from lohp_jax.types import ProblemFamily, PyTree

LEVELS = tuple(float(level) for level in np.linspace(10.0, -10.0, 21))
FEW, MANY = 4, 256
"""Pairs of probes of the gate, and of what it is compared with."""


def measure_snr(family: ProblemFamily, problems: PyTree, quick: bool) -> dict[str, Any]:
    """Log SNR at noisy solutions of the problems, level by level.

    The SNR of the smoothed gradient is that of a mean of `FEW` pairs: `MANY` pairs, whose mean has so
    much less variance, are scaled back.

    Returns: "levels" and, for each kind of gradient, lists over the levels: mean and quartiles of log
      SNR and of the weight SNR / (1 + SNR), and the root mean square error of the weight that `FEW`
      probes give, with its bias.
    """
    levels = LEVELS[::10] if quick else LEVELS
    run = functools.partial(_log_snr, family)
    over = jax.vmap(jax.vmap(run, (0, 0, None)), (None, None, 0))
    keys = jax.random.split(jax.random.key(7), len(jax.tree.leaves(problems)[0]))
    few, many = jax.device_get(jax.jit(over)(problems, keys, jnp.array(levels)))
    summary: dict[str, Any] = {"levels": list(levels)}
    for part in GRADIENTS:
        weights = [1.0 / (1.0 + np.exp(-found[part])) for found in (few, many)]
        error = weights[0] - weights[1]
        summary[part] = {
            "log_snr": _spread(many[part]),
            "weight": _spread(weights[1]),
            "error": np.sqrt((error**2).mean(axis=1)).round(4).tolist(),
            "bias": error.mean(axis=1).round(4).tolist(),
        }
    return summary


def _log_snr(family, problem, key, level):
    """Of one noisy solution, with few probes and with many, for a mean of few."""
    solve_key, noise_key, few_key, many_key = jax.random.split(key, 4)
    centre, scale = family.frame(problem)
    solution = (family.solve(problem, solve_key) - centre) / scale
    alpha, sigma = alpha_sigma(level)
    z = alpha * solution + sigma * jax.random.normal(noise_key, solution.shape)

    def take(key, probes):
        return gradients_at(
            lambda y: family.objective(centre + scale * y, problem),
            z,
            level,
            key,
            parts=GRADIENTS,
            probes=probes,
        ).log_snr

    few, many = take(few_key, FEW), take(many_key, MANY)
    part = "smoothed_gradient"
    many[part] = jnp.maximum(many[part] + jnp.log(FEW / MANY), -LARGEST_LOG_SNR)
    return few, many


def _spread(values: np.ndarray) -> dict[str, list[float]]:
    """`[levels, N]` -> mean and quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75], axis=1)
    rows = {"mean": values.mean(axis=1), "q25": low, "median": middle, "q75": high}
    return {name: row.round(4).tolist() for name, row in rows.items()}
