import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Lasso

from lohp_jax.data.patches import image_patches
from lohp_jax.problems.lasso import duality_gap, lasso, lasso_patches

NUM = 64


def objective_oracle(x, matrix, b, penalty):
    return 0.5 * np.sum((matrix @ x - b) ** 2) + penalty * np.sum(np.abs(x))


@pytest.fixture(scope="module")
def solved():
    """Problems with a matrix each, as arrays with a leading axis, and their labels."""
    family = lasso(10, 20, penalty=0.05)

    @jax.jit
    @jax.vmap
    def solve(key):
        problem = family.sample(key)
        return problem, family.solve(problem, key), family.frame(problem), family.features(problem)

    return solve(jax.random.split(jax.random.key(0), NUM))


def test_problems_have_columns_of_length_one_and_no_zero_b(solved):
    problems = solved[0]
    np.testing.assert_allclose(np.linalg.norm(problems["A"], axis=1), 1, rtol=1e-5)
    assert np.abs(problems["b"]).max(1).min() > 0
    assert problems["A"].shape == (NUM, 10, 20) and np.all(problems["penalty"] == np.float32(0.05))
    assert np.unique(np.asarray(problems["A"])[:, 0, 0]).size == NUM


def test_labels_are_optimal(solved):
    """Against the coordinate descent of scikit-learn in float64, value and duality gap."""
    problems, labels, *_ = jax.device_get(solved)
    for i in range(0, NUM, 8):
        matrix, b, penalty = np.float64(problems["A"][i]), np.float64(problems["b"][i]), 0.05
        model = Lasso(alpha=penalty / 10, fit_intercept=False, tol=1e-12, max_iter=10**6)
        best = objective_oracle(model.fit(matrix, b).coef_, matrix, b, penalty)
        value = objective_oracle(np.float64(labels[i]), matrix, b, penalty)
        assert -1e-6 < (value - best) / best < 1e-6
    gaps = jax.vmap(duality_gap)(labels, problems)
    assert np.all(np.abs(gaps) < 1e-4)  # a rounding error may be below 0


def test_the_duality_gap_is_primal_minus_dual(solved):
    problem = jax.tree.map(lambda leaf: leaf[0], solved[0])
    x = np.random.default_rng(0).normal(size=20)
    matrix, b, penalty = (np.float64(problem[name]) for name in ("A", "b", "penalty"))
    residual = b - matrix @ x
    dual = residual * min(1, penalty / np.abs(matrix.T @ residual).max())
    expected = objective_oracle(x, matrix, b, penalty) - (b @ dual - 0.5 * dual @ dual)
    np.testing.assert_allclose(duality_gap(jnp.float32(x), problem), expected, rtol=1e-5)


def test_frame_and_features_are_of_about_unit_size(solved):
    _, labels, (centre, scale), features = solved
    assert 0.5 < np.sqrt(np.mean(((labels - centre) / scale) ** 2)) < 1.5
    assert features.shape == (NUM, 210) and 0.5 < np.std(features) < 1.5


def test_the_splits_differ_by_problem_but_share_a_fixed_matrix():
    family = lasso(5, 10, dictionary="fixed", seed=3)
    train, held_out = (family.sample(jax.random.key(0), split) for split in ("train", "held_out"))
    np.testing.assert_array_equal(train["A"], held_out["A"])
    assert not np.allclose(train["b"], held_out["b"])
    assert not np.allclose(
        train["A"], lasso(5, 10, dictionary="fixed").sample(jax.random.key(0))["A"]
    )
    assert family.features(train).shape == (5,)


@pytest.mark.parametrize("nonzeros, least, most", [(np.int64(3), 3, 3), (1.0, 10, 10), (0.0, 1, 1)])
def test_the_number_of_nonzeros(nonzeros, least, most):
    """A matrix of unit vectors shows x* in b."""
    family = lasso(dictionary=np.eye(10), nonzeros=nonzeros)
    b = jax.jit(jax.vmap(family.sample))(jax.random.split(jax.random.key(0), 50))["b"]
    counts = (np.abs(b) > 0).sum(1)
    assert counts.min() == least and counts.max() == most


