"""Rastrigin's function: a quadratic with a well at every integer point."""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from lohp_jax.checks import check_option
from lohp_jax.problems.family import (
    Problem,
    check_columns,
    check_problem,
    check_sizes,
    problem_family,
)
from lohp_jax.problems.lattice import lattice_search
from lohp_jax.problems.shifted import Features, shifted_family
from lohp_jax.solvers.multistart import multistart
from lohp_jax.solvers.newton import damped_newton
from lohp_jax.types import ProblemFamily

Form = Literal["openl2o", "shifted"]
_CUTOFF = 1e-3  # relative, of singular values in the centre and scale of the frame
_FARTHEST = 30.0  # largest scale of the frame
_RESIDUAL = 0.4  # typical entry of A x - b at a solution, measured
_WELLS = 8  # of the lattice search, that Newton's method descends into
_NEWTON_STEPS = 8


def rastrigin(
    n: int = 2,
    *,
    form: Form = "openl2o",
    features: Features = "probes",
    num_probes: int | None = None,
) -> ProblemFamily:
    """Minimise a rippled quadratic with random numbers in it.

    "openl2o": f(x) = 1/2 |A x - b|² - 10 c^T cos(2πx) + 10 n, the entries of A `[n, n]`, b and c normal;
    a problem is `{"A", "b", "c"}`. Where the quadratic is flat, solutions are far away and narrow to
    find, but `solve` knows its structure. "shifted": the standard form, see `rastrigin_function`.

    Args:
      n: dimension.
      form: "openl2o" or "shifted".
      features: of the shifted form, see `shifted_family`.
      num_probes: of the shifted form.

    Raises: ValueError for another form, unknown features or sizes under 1.
    """
    check_option("rastrigin", "form", form, get_args(Form))
    check_sizes("rastrigin", n=n)
    if form == "openl2o":
        return _openl2o(n)
    return shifted_family(
        "rastrigin_shifted",
        rastrigin_function,
        n,
        rotated=False,
        shifted=True,
        features=features,
        num_probes=num_probes,
        units=(20.0 * n, 13.0 * math.sqrt(n)),
    )


def rastrigin_function(z: jax.Array) -> jax.Array:
    """Σ_i (z_i² - 10 cos(2πz_i) + 10), of minimum 0 at z = 0."""
    return jnp.sum(z**2 + 10.0 * (1.0 - jnp.cos(2.0 * jnp.pi * z)))


def rippled_quadratic(x: jax.Array, problem: Problem) -> jax.Array:
    """f(x) = 1/2 |A x - b|² - 10 c^T cos(2πx) + 10 n."""
    quadratic = 0.5 * jnp.sum((problem["A"] @ x - problem["b"]) ** 2)
    return quadratic + 10.0 * jnp.sum(1.0 - problem["c"] * jnp.cos(2.0 * jnp.pi * x))


def _openl2o(n: int) -> ProblemFamily:
    def sample(key, split):
        keys = jax.random.split(key, 3)
        return {
            "A": jax.random.normal(keys[0], (n, n)),
            "b": jax.random.normal(keys[1], (n,)),
            "c": jax.random.normal(keys[2], (n,)),
        }

    def solve(problem, key):
        """A lattice search, then Newton's method in the best wells; no randomness."""
        points = lattice_search(problem["A"], problem["b"], problem["c"])
        values = jax.vmap(lambda x: rippled_quadratic(x, problem))(points)
        starts = points[jnp.argsort(values)[:_WELLS]]
        return multistart(family, problem, starts, _NEWTON_STEPS, solver=damped_newton).x

    def features(problem):
        """A, c, and where in the lattice the centre is; with the scale of the frame, since it varies."""
        centre, scale = quadratic_frame(problem)
        phase = 2.0 * jnp.pi * centre
        parts = (problem["A"].reshape(-1), problem["c"], jnp.cos(phase), jnp.sin(phase))
        return jnp.concatenate([*parts, jnp.log(scale)])

    family = problem_family(
        "rastrigin",
        sample=sample,
        objective=rippled_quadratic,
        start=lambda problem: jnp.zeros_like(problem["b"]),
        init=lambda key: jax.random.normal(key, (n,)),
        solve=solve,
        frame=quadratic_frame,
        features=features,
        check=check_rastrigin,
    )
    return family


def quadratic_frame(problem: Problem) -> tuple[jax.Array, jax.Array]:
    """Centre A^+ b, the minimum of the quadratic, and how far wells may pull from it.

    The scale is the root of 0.4² diag((A^T A)^+) + 1/12: how far a residual of 0.4 reaches, plus the
    variance of the distance to the nearest well; singular values under 1e-3 of the largest count as
    zero, and no scale exceeds 30.
    """
    left, singular, right = jnp.linalg.svd(problem["A"], full_matrices=False)
    kept = singular > _CUTOFF * singular[0]
    inverse = jnp.where(kept, 1.0 / jnp.where(kept, singular, 1.0), 0.0)
    axes = right.T * inverse[None, :]
    centre = axes @ (left.T @ problem["b"])
    variance = _RESIDUAL**2 * jnp.sum(axes**2, axis=1) + 1.0 / 12.0
    return centre, jnp.minimum(jnp.sqrt(variance), _FARTHEST)


def check_rastrigin(problem: Problem) -> None:
    """Refuses a problem of the form "openl2o" that no solver can use.

    Raises: ValueError for missing arrays, shapes that do not fit, numbers that are not finite or
      columns of zeros.
    """
    arrays = check_problem("rastrigin", problem, {"A": "n n", "b": "n", "c": "n"})
    check_columns("rastrigin", arrays["A"])
