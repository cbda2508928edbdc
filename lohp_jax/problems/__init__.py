"""Families of optimization problems by name."""

import dataclasses
import functools
from typing import Any

from lohp_jax.checks import check_option
from lohp_jax.problems.ackley import ackley
from lohp_jax.problems.family import read_problems
from lohp_jax.problems.fit_mlp import fit_mlp
from lohp_jax.problems.lasso import duality_gap, lasso, lasso_patches
from lohp_jax.problems.rastrigin import rastrigin
from lohp_jax.types import ProblemFamily

__all__ = [
    "PROBLEMS",
    "ProblemFamily",
    "ackley",
    "duality_gap",
    "fit_mlp",
    "lasso",
    "lasso_patches",
    "make_problem",
    "rastrigin",
    "read_problems",
]

PROBLEMS = {
    "lasso": lasso,
    "lasso_5x10": functools.partial(lasso, 5, 10),
    "lasso_250x500": functools.partial(lasso, 250, 500, nonzeros=50),
    "lasso_fixed": functools.partial(lasso, dictionary="fixed"),
    "lasso_fixed_5x10": functools.partial(lasso, 5, 10, dictionary="fixed"),
    "lasso_fixed_250x500": functools.partial(lasso, 250, 500, dictionary="fixed", nonzeros=50),
    "lasso_patches": lasso_patches,
    **{f"rastrigin_{n}": functools.partial(rastrigin, n=n) for n in (2, 10, 30)},
    **{
        f"rastrigin_shifted_{n}": functools.partial(rastrigin, n=n, form="shifted")
        for n in (2, 10, 30, 50)
    },
    **{f"ackley_{n}": functools.partial(ackley, n=n) for n in (2, 10, 30, 50)},
    **{
        f"ackley_rotated_{n}": functools.partial(ackley, n=n, rotated=True) for n in (2, 10, 30, 50)
    },
    "fit_mlp": fit_mlp,
}
"""Factory of each family of optimization problems."""


def make_problem(name: str, **options: Any) -> ProblemFamily:
    """Builds a family of optimization problems by name; the family is called `name`.

    Args:
      name: a key of `PROBLEMS`.
      **options: of its factory, e.g. `penalty=0.005`, in place of what the name stands for.

    Raises: ValueError for an unknown name, with the nearest one, and what the factory raises.
    """
    check_option("make_problem", "name", name, PROBLEMS)
    return dataclasses.replace(PROBLEMS[name](**options), name=name)
