"""Two small families of problems: one solution each, or one of two that the key chooses."""

import jax
import jax.numpy as jnp
import pytest

from lohp_jax.types import ProblemFamily


def problem_family(name, n, sample, objective, solve, features, **functions):
    def values(x, problem):
        return {"objective": objective(x, problem), "loss": objective(x, problem)}

    return ProblemFamily(
        sample=sample,
        init=lambda key: jnp.zeros(n),
        loss=lambda x, problem, key: objective(x, problem),
        evaluate=values,
        context=lambda problem, key: problem,
        name=name,
        objective=objective,
        start=lambda problem: jnp.zeros(n),
        solve=solve,
        frame=lambda problem: (jnp.full(n, 0.5), jnp.full(n, 2.0)),
        features=features,
        **functions,
    )


@pytest.fixture(scope="session")
def quadratic():
    """1/2 |x - M b|² for one M, whose optimum is 0."""
    matrix = jnp.array([[1.0, 0.5], [-0.3, 0.8]])

    def objective(x, problem):
        return jnp.sum((x - matrix @ problem["b"]) ** 2) / 2

    return problem_family(
        "quadratic",
        2,
        lambda key, split: {"b": jax.random.normal(jax.random.fold_in(key, len(split)), (2,))},
        objective,
        lambda problem, key: matrix @ problem["b"],
        lambda problem: problem["b"],
    )


@pytest.fixture(scope="session")
def two_wells():
    """(x² - 1)² in one dimension; the label solver's key says which well it finds."""
    return problem_family(
        "two_wells",
        1,
        lambda key, split: {"b": jnp.zeros(1)},
        lambda x, problem: jnp.sum((x**2 - 1) ** 2),
        lambda problem, key: jnp.where(jax.random.bernoulli(key, 0.3, (1,)), -1.0, 1.0),
        lambda problem: problem["b"],
    )
