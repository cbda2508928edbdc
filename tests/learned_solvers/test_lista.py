import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.learned_solvers.lista import train_lista
from lohp_jax.problems.lasso import lasso
from lohp_jax.solvers.proximal import fista
from lohp_jax.training.engine import DivergedError

KEY = jax.random.key(0)
TINY = {"num_layers": 5, "updates": 1, "batch_size": 2, "learning_rate": 1e-12}


@functools.cache
def untrained(family, form):
    return train_lista(family, KEY, form=form, **TINY)


def mean_value(family, generator):
    problems = jax.vmap(lambda key: family.sample(key, "held_out"))(jax.random.split(KEY, 64))

    @jax.jit
    @jax.vmap
    def values(problem):
        return family.objective(generator.apply(generator.params, problem), problem)

    return values(problems).mean()


@pytest.mark.parametrize("form", ["matrices", "steps"])
def test_untrained_networks_are_fista(small_lasso, form):
    generator, problem = untrained(small_lasso, form), small_lasso.sample(jax.random.key(1))
    expected = fista(small_lasso, problem, jnp.zeros(4), 5).path
    np.testing.assert_allclose(generator.path(generator.params, problem), expected, atol=1e-5)
    short = generator.apply(generator.params, problem, KEY, num_steps=2)
    np.testing.assert_allclose(short, expected[2], atol=1e-5)
    assert np.abs(np.diff(expected, axis=0)).max(axis=1).min() > 1e-4


@pytest.mark.parametrize("form, rate", [("matrices", 3e-3), ("steps", 3e-2)])
def test_training_beats_the_classic_solver_on_new_problems(small_lasso, form, rate):
    reports, options = [], TINY | {"updates": 150, "batch_size": 16, "learning_rate": rate}
    trained = train_lista(
        small_lasso, KEY, form=form, **options, log_every=75, on_progress=reports.append
    )
    before = mean_value(small_lasso, untrained(small_lasso, form))
    assert mean_value(small_lasso, trained) < before - 1e-4
    assert [report.step for report in reports] == [75, 150]
    assert reports[1].metrics["loss"] < reports[0].metrics["loss"]


def test_steps_serve_other_sizes(small_lasso):
    family, generator = lasso(5, 7), untrained(small_lasso, "steps")
    problem = family.sample(KEY)
    expected = fista(family, problem, jnp.zeros(7), 5).x
    np.testing.assert_allclose(generator.apply(generator.params, problem), expected, atol=1e-5)


def test_matrices_serve_one_lasso(small_lasso):
    problem = small_lasso.sample(KEY)
    untrained(small_lasso, "steps").check(problem | {"A": 2 * problem["A"]})
    check = untrained(small_lasso, "matrices").check
    check(problem)
    with pytest.raises(ValueError, match=r"the A that all .* LISTA with matrices .*form='steps' s"):
        check(problem | {"A": 2 * problem["A"]})
    with pytest.raises(
        ValueError, match=r"expected A of shape \[3, 4\], as in training, got \[3, 3"
    ):
        check(problem | {"A": problem["A"][:, :3]})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"form": "matrix"}, r"form must be one of \('matrices', 'steps'\), got 'matrix'"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"updates": 0}, "updates must be at least 1, got 0"),
        ({"log_every": 0}, "log_every must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be finite and positive, got 0.0"),
    ],
)
def test_rejects(small_lasso, options, message):
    with pytest.raises(ValueError, match=message):
        train_lista(small_lasso, KEY, **options)


def test_rejects_families_that_it_cannot_serve(small_quadratic):
    with pytest.raises(ValueError, match=r"`composite`\), got 'quadratic'; use `train_learned"):
        train_lista(small_quadratic, KEY)
    with pytest.raises(
        ValueError, match="with one A for form='matrices', got 'lasso'; use form='s"
    ):
        train_lista(lasso(3, 4), KEY, form="matrices")


def test_rejects_more_layers_than_there_are(small_lasso):
    generator = untrained(small_lasso, "steps")
    with pytest.raises(ValueError, match="num_steps must be from 0 to 5, got 6"):
        generator.apply(generator.params, small_lasso.sample(KEY), num_steps=6)


def test_a_loss_that_is_not_finite_stops_the_training(small_lasso):
    with pytest.raises(DivergedError, match=r"lista: .* at update 2\. Lower the learning rate"):
        train_lista(small_lasso, KEY, **TINY | {"updates": 3, "learning_rate": 1e30})
