import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Lasso

from lohp_jax.problems.ackley import ackley
from lohp_jax.problems.lasso import lasso
from lohp_jax.solvers.proximal import coordinate_descent, fista, ista, soft_threshold

ORACLES = pathlib.Path(__file__).parents[2].parent / "shared" / "oracles" / "l2o.npz"
FAMILY = lasso(5, 10)
PROBLEM = FAMILY.sample(jax.random.key(0))


def solve(solver, num_steps, problem=PROBLEM, x0=None, **options):
    x0 = FAMILY.start(problem) if x0 is None else x0
    return jax.jit(functools.partial(solver, FAMILY, num_steps=num_steps, **options))(
        problem=problem, x0=x0
    )


def in_float64():
    matrix, b = np.float64(PROBLEM["A"]), np.float64(PROBLEM["b"])
    return matrix, b, float(PROBLEM["penalty"])


def shrink(x, threshold):
    return np.where(x > threshold, x - threshold, np.where(x < -threshold, x + threshold, 0.0))


def fista_oracle(x0, num_steps, restart):
    """Beck and Teboulle's y_1 = x_0, t_1 = 1, with t reset to 1 for the step that a restart ends."""
    matrix, b, penalty = in_float64()
    size = np.linalg.norm(matrix, 2) ** 2
    x, y, t, path = x0, x0, 1.0, [x0]
    for _ in range(num_steps):
        new = shrink(y - matrix.T @ (matrix @ y - b) / size, penalty / size)
        if restart and (y - new) @ (new - x) > 0:
            t = 1.0
        following = (1 + np.sqrt(1 + 4 * t * t)) / 2
        y = new + (t - 1) / following * (new - x)
        x, t = new, following
        path.append(x)
    return np.array(path)


@pytest.mark.parametrize("restart", [False, True])
def test_fista_follows_its_definition(restart):
    x0 = np.linspace(-2, 2, 10)
    trace = solve(fista, 60, x0=jnp.float32(x0), restart=restart)
    expected = fista_oracle(x0, 60, restart)
    if restart:  # which this run needs
        assert not np.allclose(expected, fista_oracle(x0, 60, False), atol=1e-3)
    np.testing.assert_allclose(trace.path, expected, atol=2e-5)


def test_ista_follows_its_definition():
    matrix, b, penalty = in_float64()
    size, x = np.linalg.norm(matrix, 2) ** 2, np.ones(10)
    expected = [x]
    for _ in range(30):
        x = shrink(x - matrix.T @ (matrix @ x - b) / size, penalty / size)
        expected.append(x)
    trace = solve(ista, 30, x0=jnp.ones(10))
    np.testing.assert_allclose(trace.path, expected, atol=1e-5)
    assert np.all(np.diff(trace.values) <= 1e-6) and trace.values[-1] < 0.5 * trace.values[0]


def test_ista_takes_a_lipschitz_constant():
    slower = solve(ista, 5, lipschitz=jnp.float32(100.0))
    matrix, b, penalty = in_float64()
    np.testing.assert_allclose(slower.path[1], shrink(matrix.T @ b / 100, penalty / 100), atol=1e-6)


def test_coordinate_descent_agrees_with_scikit_learn():
    matrix, b, penalty = in_float64()
    model = Lasso(alpha=penalty / len(b), fit_intercept=False, tol=1e-14, max_iter=100_000)
    expected = model.fit(matrix, b).coef_
    trace = solve(coordinate_descent, 300)
    np.testing.assert_allclose(trace.x, expected, atol=2e-5)


def test_a_sweep_minimises_over_every_coordinate_in_turn():
    matrix, b, penalty = in_float64()
    x = np.linspace(-1, 1, 10)
    start = jnp.float32(x)
    for i in range(10):
        grid = x[i] + np.linspace(-5, 5, 100_001)
        rest = b - matrix @ x + matrix[:, i] * x[i]
        values = 0.5 * ((rest[None] - grid[:, None] * matrix[:, i][None]) ** 2).sum(1)
        x[i] = grid[np.argmin(values + penalty * np.abs(grid))]
    np.testing.assert_allclose(solve(coordinate_descent, 1, x0=start).x, x, atol=3e-4)


