import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from lohp_jax.problems.rastrigin import rastrigin, rastrigin_function

ORACLES = pathlib.Path(__file__).parents[2].parent / "shared" / "oracles" / "l2o.npz"
FAMILY = rastrigin(2)


def objective_oracle(x, matrix, b, c):
    ripple = sum(c_i * np.cos(2 * np.pi * x_i) for c_i, x_i in zip(c, x, strict=True))
    return 0.5 * np.sum((matrix @ x - b) ** 2) - 10 * ripple + 10 * len(c)


def in_float64(problem):
    return [np.float64(problem[name]) for name in ("A", "b", "c")]


@pytest.fixture(scope="module")
def solve():
    return jax.jit(jax.vmap(lambda problem: (FAMILY.solve(problem, None), FAMILY.frame(problem))))


@pytest.fixture(scope="module")
def problems():
    return jax.jit(jax.vmap(FAMILY.sample))(jax.random.split(jax.random.key(0), 32))


def test_the_objective_is_its_definition(problems):
    problem = jax.tree.map(lambda leaf: leaf[0], problems)
    x = np.array([0.3, -1.7])
    value = FAMILY.objective(jnp.float32(x), problem)
    np.testing.assert_allclose(value, objective_oracle(x, *in_float64(problem)), rtol=1e-5)


def test_labels_are_global_minima(problems, solve):
    """No well near the centre, descended into in float64, is deeper than the label."""
    labels, (centres, _) = jax.device_get(solve(problems))
    for i in range(0, 32, 8):
        arrays = tuple(in_float64(jax.tree.map(lambda leaf, i=i: leaf[i], problems)))
        value = objective_oracle(np.float64(labels[i]), *arrays)
        grid = itertools.product(np.arange(-3, 3.1, 0.5), repeat=2)
        starts = sorted(
            (np.round(2 * centres[i]) / 2 + d for d in grid),
            key=lambda x: objective_oracle(x, *arrays),
        )
        found = min(scipy.optimize.minimize(objective_oracle, x, arrays).fun for x in starts[:8])
        assert value < found + 1e-3


@pytest.mark.skipif(not ORACLES.exists(), reason=f"the reference numbers are not here ({ORACLES})")
def test_all_certified_minima_are_found(solve):
    with np.load(ORACLES) as file:
        names = ("A", "b", "c", "fstar", "xstar")
        *arrays, lowest, best = (file[f"rast_openl2o_n2/{name}"] for name in names)
    problems = dict(zip(("A", "b", "c"), arrays, strict=True))
    labels, (centre, scale) = solve(problems)
    values = [objective_oracle(*a) for a in zip(np.float64(labels), *arrays, strict=True)]
    np.testing.assert_allclose(values, lowest, atol=1e-4)
    assert 0.3 < np.sqrt(np.mean(((best - centre) / scale) ** 2)) < 1.5


def test_the_frame_of_a_singular_matrix():
    centre, scale = FAMILY.frame({"A": jnp.ones((2, 2)), "b": jnp.ones(2), "c": jnp.ones(2)})
    np.testing.assert_allclose(centre, [0.5, 0.5], atol=1e-5)  # the shortest of all solutions
    assert np.all(scale < 1)


def test_features_hold_the_problem_in_about_unit_size(problems):
    features = jax.vmap(FAMILY.features)(problems)
    assert features.shape == (32, 4 + 2 + 2 + 2 + 2)
    assert 0.5 < np.std(features) < 2 and np.abs(features).max() < 5
    centre = np.linalg.solve(problems["A"][0], problems["b"][0])
    np.testing.assert_allclose(features[0, 6:8], np.cos(2 * np.pi * centre), atol=1e-3)


def test_the_scale_of_the_frame_has_a_limit():
    problem = {"A": jnp.diag(jnp.array([1.0, 0.005])), "b": jnp.ones(2), "c": jnp.ones(2)}
    centre, scale = FAMILY.frame(problem)
    np.testing.assert_allclose(centre, [1, 200], rtol=1e-4)
    np.testing.assert_allclose(scale, [np.sqrt(0.4**2 + 1 / 12), 30], rtol=1e-5)


def test_the_shifted_form():
    family = rastrigin(3, form="shifted")
    problem = family.sample(jax.random.key(0))
    z = np.array([0.2, -1.3, 0.7])
    expected = sum(v * v - 10 * np.cos(2 * np.pi * v) + 10 for v in z)
    np.testing.assert_allclose(rastrigin_function(jnp.float32(z)), expected, rtol=1e-5)
    value = family.objective(problem["shift"] + jnp.float32(z), problem)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert family.name == "rastrigin_shifted"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"c": [1.0, np.nan]}, "finite numbers in c, got 1 NaN and 0 infinite"),
        ({"c": np.ones(3)}, r"c of shape \[2\], got \[3\]"),
        ({"A": np.ones((2, 3))}, r"A of shape \[2, 2\], got \[2, 3\]"),
        ({"A": [[1.0, 0.0], [2.0, 0.0]]}, r"no column of zeros in A, got \[1\]"),
    ],
)
def test_check_refuses(change, message):
    problem = {"A": np.eye(2), "b": np.zeros(2), "c": np.ones(2)}
    FAMILY.check(problem)
    with pytest.raises(ValueError, match=f"rastrigin: expected {message}"):
        FAMILY.check(problem | change)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"form": "standard"}, r"form must be one of \('openl2o', 'shifted'\), got 'standard'"),
        ({"n": 0}, "n must be at least 1, got 0"),
    ],
)
def test_rastrigin_rejects(options, message):
    with pytest.raises(ValueError, match=f"rastrigin: {message}"):
        rastrigin(**options)
