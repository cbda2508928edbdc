"""Test functions with a known minimum, 0 at a shift, for families that do not give the shift away."""

import math
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.checks import check_option
from lohp_jax.problems.family import Problem, check_problem, check_sizes, problem_family
from lohp_jax.types import ProblemFamily

Features = Literal["probes", "none", "shift"]
_SHIFT = 2.0  # shifts are uniform in (-2, 2),
_START = 5.0  # starts, and the points of the probes, in (-5, 5)


def shifted_family(
    name: str,
    function: Callable[[jax.Array], jax.Array],
    n: int,
    *,
    rotated: bool,
    shifted: bool,
    features: Features,
    num_probes: int | None,
    units: tuple[float, float],
) -> ProblemFamily:
    """Problems f(x) = function(Q (x - shift)), of minimum 0 at x = shift.

    A problem is `{"shift": [n], "x0": [n]}` and, if rotated, `"rotation"` Q `[n, n]`; x0 is where the
    baselines start. The shift is the solution, so that features must not hold it.

    Args:
      name: of the family.
      function: `(z [n]) -> scalar`, of minimum 0 at z = 0.
      n: dimension.
      rotated: a random Q for each problem, or none.
      shifted: a random shift for each problem, or 0.
      features: "probes", the values at `num_probes` fixed points, which cost as many evaluations of f;
        "none", a single 0; or "shift", the shift itself, as a control that shows what a leak is worth.
      num_probes: points; None for n. Many more give the shift away: values of Rastrigin's function at
        3 n + 2 points, or gradients at a few, determine it through linear equations.
      units: centre and width of values of f between shifts and starts, for features of unit size.

    Raises: ValueError for unknown features or sizes under 1.
    """
    num_probes = n if num_probes is None else num_probes
    check_sizes(name, n=n, num_probes=num_probes)
    check_option(name, "features", features, get_args(Features))
    points = jax.random.uniform(jax.random.key(0), (num_probes, n), jnp.float32, -_START, _START)
    reach = _SHIFT if shifted else 0.0

    def objective(x, problem):
        z = x - problem["shift"]
        return function(problem["rotation"] @ z if rotated else z)

    def feature_vector(problem):
        if features == "shift":
            return problem["shift"]
        if features == "none":
            return jnp.zeros(1)
        centre, width = units
        return (jax.vmap(lambda x: objective(x, problem))(points) - centre) / width

    return problem_family(
        name,
        sample=lambda key, split: _draw_problem(key, n, reach, rotated),
        objective=objective,
        start=lambda problem: problem["x0"],
        init=lambda key: jax.random.uniform(key, (n,), jnp.float32, -_START, _START),
        solve=lambda problem, key: problem["shift"],
        frame=lambda problem: _frame(problem["shift"], shifted),
        features=feature_vector,
        check=lambda problem: _check_problem(name, problem, rotated),
        certificate=objective,  # the minimum is 0
    )


def _draw_problem(key: jax.Array, n: int, reach: float, rotated: bool) -> Problem:
    shift_key, x0_key, rotation_key = jax.random.split(key, 3)
    problem = {
        "shift": jax.random.uniform(shift_key, (n,), jnp.float32, -reach, reach),
        "x0": jax.random.uniform(x0_key, (n,), jnp.float32, -_START, _START),
    }
    if rotated:
        problem["rotation"] = jax.random.orthogonal(rotation_key, n)
    return problem


def _frame(shift: jax.Array, shifted: bool) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of uniform shifts."""
    scale = _SHIFT / math.sqrt(3.0) if shifted else 1.0
    return jnp.zeros_like(shift), jnp.full_like(shift, scale)


def _check_problem(name: str, problem: Problem, rotated: bool) -> None:
    shapes = {"shift": "n", "x0": "n"} | ({"rotation": "n n"} if rotated else {})
    arrays = check_problem(name, problem, shapes)
    if rotated:
        _check_rotation(name, arrays["rotation"])


def _check_rotation(name: str, matrix: np.ndarray) -> None:
    error = np.abs(matrix @ matrix.T - np.eye(len(matrix))).max()
    if error > 1e-3:
        raise ValueError(
            f"{name}: expected a rotation with orthonormal rows, got one that is {error:.3g} off; "
            "take the Q of a QR decomposition."
        )
