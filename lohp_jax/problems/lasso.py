"""LASSO: f(x) = 1/2 |A x - b|² + λ |x|_1, with one minimum and exact certificates."""

import math
import numbers
from collections.abc import Callable
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
_MOST_LOOKS = 50  # in float32; ten times as many in float64
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
      problem: of a LASSO; its penalty may be `[n]`, one for each entry.
    """
    residual = problem["b"] - problem["A"] @ x
    correlation = problem["A"].T @ residual
    shrink = 1.0 / jnp.maximum(jnp.max(jnp.abs(correlation) / problem["penalty"]), 1.0)
    slack = problem["penalty"] * jnp.abs(x) - shrink * x * correlation
    return 0.5 * (1.0 - shrink) ** 2 * jnp.vdot(residual, residual) + jnp.sum(slack)


def lasso_objective(x: jax.Array, problem: Problem) -> jax.Array:
    """f(x) = 1/2 |A x - b|² + λ |x|_1."""
    return _smooth(x, problem) + jnp.sum(problem["penalty"] * jnp.abs(x))


def _smooth(x: jax.Array, problem: Problem) -> jax.Array:
    return 0.5 * jnp.sum((problem["A"] @ x - problem["b"]) ** 2)


def _prox(x: jax.Array, step: jax.Array, problem: Problem) -> jax.Array:
    return soft_threshold(x, step * problem["penalty"])


def _lipschitz(problem: Problem) -> jax.Array:
    """The largest eigenvalue of A^T A, from the smaller of the two Gram matrices."""
    matrix = problem["A"]
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return jnp.linalg.eigvalsh(gram)[-1]


def _equilibrated(problem: Problem) -> tuple[Problem, Callable[[jax.Array], jax.Array]]:
    """The same problem with columns of length 1, b of entries up to 1, and a penalty for each entry.

    Columns in units of their own make FISTA as slow as the square of the largest length by the smallest,
    and their squares are no numbers.

    Returns: the problem, and what takes its x back.
    """
    matrix, b = problem["A"], problem["b"]
    largest = _or_one(jnp.max(jnp.abs(matrix), axis=0))
    matrix = matrix / largest[None]
    length, size = _or_one(jnp.linalg.norm(matrix, axis=0)), _or_one(jnp.max(jnp.abs(b)))
    most = jnp.finfo(matrix.dtype).max / 2**10  # infinity times 0 is no number
    penalty = jnp.minimum(problem["penalty"] / size / largest / length, most)
    scaled = {"A": matrix / length[None], "b": b / size, "penalty": penalty}
    return scaled, lambda y: y / length / largest * size


def _or_one(size: jax.Array) -> jax.Array:
    return jnp.where(size > 0, size, 1.0)


def _family(name, columns, sample, features) -> ProblemFamily:
    def start(problem):
        return jnp.zeros_like(problem["A"][0])

    def solve(problem, key):
        """FISTA with restarts until the duality gap is under 1e-6 f or x stalls; no randomness.

        In float32 the gap does not always get there: its rounding error is about 1e-7 |b| / λ.
        """
        scaled, unscale = _equilibrated(problem)
        lipschitz = _lipschitz(scaled)
        dtype = scaled["A"].dtype
        rounding, most = 8 * jnp.finfo(dtype).eps, _MOST_LOOKS * (10 if dtype == jnp.float64 else 1)

        def improve(state):
            y, _, looks = state
            new = fista(family, scaled, y, _STEPS, restart=True, lipschitz=lipschitz).x
            gap, value = duality_gap(new, scaled), lasso_objective(new, scaled)
            stalled = jnp.max(jnp.abs(new - y)) <= rounding * jnp.max(jnp.abs(new))
            return new, (gap > _TOLERANCE * value) & ~stalled & (looks < most), looks + 1

        # the condition is a part of the state: under vmap it is asked for twice, and where XLA rounds
        # the two in other ways, a problem that is neither solved nor improved holds the loop for ever
        state = start(problem), jnp.array(True), 1
        return unscale(jax.lax.while_loop(lambda state: state[1], improve, state)[0])

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
        certificate=duality_gap,
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
