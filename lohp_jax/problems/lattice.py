"""The wells of a rippled quadratic are a lattice, so that finding the deepest is lattice decoding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg

_NUM_BEAMS = 128
_WIDTH = 64  # wells tried for each coordinate of each beam
_LEAST_CURVATURE = 1e-2  # of a well, where |c| is next to nothing


class _Beams(NamedTuple):
    """Partly chosen wells: `points` `[K, n]` so far, `residual` `[K, n]` and `cost` `[K]`."""

    points: jax.Array
    residual: jax.Array
    cost: jax.Array


def lattice_search(
    matrix: jax.Array,
    b: jax.Array,
    c: jax.Array,
    *,
    num_beams: int = _NUM_BEAMS,
    width: int = _WIDTH,
) -> jax.Array:
    """Points near the bottoms of the deepest wells of 1/2 |A x - b|² - 10 c^T cos(2πx).

    The wells are at p, integers where c > 0 and halves where c < 0, with curvature D = diag(40π²|c|).
    With that parabola in place of the cosine, the well's bottom is
    x = argmin 1/2 |A x - b|² + 1/2 (x - p)^T D (x - p) and its depth 1/2 |B p - C^{-1} b|², where
    C C^T = I + A D^{-1} A^T and B = C^{-1} A. The p that is closest is sought as K-best sphere decoders
    do: with B = Q R, one coordinate after another, most expensive first, keeping `num_beams` choices.

    Args:
      matrix: A, `[n, n]`.
      b: `[n]`.
      c: `[n]`.
      num_beams: K, choices that are kept.
      width: wells tried for each coordinate, around the best.

    Returns: `[num_beams, n]` points, those of low cost first; where there are fewer wells, repeated.
    """
    n = len(c)
    curvature = jnp.maximum(40.0 * jnp.pi**2 * jnp.abs(c), _LEAST_CURVATURE)
    offset = jnp.where(c < 0.0, 0.5, 0.0)
    inverse = matrix.T / curvature[:, None]  # D^{-1} A^T
    root = jnp.linalg.cholesky(jnp.eye(n, dtype=matrix.dtype) + matrix @ inverse)

    def whiten(right):
        return jax.scipy.linalg.solve_triangular(root, right, lower=True)

    whitened, target = whiten(matrix), whiten(b)
    order = jnp.argsort(jnp.sum(whitened**2, axis=0))
    q, r = jnp.linalg.qr(whitened[:, order])
    wells = _k_best(r, q.T @ target, offset[order], num_beams, width)
    wells = jnp.zeros_like(wells).at[:, order].set(wells)
    pull = whiten((b[None, :] - wells @ matrix.T).T)
    return wells + (inverse @ jax.scipy.linalg.solve_triangular(root.T, pull, lower=False)).T


def _k_best(
    r: jax.Array, target: jax.Array, offset: jax.Array, num_beams: int, width: int
) -> jax.Array:
    """The points p of the lattice `offset` + integers with small |R p - target|; `[num_beams, n]`."""
    n = len(target)
    steps = jnp.arange(width) - width // 2

    def choose(beams, i):
        diagonal = jnp.where(jnp.abs(r[i, i]) > 1e-6, r[i, i], 1e-6)
        best = beams.residual[:, i] / diagonal
        tried = (jnp.round(best - offset[i]) + offset[i])[:, None] + steps[None, :]
        cost = beams.cost[:, None] + (diagonal * (tried - best[:, None])) ** 2
        lowest, kept = jax.lax.top_k(-cost.reshape(-1), num_beams)
        parent, chosen = kept // width, tried.reshape(-1)[kept]
        residual = beams.residual[parent] - chosen[:, None] * r[:, i][None, :]
        return _Beams(beams.points[parent].at[:, i].set(chosen), residual, -lowest), None

    start = _Beams(
        jnp.zeros((num_beams, n), target.dtype),
        jnp.broadcast_to(target, (num_beams, n)),
        jnp.where(jnp.arange(num_beams) == 0, 0.0, jnp.inf).astype(target.dtype),
    )
    beams, _ = jax.lax.scan(choose, start, jnp.arange(n - 1, -1, -1))
    return beams.points
