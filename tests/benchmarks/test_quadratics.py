"""Quadratics under gradient flow: the teacher is exact, and rates are picked on training tasks."""

import jax
import jax.numpy as jnp
import numpy as np

import lohp_jax as lj
from benchmarks.quadratics.report import chosen
from benchmarks.quadratics.run import DIMENSION, STEP, family, flowed, gradient_flow, hessian


def test_a_step_of_the_teacher_is_exactly_gradient_flow():
    tasks, key = family(), jax.random.key(0)
    data, start = tasks.sample(key, "train"), jnp.arange(1.0, 1.0 + DIMENSION)
    run = lj.rollout(tasks, gradient_flow(), data, {"theta": start}, key, num_steps=24)
    values, vectors = np.linalg.eigh(hessian())  # float64
    away = vectors.T @ np.float64(start - data["minimum"])
    for step in (1, 7, 24):
        exact = data["minimum"] + vectors @ (np.exp(-values * STEP * step) * away)
        np.testing.assert_allclose(run.states["theta"][step], exact, rtol=1e-4, atol=1e-4)
        actual = flowed(start, data["minimum"], jnp.float32(STEP * step))
        np.testing.assert_allclose(actual, exact, rtol=1e-4, atol=1e-4)


def test_the_rate_is_picked_on_training_tasks_and_not_where_a_seed_diverged():
    def row(rate, train, held_out, **more):
        errors = {"train": {"end_error": train}, "held_out": {"end_error": held_out}}
        return {"method": "lohp", "compression": 2, "rate": rate, "curve": [errors]} | more

    rows = [row(0.1, 0.3, 0.1), row(0.2, 0.2, 0.9), row(0.3, 0.1, 0.1, diverged="at update 9")]
    assert chosen(rows) == {("lohp", 2): [rows[1]]}
