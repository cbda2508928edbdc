"""Learned rivals of classic solvers: LISTA, recurrent networks, regression."""
