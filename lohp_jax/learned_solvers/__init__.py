"""Learned rivals of classic solvers: LISTA, recurrent networks, regression."""

from lohp_jax.learned_solvers.lista import train_lista
from lohp_jax.learned_solvers.recurrent import run_learned_solver, train_learned_solver
from lohp_jax.learned_solvers.regression import train_regression

__all__ = ["run_learned_solver", "train_learned_solver", "train_lista", "train_regression"]
