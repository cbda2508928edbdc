"""PAC-Bayes bounds by inverting the kl, and rank correlations within a grid of settings."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.special import rel_entr
from scipy.stats import kendalltau, t

SMALLEST_SAMPLE = 8  # Maurer's 2 sqrt(n) holds from here on


def binary_kl(q: float, p: float) -> float:
    """kl(q||p) = q log(q / p) + (1 - q) log((1 - q) / (1 - p)), of two coins."""
    return float(rel_entr(q, p) + rel_entr(1.0 - q, 1.0 - p))


def kl_inverse(q: float, budget: float) -> float:
    """The largest p in [q, 1] with kl(q||p) <= budget.

    Raises: ValueError for q outside [0, 1] or a negative budget.
    """
    if not 0.0 <= q <= 1.0 or not budget >= 0.0:
        raise ValueError(f"kl_inverse: expected q in [0, 1] and budget >= 0, got {q} and {budget}.")
    last = 1.0 - 1e-12
    if q >= last or binary_kl(q, last) <= budget:
        return 1.0
    return brentq(lambda p: binary_kl(q, p) - budget, q, last, xtol=1e-12)


def monte_carlo_bound(mean: float, num_draws: int, delta: float) -> float:
    """Bounds an expectation by the mean of independent draws in [0, 1], with confidence 1 - delta.

    Chernoff's bound, P(kl(mean||p) > c, mean < p) <= exp(-num_draws c); Hoeffding (1963) has it for
    draws of different distributions, with p the mean of their expectations.
    """
    return kl_inverse(mean, math.log(1.0 / delta) / num_draws)


def pac_bayes_bound(empirical: float, divergence: float, n: int, delta: float) -> float:
    """kl(empirical||risk) <= (KL(posterior||prior) + log(2 sqrt(n) / delta)) / n (Maurer, 2004).

    Args:
      empirical: mean loss of the posterior on n independent instances, in [0, 1].
      divergence: KL, in nats, from a prior that does not depend on the instances.
      n: distinct instances; copies of them do not count.
      delta: chance that the bound on the risk does not hold, for all posteriors at once.

    Raises: ValueError for n < 8.
    """
    if n < SMALLEST_SAMPLE:
        raise ValueError(
            f"pac_bayes_bound: expected n >= {SMALLEST_SAMPLE} instances, got {n}; the bound does not "
            "hold for fewer."
        )
    return kl_inverse(empirical, (divergence + math.log(2.0 * math.sqrt(n) / delta)) / n)


def best_certificate(
    means: Sequence[float],
    divergences: Sequence[float],
    *,
    num_draws: int,
    n: int,
    delta: float = 0.05,
    delta_draws: float = 0.01,
) -> tuple[int, float]:
    """The best of several pairs of prior and posterior, with a union bound over them.

    Args:
      means: of each pair, the mean loss of `num_draws` draws of its posterior on the n instances.
      divergences: of each pair.
      num_draws: independent pairs of a draw and an instance, each instance equally often.
      n: distinct instances.
      delta: chance of an error in all.
      delta_draws: the part of it that the draws may use.

    Returns: which pair, and its bound.
    """
    share, share_draws = ((delta - delta_draws) / len(means), delta_draws / len(means))
    bounds = [
        pac_bayes_bound(monte_carlo_bound(mean, num_draws, share_draws), divergence, n, share)
        for mean, divergence in zip(means, divergences, strict=True)
    ]
    best = int(np.argmin(bounds))
    return best, bounds[best]


def tau(x: np.ndarray, y: np.ndarray) -> float:
    """Kendall's tau-b; 0 if x is constant, NaN if y is, of which there is nothing to predict."""
    x, y = np.asarray(x).ravel(), np.asarray(y).ravel()
    if np.ptp(y) == 0.0:
        return math.nan
    return 0.0 if np.ptp(x) == 0.0 else float(kendalltau(x, y).statistic)


def partial_tau(x: np.ndarray, y: np.ndarray, given: np.ndarray) -> float:
    """Kendall's partial tau of x and y: what is left of it once both are explained by `given`."""
    xy, xz, yz = tau(x, y), tau(x, given), tau(y, given)
    left = (1.0 - xz**2) * (1.0 - yz**2)
    return math.nan if not left > 0.0 else (xy - xz * yz) / math.sqrt(left)


def granulated_tau(x: np.ndarray, y: np.ndarray, num_axes: int) -> list[float]:
    """Mean tau along each of the first axes, all other axes held fixed (Jiang et al., 2020).

    Args:
      x: predictor, on the grid of settings.
      y: outcome, of the same shape.
      num_axes: how many axes are hyperparameters; the others (seeds) are only held fixed.

    Returns: one number for each axis, NaN where the outcome never changes along it; their mean is the
      granulated coefficient.
    """
    found = []
    for axis in range(num_axes):
        rows = (np.moveaxis(part, axis, -1).reshape(-1, x.shape[axis]) for part in (x, y))
        values = np.array([tau(*row) for row in zip(*rows, strict=True)])
        known = values[~np.isnan(values)]
        found.append(float(known.mean()) if known.size else math.nan)
    return found


def seed_interval(
    statistic: Callable[..., float], *arrays: np.ndarray, level: float = 0.95
) -> tuple[float, float]:
    """Jackknife interval of `statistic(*arrays)` over the last axis, the seeds, with Student's t.

    Leaving seeds out repeats no run, where a bootstrap ties a run with itself and moves tau away from 0.
    The interval knows the spread over seeds, not that over settings.
    """
    count = arrays[0].shape[-1]
    without = [statistic(*(np.delete(a, seed, axis=-1) for a in arrays)) for seed in range(count)]
    width = t.ppf(0.5 + level / 2, count - 1) * (count - 1) * np.std(without) / math.sqrt(count - 1)
    value = statistic(*arrays)
    return float(value - width), float(value + width)