def test_noise_is_added():
    keys = jax.random.split(jax.random.key(0), 200)
    clean, noisy = (
        jax.vmap(lasso(dictionary=np.eye(10), noise=noise).sample)(keys)["b"]
        for noise in (0.0, 0.3)
    )
    np.testing.assert_allclose(np.std(noisy - clean), 0.3, rtol=0.1)


def test_patches_are_of_other_photographs_in_each_split():
    family = lasso_patches()
    for split, pool in zip(("train", "held_out"), image_patches(), strict=True):
        problem = family.sample(jax.random.key(0), split)
        family.check(problem)
        assert np.any(np.all(pool == problem["b"][None], axis=1))
    assert family.objective(jnp.zeros(128), problem) == pytest.approx(32, rel=1e-4)


def good():
    return {"A": np.eye(3, 4) + 1, "b": np.ones(3), "penalty": np.float64(0.1)}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"b": np.zeros(3)}, r"b with an entry other than 0, got zeros.*leave this problem out"),
        ({"A": np.eye(3, 4)}, r"no column of zeros in A, got \[3\]; leave these variables out"),
        ({"b": np.ones(4)}, r"b of shape \[3\], got \[4\]; give one problem"),
        ({"A": np.ones((2, 3, 4))}, r"A of shape \[m, n\], got \[2, 3, 4\].*jax.vmap"),
        (
            {"b": [1, np.nan, np.inf]},
            "finite numbers in b, got 1 NaN and 1 infinite; take them out",
        ),
        ({"penalty": 0.0}, "a positive penalty, got 0.0"),
        ({"b": np.array(["1", "2", "3"])}, "real numbers in b, got <U1; convert them"),
    ],
)
def test_check_refuses(change, message):
    family = lasso(3, 4)
    family.check(good())
    with pytest.raises(ValueError, match=f"lasso: expected {message}"):
        family.check(good() | change)


@pytest.mark.parametrize("problem, got", [({"A": 1}, r"\['A'\]"), ([1, 2], "list")])
def test_check_names_what_is_missing(problem, got):
    with pytest.raises(ValueError, match=rf"a problem with \['A', 'b', 'penalty'\], got {got}"):
        lasso(3, 4).check(problem)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"penalty": 0.0}, "penalty must be positive and finite, got 0.0"),
        ({"penalty": float("nan")}, "penalty must be positive and finite, got nan"),
        ({"noise": -1.0}, "noise must be finite and not negative, got -1.0"),
        ({"nonzeros": 51}, "nonzeros must be an integer from 1 to 50, or a fraction .* got 51"),
        ({"nonzeros": 1.5}, "nonzeros must be .* a fraction from 0.0 to 1.0, got 1.5"),
        (
            {"dictionary": "fxed"},
            "dictionary, if no array, must be .* 'fxed'; did you mean 'fixed'",
        ),
        ({"dictionary": np.zeros((2, 2))}, r"expected no column of zeros in A, got \[0, 1\]"),
        ({"dictionary": np.ones(3)}, r"expected A of shape \[m, n\], got \[3\]"),
    ],
)
def test_lasso_rejects(options, message):
    with pytest.raises(ValueError, match=f"lasso: {message}"):
        lasso(**options)


def test_patches_reject_a_penalty():
    with pytest.raises(ValueError, match=r"penalty must be positive and finite, got -1\.0"):
        lasso_patches(penalty=-1.0)


def test_composite_adds_up_to_the_objective(solved):
    family, problem = lasso(10, 20), jax.tree.map(lambda leaf: leaf[0], solved[0])
    matrix = np.float64(problem["A"])
    lipschitz = family.composite.lipschitz(problem)
    np.testing.assert_allclose(lipschitz, np.linalg.norm(matrix, 2) ** 2, rtol=1e-5)
    x = jnp.linspace(-1, 1, 20)
    smooth = functools.partial(family.composite.smooth, problem=problem)
    total = smooth(x) + problem["penalty"] * np.abs(x).sum()
    np.testing.assert_allclose(family.objective(x, problem), total, rtol=1e-6)
    kink = family.composite.prox(x, jnp.float32(4.0), problem)  # threshold 4 * 0.05
    assert np.all((np.asarray(kink) == 0) == (np.abs(x) <= 0.2))
