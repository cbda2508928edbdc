"""A label is f* only with a certificate, whatever the units of the columns."""

import dataclasses

import jax
import numpy as np
import pytest

from lohp_jax.problems import make_problem
from lohp_jax.problems.reference import Reference, solve_certified

FAMILY = make_problem("lasso_5x10")
LOWEST = 1.318199e-7, 6.859278e-4, 6.839049e-7, 2.030830e-4
"""f* of `badly_scaled`: the least of the stationary points of all supports and signs, in float64."""


def badly_scaled():
    """Columns of lengths from 1e-4 to 1e4, b of length 1; two in the range of the large ones."""
    problems = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        matrix = rng.normal(size=(5, 10))
        matrix = matrix / (np.linalg.norm(matrix, axis=0) if seed else 1) * np.logspace(-4, 4, 10)
        for b in (matrix @ rng.normal(size=10), rng.normal(size=5)):
            problems.append({"A": matrix, "b": b / np.linalg.norm(b), "penalty": np.array(1e-3)})
    return jax.tree.map(lambda *leaves: np.float32(np.stack(leaves)), *problems)


def keys(count):
    return jax.random.split(jax.random.key(0), count)


def values_of(problems, x):
    matrix, b, penalty = (np.float64(problems[name]) for name in ("A", "b", "penalty"))
    residual = np.einsum("kij,kj->ki", matrix, np.float64(x)) - b
    return 0.5 * (residual**2).sum(1) + penalty * np.abs(np.float64(x)).sum(1)


def test_columns_of_any_units_are_solved_and_certified():
    problems = badly_scaled()
    found = solve_certified(FAMILY, problems, keys(4))
    assert found.certified.all() and found.value.dtype == np.float64
    np.testing.assert_allclose(found.value, LOWEST, rtol=1e-4)
    np.testing.assert_allclose(found.floor, LOWEST, rtol=1e-4)
    np.testing.assert_allclose(values_of(problems, found.x), LOWEST, rtol=1e-4)
    assert (found.excess >= 0).all() and (found.excess <= 1e-4 * found.value).all()


def test_labels_in_float32_are_near():
    """As inside a training step, where precision is one."""
    problems = badly_scaled()
    x = jax.jit(jax.vmap(FAMILY.solve, (0, None)))(problems, None)
    values = values_of(problems, x)
    np.testing.assert_allclose(values[[0, 2, 3]], np.array(LOWEST)[[0, 2, 3]], rtol=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_the_unit_of_b_does_not_matter(size):
    """f(c x; A, c b, c λ) = c² f(x; A, b, λ)."""
    problem = FAMILY.sample(jax.random.key(1))
    x = FAMILY.solve(problem, None)
    other = problem | {name: np.float32(size) * problem[name] for name in ("b", "penalty")}
    np.testing.assert_allclose(FAMILY.solve(other, None) / size, x, atol=1e-5)


def test_a_minimum_of_zero_is_certified_by_the_value():
    family = make_problem("ackley_2")
    problems = jax.vmap(family.sample)(keys(3))
    found = solve_certified(family, problems, keys(3))
    assert found.certified.all() and (found.excess < 1e-5).all()
    astray = dataclasses.replace(family, solve=lambda problem, key: problem["shift"] + 1.0)
    found = solve_certified(astray, problems, keys(3))
    assert not found.certified.any()
    np.testing.assert_allclose(found.floor, 0.0, atol=1e-6)


def test_without_a_certificate_nothing_is_certified():
    bare = dataclasses.replace(FAMILY, certificate=None)
    found = solve_certified(bare, badly_scaled(), keys(4))
    assert not found.certified.any() and np.isinf(found.excess).all()
    np.testing.assert_array_equal(found.floor, found.value)


def test_what_is_not_certified_counts_from_below():
    value, excess = np.array([2.0, 2.0, 2.0]), np.array([1e-5, 0.5, np.inf])
    found = Reference(np.zeros((3, 1)), value, excess, np.array([True, False, False]))
    np.testing.assert_array_equal(found.floor, [2.0, 1.5, 2.0])