@pytest.mark.parametrize("size", [0.0, 1e-25, 1e-19, 1e22])
def test_coordinate_descent_takes_columns_of_any_size(size):
    """Squares of all four are no normal float32; the other coordinates are what they are without."""
    problem = FAMILY.sample(jax.random.key(3))
    others = problem | {"A": problem["A"][:, 1:]}
    expected = coordinate_descent(FAMILY, others, jnp.zeros(9), 300).x
    column = size * problem["A"][:, :1]
    odd = problem | {"A": problem["A"].at[:, :1].set(column)}
    trace = coordinate_descent(FAMILY, odd, jnp.zeros(10), 300)
    if size < 1:  # a penalty of more than |column . b| keeps it at zero
        assert trace.x[0] == 0
        np.testing.assert_allclose(trace.x[1:], expected, atol=1e-4)
    else:  # next to no penalty for this column: least squares along it
        residual = odd["b"] - odd["A"] @ trace.x
        np.testing.assert_allclose(jnp.vdot(problem["A"][:, 0], residual), 0.0, atol=1e-3)
        assert np.isfinite(trace.x).all() and 0 < abs(trace.x[0]) < 1e-20


@pytest.mark.parametrize("solver", [ista, fista, coordinate_descent])
def test_traces_have_every_iterate_and_count_gradients(solver):
    trace = solve(solver, 7)
    assert trace.path.shape == (8, 10) and trace.values.shape == (8,)
    assert (trace.objective_calls, trace.gradient_calls) == (0, 7)
    np.testing.assert_array_equal(trace.path[0], 0)
    np.testing.assert_array_equal(trace.path[-1], trace.x)
    matrix, b, penalty = in_float64()
    path = np.float64(trace.path)
    values = 0.5 * ((path @ matrix.T - b) ** 2).sum(1) + penalty * np.abs(path).sum(1)
    np.testing.assert_allclose(trace.values, values, rtol=1e-5)


def test_soft_threshold():
    x = jnp.array([-2.0, -0.5, 0.0, 0.5, 2.0])
    np.testing.assert_array_equal(soft_threshold(x, 0.5), [-1.5, 0, 0, 0, 1.5])


@pytest.mark.parametrize("solver", [ista, fista])
def test_proximal_solvers_reject_a_family_without_a_proximal_map(solver):
    family = ackley(2)
    problem = family.sample(jax.random.key(0))
    with pytest.raises(ValueError, match=r"expected a family with a proximal map .* got 'ackley'"):
        solver(family, problem, problem["x0"], 3)


def test_coordinate_descent_rejects_another_problem():
    with pytest.raises(ValueError, match=r"expected a LASSO .* got \['shift', 'x0'\]; use"):
        coordinate_descent(FAMILY, {"shift": 0, "x0": 0}, jnp.zeros(2), 3)


def test_a_negative_number_of_steps_is_rejected():
    with pytest.raises(ValueError, match="num_steps must be 0 or more, got -1"):
        fista(FAMILY, PROBLEM, jnp.zeros(10), -1)


@pytest.mark.skipif(not ORACLES.exists(), reason=f"the reference numbers are not here ({ORACLES})")
@pytest.mark.parametrize(
    "name, penalty, solver, steps, gaps, rtol",
    [
        ("lasso25x50", 0.1, fista, (10, 20), (0.19, 9.5e-3), 0.1),
        ("lasso25x50_fixedA", 0.1, fista, (10, 20, 100), (0.15, 0.013, 2e-6), 0.3),
        ("lasso25x50_fixedA", 0.005, fista, (10, 20, 100), (1.0, 0.69, 0.025), 0.1),
        ("lasso25x50", 0.1, coordinate_descent, (10,), (5.2e-3,), 0.1),
        ("lasso25x50_fixedA", 0.1, coordinate_descent, (10, 20), (8.9e-3, 7e-4), 0.1),
    ],
)
def test_published_gaps(name, penalty, solver, steps, gaps, rtol):
    """Mean relative gap to known optima, as others have measured it, on instances of their own."""
    with np.load(ORACLES) as file:
        matrix, b, lowest = (file[f"{name}/{key}"] for key in ("A", "b", f"fstar_lam{penalty}"))
    problems = {"A": jnp.asarray(matrix), "b": jnp.asarray(b), "penalty": jnp.float32(penalty)}
    axes = {"A": 0 if matrix.ndim == 3 else None, "b": 0, "penalty": None}

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(axes,))
    def path(problem):
        return solver(FAMILY, problem, FAMILY.start(problem), max(steps)).path

    points = np.float64(path(problems))[:, list(steps)]
    residual = points @ np.swapaxes(np.float64(matrix), -1, -2) - b[:, None]
    values = 0.5 * (residual**2).sum(-1) + penalty * np.abs(points).sum(-1)
    actual = (values / lowest[:, None] - 1).mean(0)
    np.testing.assert_allclose(actual, gaps, rtol=rtol)
