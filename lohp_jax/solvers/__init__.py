"""Classic solvers of optimization problems, which count what they call."""

from lohp_jax.solvers.descent import lbfgs, run_optax
from lohp_jax.solvers.multistart import gaussian_starts, multistart
from lohp_jax.solvers.newton import damped_newton
from lohp_jax.solvers.proximal import coordinate_descent, fista, ista
from lohp_jax.solvers.refine import refine

__all__ = [
    "coordinate_descent",
    "damped_newton",
    "fista",
    "gaussian_starts",
    "ista",
    "lbfgs",
    "multistart",
    "refine",
    "run_optax",
]
