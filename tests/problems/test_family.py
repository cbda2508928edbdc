import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.problems import PROBLEMS, make_problem
from lohp_jax.problems.family import read_problems
from lohp_jax.problems.lasso import lasso
from lohp_jax.problems.rastrigin import rastrigin
from lohp_jax.types import ProblemFamily

NAMES = ["lasso_5x10", "lasso_fixed_5x10", "lasso_patches", "rastrigin_2", "rastrigin_shifted_2"]
NAMES += ["ackley_2", "ackley_rotated_2", "fit_mlp"]


@pytest.mark.parametrize("name", NAMES)
def test_families_keep_the_contract(name):
    """Shapes agree, the functions trace, and the task's view of a problem is the problem's own."""
    family = make_problem(name)
    key = jax.random.key(0)
    problem, other = jax.jit(lambda key: (family.sample(key), family.sample(key, "held_out")))(key)
    family.check(problem)
    family.check(other)
    assert isinstance(family, ProblemFamily) and family.name == name
    assert family.context(problem, key) is problem
    assert any(not np.array_equal(problem[k], other[k]) for k in problem)
    x = family.start(problem)
    value = family.objective(x, problem)
    assert value == family.loss(x, problem, key)
    assert family.evaluate(x, problem) == {"objective": value, "loss": value}

    def everything(key):
        problem = family.sample(key)
        return (
            family.start(problem),
            family.init(key),
            family.solve(problem, key),
            *family.frame(problem),
            jax.grad(family.objective)(x, problem),
            family.features(problem),
        )

    *points, features = jax.eval_shape(jax.vmap(everything), jax.random.split(key, 3))
    assert {(point.shape, point.dtype) for point in points} == {((3, *x.shape), x.dtype)}
    assert features.ndim == 2 and features.dtype == x.dtype == np.float32


def test_every_name_builds_a_family():
    for name in PROBLEMS:
        family = make_problem(name)
        assert family.name == name
        jax.eval_shape(family.sample, jax.random.key(0))


def test_options_replace_what_the_name_stands_for():
    family = make_problem("lasso_5x10", penalty=0.005)
    assert family.sample(jax.random.key(0))["penalty"] == np.float32(0.005)


@pytest.mark.parametrize(
    "name, nearest", [("laso", "lasso"), ("rastrigin_3", "rastrigin_30"), ("", "lasso")]
)
def test_unknown_names_are_rejected_with_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"make_problem: .* got '{name}'; did you mean '"):
        make_problem(name)
    if name:
        with pytest.raises(ValueError, match=f"did you mean '{nearest}'"):
            make_problem(name)


def test_sample_rejects_an_unknown_split():
    with pytest.raises(ValueError, match=r"split must be one of .* got 'test'"):
        rastrigin(2).sample(jax.random.key(0), "test")


@pytest.fixture
def save(tmp_path):
    def save(**arrays):
        np.savez(tmp_path / "problems.npz", **arrays)
        return tmp_path / "problems.npz"

    return save


def instances(count=3):
    rng = np.random.default_rng(0)
    return {"A": rng.normal(size=(count, 5, 10)), "b": rng.normal(size=(count, 5))}


def test_reading_fills_in_what_the_family_shares(save):
    arrays = instances()
    problems = read_problems(save(**arrays), lasso(5, 10, penalty=0.3))
    np.testing.assert_array_equal(problems["A"], np.float32(arrays["A"]))
    np.testing.assert_array_equal(problems["penalty"], np.full(3, 0.3, np.float32))
    fixed = read_problems(save(b=arrays["b"]), lasso(5, 10, dictionary="fixed"))
    assert fixed["A"].shape == (3, 5, 10) and np.ptp(fixed["A"], axis=0).max() == 0


def test_reading_takes_shared_arrays_single_problems_other_sizes_and_integers(save):
    arrays = instances()
    shared = read_problems(save(A=arrays["A"][0], b=arrays["b"]), lasso())
    np.testing.assert_array_equal(shared["A"][2], np.float32(arrays["A"][0]))
    one = read_problems(save(A=np.arange(1, 7).reshape(2, 3), b=[1, 2]), lasso())
    assert one["A"].shape == (1, 2, 3) and one["A"].dtype == np.float32


def test_reading_with_a_prefix(save):
    arrays = {f"set/{name}": array for name, array in instances().items()}
    arrays["set/optimum"] = np.ones(3)
    problems = read_problems(save(**arrays, other=1), lasso(), prefix="set/")
    np.testing.assert_array_equal(problems["b"], np.float32(arrays["set/b"]))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"lam": np.ones(3)},
            r"an array in .*problems.npz' must be one of \('A', 'b', 'penalty'\), got 'lam'; did you",
        ),
        ({"b": None}, r"expected an array 'b' in .*problems.npz', got \['A'\]"),
        (
            {"b": np.ones((2, 5))},
            r"expected as many problems in every array.* got \{'A': 3, 'b': 2\}",
        ),
        (
            {"A": np.ones((0, 5, 10)), "b": np.ones((0, 5))},
            "expected as many problems in every array, and one at least, got",
        ),
        ({"b": np.zeros((3, 5))}, "problem 0: lasso: expected b with an entry other than 0"),
        (
            {"b": np.diag([1, 1, np.nan, 1, 1])[:3]},
            "problem 2: lasso: expected finite numbers in b",
        ),
        ({"b": np.ones((3, 4))}, r"problem 0: lasso: expected b of shape \[5\], got \[4\]"),
        ({"b": np.ones((3, 5), complex)}, "expected b of type float32, got complex128; convert it"),
        ({"b": np.array([["1"] * 5] * 3)}, "expected b of type float32, got <U1"),
    ],
)
def test_reading_refuses(save, change, message):
    arrays = {k: v for k, v in (instances() | change).items() if v is not None}
    with pytest.raises(ValueError, match=f"read_problems: {message}"):
        read_problems(save(**arrays), lasso(5, 10))


def test_reading_never_unpickles(save):
    path = save(A=np.array([{"a": 1}], object), b=np.ones(3))
    with pytest.raises(
        ValueError, match=r"expected an .npz file of plain arrays, got .*numpy.savez"
    ):
        read_problems(path, lasso())


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04"])
def test_reading_refuses_other_files(tmp_path, content):
    path = tmp_path / "problems.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"expected an .npz file of plain arrays"):
        read_problems(path, lasso())


def test_reading_refuses_a_single_array(tmp_path):
    np.save(tmp_path / "b.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"expected an .npz file of plain arrays"):
        read_problems(tmp_path / "b.npy", lasso())


def test_reading_needs_a_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_problems(tmp_path / "none.npz", lasso())


def test_read_problems_are_for_vmap(save):
    family = lasso(5, 10)
    problems = read_problems(save(**instances()), family)
    values = jax.vmap(family.objective)(jnp.zeros((3, 10)), problems)
    np.testing.assert_allclose(values, 0.5 * (problems["b"] ** 2).sum(1), rtol=1e-5)
