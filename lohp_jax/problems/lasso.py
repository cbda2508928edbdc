"""LASSO: f(x) = 1/2 |A x - b|² + λ |x|_1, with one minimum and exact certificates."""

import math
import numbers
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.checks import check_option
from lohp_jax.data.patches import cosine_dictionary, image_patches
from lohp_jax.problems.family import (
    Problem,
    check_columns,
    check_problem,
    check_sizes,
    problem_family,
)
from lohp_jax.solvers.proximal import fista, soft_threshold
from lohp_jax.types import Composite, ProblemFamily

_STEPS = 200  # of the label solver, between two looks at what it has reached
_MOST_LOOKS = 50
_TOLERANCE = 1e-6  # relative, of the duality gap of a label and of the last change in it


def lasso(
    rows: int = 25,
    columns: int = 50,
    *,
    penalty: float = 0.1,
    dictionary: Literal["fixed"] | np.ndarray | None = None,
    nonzeros: int | float = 0.1,
    noise: float = 0.0,
    seed: int = 0,
) -> ProblemFamily:
    """Recovering a sparse vector: b = A x* + noise, A with columns of length 1.

    A problem is `{"A": [rows, columns], "b": [rows], "penalty": []}`. A has normal entries before its
    columns are scaled, and so has x* where it is not 0. It always has an entry that is not, so that
    b = 0 does not occur. Where all problems share A, `jax.vmap` with `{"A": None, "b": 0, "penalty":
    None}` keeps one copy.

    Args:
      rows: numbers in b.
      columns: unknowns.
      penalty: λ > 0.
      dictionary: None draws an A for each problem; "fixed" one for all, with `seed`; or the A of all,
        `[rows, columns]`, taken as it is, whatever `rows` and `columns` say.
      nonzeros: of x*: an integer is their number; a fraction is the chance of each entry, besides one
        that is always drawn.
      noise: standard deviation of each entry of the noise.
      seed: draws the fixed A.

    Raises: ValueError for options out of range, or an A that `check` would refuse.
    """
    name = "lasso"
    if isinstance(dictionary, str) or dictionary is None:
        if dictionary is not None:
            check_option(name, "dictionary, if no array,", dictionary, ("fixed",))
        check_sizes(name, rows=rows, columns=columns)
        fixed = _draw_dictionary(jax.random.key(seed), rows, columns) if dictionary else None
    else:
        fixed = jnp.asarray(_check_dictionary(dictionary))
        rows, columns = fixed.shape
    _check_options(penalty, nonzeros, noise, columns)
    expected = nonzeros if isinstance(nonzeros, numbers.Integral) else max(1.0, nonzeros * columns)
    unit = math.sqrt(rows / expected)  # b has about unit entries after this

    def sample(key, split):
        keys = jax.random.split(key, 3)
        matrix = _draw_dictionary(keys[0], rows, columns) if fixed is None else fixed
        clean = matrix @ _draw_sparse(keys[1], columns, nonzeros)
        b = clean + noise * jax.random.normal(keys[2], (rows,))
        return {"A": matrix, "b": b, "penalty": jnp.float32(penalty)}

    def features(problem):
        """b, and A where problems differ in it."""
        if fixed is not None:
            return unit * problem["b"]
        return jnp.append(math.sqrt(rows) * problem["A"].reshape(-1), unit * problem["b"])

    return _family("lasso" if fixed is None else "lasso_fixed", columns, sample, features)


def lasso_patches(*, penalty: float = 0.5) -> ProblemFamily:
    """Sparse codes of patches of photographs, 64 pixels by 128 atoms: real data, unlike `lasso`.

    b is a patch of `image_patches`, of mean 0 and length 8; training problems come from one photograph
    and held-out problems from another. A is `cosine_dictionary()`, which unlike a learned dictionary
    has no free choices; its neighbouring atoms are far from orthogonal.

    Args:
      penalty: λ > 0.

    Raises: ValueError for a penalty that is not positive.
    """
    _check_options(penalty, 1, 0.0, 1)
    atoms = cosine_dictionary()

    def sample(key, split):
        patches = jnp.asarray(image_patches()[0 if split == "train" else 1])
        b = patches[jax.random.randint(key, (), 0, len(patches))]
        return {"A": jnp.asarray(atoms), "b": b, "penalty": jnp.float32(penalty)}

    return _family("lasso_patches", atoms.shape[1], sample, lambda problem: problem["b"])


def duality_gap(x: jax.Array, problem: Problem) -> jax.Array:
    """How far f(x) can be above the minimum: f(x) minus the dual value of a feasible point.

    With r = b - A x and s = min(1, λ / max|A^T r|), s r is feasible and the gap is
    (1 - s)² |r|² / 2 + Σ_i (λ |x_i| - s x_i (A^T r)_i), a sum of terms that are all >= 0.

    Args:
      x: `[n]`.
      problem: of a LASSO.
    """
    residual = problem["b"] - problem["A"] @ x
    correlation = problem["A"].T @ residual
    largest = jnp.maximum(jnp.max(jnp.abs(correlation)), problem["penalty"])
    shrink = problem["penalty"] / largest
    slack = problem["penalty"] * jnp.abs(x) - shrink * x * correlation
    return 0.5 * (1.0 - shrink) ** 2 * jnp.vdot(residual, residual) + jnp.sum(slack)


