import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.problems.ackley import ackley, ackley_function
from lohp_jax.problems.rastrigin import rastrigin


def ackley_oracle(z):
    n = len(z)
    return (
        -20 * np.exp(-0.2 * np.sqrt(np.sum(z**2) / n))
        - np.exp(np.sum(np.cos(2 * np.pi * z)) / n)
        + 20
        + np.e
    )


@pytest.mark.parametrize("z", [[1.0], [0.3, -2.5], [1e-3, 0, 0, -2e-3], [4.0] * 50])
def test_the_function_is_its_definition(z):
    z = np.array(z)
    np.testing.assert_allclose(
        ackley_function(jnp.float32(z)), ackley_oracle(z), rtol=1e-4, atol=1e-6
    )


def test_the_minimum_has_value_and_slope_zero():
    value, slope = jax.value_and_grad(ackley_function)(jnp.zeros(3))
    assert abs(value) < 1e-6
    np.testing.assert_array_equal(slope, 0)


@pytest.fixture(scope="module")
def rotated():
    family = ackley(5, rotated=True)
    return family, jax.jit(jax.vmap(family.sample))(jax.random.split(jax.random.key(0), 20))


def test_rotations_are_orthonormal_and_turn_the_function(rotated):
    family, problems = rotated
    for i in (0, 7):
        problem = jax.tree.map(lambda leaf, i=i: leaf[i], problems)
        family.check(problem)
        x = np.linspace(-1, 2, 5)
        z = np.float64(problem["rotation"]) @ (x - np.float64(problem["shift"]))
        value = family.objective(jnp.float32(x), problem)
        np.testing.assert_allclose(value, ackley_oracle(z), rtol=1e-4)
        assert family.objective(family.solve(problem, jax.random.key(0)), problem) < 1e-5


def test_ranges_of_shifts_and_starts(rotated):
    family, problems = rotated
    shift, x0 = np.abs(problems["shift"]), np.abs(problems["x0"])
    assert 1.5 < shift.max() < 2 and 4 < x0.max() < 5
    problem = jax.tree.map(lambda leaf: leaf[0], problems)
    np.testing.assert_array_equal(family.start(problem), problem["x0"])
    centre, scale = family.frame(problem)
    np.testing.assert_array_equal(centre, 0)
    np.testing.assert_allclose(scale, 2 / np.sqrt(3), rtol=1e-6)


@pytest.mark.parametrize("make", [ackley, functools.partial(rastrigin, form="shifted")])
@pytest.mark.parametrize(
    "features, num_probes, least, most",
    [
        ("shift", None, 0, 1e-8),
        ("none", None, 1.1, 1.6),  # the variance of the shift is 4/3
        ("probes", None, 0.1, 1.6),
    ],
)
def test_only_the_control_hands_the_shift_over(make, features, num_probes, least, most):
    """The squared error of the best linear map from features to shift."""
    assert least <= error_of_regression(make(3, features=features, num_probes=num_probes)) <= most


def error_of_regression(family):
    @jax.jit
    @jax.vmap
    def draw(key):
        problem = family.sample(key)
        return family.features(problem), problem["shift"]

    inputs, shifts = jax.device_get(draw(jax.random.split(jax.random.key(0), 600)))
    assert inputs.std() < 1.5 and abs(inputs.mean()) < 0.5
    design = np.c_[inputs, np.ones(600)]
    weights = np.linalg.lstsq(design[:400], shifts[:400])[0]
    return np.mean((design[400:] @ weights - shifts[400:]) ** 2)


def test_too_many_probes_of_rastrigin_are_a_leak():
    """f = |x|² - 2 x·s + |s|² - 10 Σ (cos 2πx_i cos 2πs_i + sin 2πx_i sin 2πs_i) + 10 n."""
    assert error_of_regression(rastrigin(2, form="shifted", num_probes=8)) < 1e-6
    assert error_of_regression(rastrigin(2, form="shifted", num_probes=2)) > 0.2


def test_probes_are_values_at_fixed_points():
    family = ackley(2, num_probes=5)
    problem = family.sample(jax.random.key(0))
    features = family.features(problem)
    assert features.shape == (5,)
    np.testing.assert_array_equal(features, family.features(problem | {"x0": jnp.zeros(2)}))
    assert not np.allclose(features, family.features(problem | {"shift": jnp.zeros(2)}))


def test_without_a_shift_the_minimum_is_at_zero():
    family = ackley(2, shifted=False)
    np.testing.assert_array_equal(family.sample(jax.random.key(0))["shift"], 0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"shift": [np.nan, 1]}, "finite numbers in shift, got 1 NaN"),
        ({"x0": np.ones(3)}, r"x0 of shape \[2\], got \[3\]"),
        ({"rotation": np.ones((2, 2))}, "a rotation with orthonormal rows, got one that is 2 off"),
        ({"rotation": np.eye(3)}, r"rotation of shape \[2, 2\], got \[3, 3\]"),
    ],
)
def test_check_refuses(change, message):
    problem = {"shift": np.ones(2), "x0": np.ones(2), "rotation": np.eye(2)}
    family = ackley(2, rotated=True)
    family.check(problem)
    with pytest.raises(ValueError, match=f"ackley_rotated: expected {message}"):
        family.check(problem | change)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"num_probes": 0}, "num_probes must be at least 1, got 0"),
        ({"features": "all"}, "features must be one of .*, got 'all'"),
    ],
)
def test_ackley_rejects(options, message):
    with pytest.raises(ValueError, match=f"ackley: {message}"):
        ackley(**options)
