"""Families of problems that compile quickly: one A, and one call of the random generator."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from lohp_jax.problems.lasso import lasso
from lohp_jax.types import ProblemFamily

MATRIX = jnp.array([[0.8, -0.3, 0.1, 0.5], [0.6, 0.7, -0.6, 0.1], [0.1, 0.5, 0.8, -0.8]])


@pytest.fixture(scope="session")
def small_lasso() -> ProblemFamily:
    """LASSO, 3x4."""

    def sample(key, split="train"):
        key = jax.random.fold_in(key, split == "train")
        return {"A": MATRIX, "b": jax.random.normal(key, (3,)), "penalty": jnp.float32(0.1)}

    return dataclasses.replace(lasso(3, 4), sample=sample)


@pytest.fixture(scope="session")
def small_quadratic(small_lasso) -> ProblemFamily:
    """|x - A^T b|² / 2, whose minimum is 0."""

    def solution(problem):
        return problem["A"].T @ problem["b"]

    return dataclasses.replace(
        small_lasso,
        objective=lambda x, problem: 0.5 * jnp.sum((x - solution(problem)) ** 2),
        solve=lambda problem, key: solution(problem),
        features=lambda problem: problem["b"],
        composite=None,
        name="quadratic",
    )