def lasso_objective(x: jax.Array, problem: Problem) -> jax.Array:
    """f(x) = 1/2 |A x - b|² + λ |x|_1."""
    return _smooth(x, problem) + problem["penalty"] * jnp.sum(jnp.abs(x))


def _smooth(x: jax.Array, problem: Problem) -> jax.Array:
    return 0.5 * jnp.sum((problem["A"] @ x - problem["b"]) ** 2)


def _prox(x: jax.Array, step: jax.Array, problem: Problem) -> jax.Array:
    return soft_threshold(x, step * problem["penalty"])


def _lipschitz(problem: Problem) -> jax.Array:
    """The largest eigenvalue of A^T A, from the smaller of the two Gram matrices."""
    matrix = problem["A"]
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return jnp.linalg.eigvalsh(gram)[-1]


def _family(name, columns, sample, features) -> ProblemFamily:
    def start(problem):
        return jnp.zeros_like(problem["A"][0])

    def solve(problem, key):
        """FISTA with restarts until the duality gap is under 1e-6 f or x stalls; 10,000 steps at most.

        In float32 the gap does not always get there: its rounding error is about 1e-7 |b| / λ.
        """
        lipschitz = _lipschitz(problem)

        def unsolved(state):
            x, change, looks = state
            gap, value = duality_gap(x, problem), lasso_objective(x, problem)
            stalled = change <= _TOLERANCE * jnp.max(jnp.abs(x))
            return (gap > _TOLERANCE * value) & ~stalled & (looks < _MOST_LOOKS)

        def improve(state):
            x, _, looks = state
            new = fista(family, problem, x, _STEPS, restart=True, lipschitz=lipschitz).x
            return new, jnp.max(jnp.abs(new - x)), looks + 1

        return jax.lax.while_loop(unsolved, improve, (start(problem), jnp.inf, 0))[0]

    def frame(problem):
        """Around 0; solutions are about as long as b, for columns of length 1."""
        n = problem["A"].shape[1]
        size = jnp.linalg.norm(problem["b"]) / math.sqrt(n)
        return start(problem), jnp.broadcast_to(size, (n,))

    family = problem_family(
        name,
        sample=sample,
        objective=lasso_objective,
        start=start,
        init=lambda key: jnp.zeros(columns),
        solve=solve,
        frame=frame,
        features=features,
        check=lambda problem: check_lasso(problem, name),
        composite=Composite(_smooth, _prox, _lipschitz),
    )
    return family


def check_lasso(problem: Problem, name: str = "lasso") -> None:
    """Refuses a LASSO that no solver can use.

    Raises: ValueError for missing arrays, shapes that do not fit, numbers that are not finite, columns
      of zeros, b = 0 or a penalty that is not positive.
    """
    arrays = check_problem(name, problem, {"A": "m n", "b": "m", "penalty": ""})
    check_columns(name, arrays["A"])
    if not arrays["b"].any():
        raise ValueError(
            f"{name}: expected b with an entry other than 0, got zeros, for which x = 0 is optimal "
            "and relative gaps are 0 / 0; leave this problem out."
        )
    if arrays["penalty"] <= 0:
        raise ValueError(f"{name}: expected a positive penalty, got {arrays['penalty']}.")


def _draw_dictionary(key: jax.Array, rows: int, columns: int) -> jax.Array:
    matrix = jax.random.normal(key, (rows, columns))
    return matrix / jnp.linalg.norm(matrix, axis=0, keepdims=True)


def _draw_sparse(key: jax.Array, n: int, nonzeros: int | float) -> jax.Array:
    chosen_key, always_key, value_key = jax.random.split(key, 3)
    if isinstance(nonzeros, numbers.Integral):
        chosen = jax.random.permutation(chosen_key, n) < nonzeros
    else:
        chosen = jax.random.bernoulli(chosen_key, nonzeros, (n,))
        chosen = chosen | (jnp.arange(n) == jax.random.randint(always_key, (), 0, n))
    return jnp.where(chosen, jax.random.normal(value_key, (n,)), 0.0)


def _check_dictionary(dictionary: np.ndarray) -> np.ndarray:
    matrix = check_problem("lasso", {"A": dictionary}, {"A": "m n"})["A"].astype(np.float32)
    check_columns("lasso", matrix)
    return matrix


def _check_options(penalty: float, nonzeros: int | float, noise: float, columns: int) -> None:
    if not 0 < penalty < math.inf:
        raise ValueError(f"lasso: penalty must be positive and finite, got {penalty}.")
    if not 0 <= noise < math.inf:
        raise ValueError(f"lasso: noise must be finite and not negative, got {noise}.")
    counted = isinstance(nonzeros, numbers.Integral)
    if not (1 <= nonzeros <= columns if counted else 0 <= nonzeros <= 1):
        raise ValueError(
            f"lasso: nonzeros must be an integer from 1 to {columns}, or a fraction from 0.0 to 1.0, "
            f"got {nonzeros!r}."
        )
