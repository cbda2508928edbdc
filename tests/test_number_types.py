"""Numbers of any type at every door where a user's arrays come in: right, or refused in one sentence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax import make_codec, optimizers, rollout, supervised_family
from lohp_jax.checks import as_held
from lohp_jax.codec import standard_scale
from lohp_jax.data.images import ImageSet
from lohp_jax.problems import lasso, read_problems
from lohp_jax.tasks.images import TaskTable, image_family
from lohp_jax.tasks.support import support_of
from lohp_jax.types import TaskFamily

BIG, LONG = np.dtype(">f4"), np.dtype(np.longdouble)
RNG = np.random.default_rng(0)
X = np.float32(RNG.uniform(-1, 1, (6, 8, 2)))
RIGHT = ["float16", "bfloat16", ">f4", ">f8", "longdouble", "float64"]


def typed(name):
    return np.dtype(jnp.bfloat16) if name == "bfloat16" else np.dtype(name)


@pytest.mark.parametrize("name", [*RIGHT, "int8", ">i2", "uint16", "bool"])
def test_what_jax_can_hold_is_held(name):
    array = np.array([0, 1, 1, 0, 1]).astype(typed(name))
    held = as_held("here", "x", array)
    assert jax.dtypes.canonicalize_dtype(held.dtype) == held.dtype and held.dtype.isnative
    np.testing.assert_array_equal(np.float64(held), [0, 1, 1, 0, 1])


@pytest.mark.parametrize(
    "array, message",
    [
        (np.ones(2, np.complex64), "here: expected real numbers in x, got complex64; take one of"),
        (np.array(["a"]), "here: expected numbers in x, got <U1; convert it"),
        (np.array([1e39]), r"within the range of float32 in x, got float64 .*; scale them"),
        (np.array([-1e39], ">f8"), "within the range of float32"),
        (np.array([1], np.longdouble) * np.longdouble("1e4000"), "within the range of float32"),
        (np.array([2**31]), "within the range of int32 in x, got int64 from 2147483648"),
        (np.array([-(2**31) - 1]), "within the range of int32"),
        (np.array([2**32], np.uint64), "within the range of uint32"),
    ],
)
def test_what_jax_cannot_hold_is_refused(array, message):
    with pytest.raises(ValueError, match=message):
        as_held("here", "x", array)


def fits(init, apply, x, y):
    return supervised_family(init, apply, x, y, shots=2, num_query=2)


MODEL = lambda key: {"w": jnp.zeros(2)}, lambda params, x: x @ params["w"]


@pytest.mark.parametrize("name", RIGHT)
def test_examples_of_any_real_type(name):
    y = X[..., 0].astype(typed(name))
    family = fits(*MODEL, X.astype(typed(name)), y)
    other = fits(*MODEL, X, X[..., 0])
    contexts = [f.context(f.sample(jax.random.key(0)), jax.random.key(1)) for f in (family, other)]
    for mine, theirs in zip(*map(jax.tree.leaves, contexts), strict=True):
        np.testing.assert_allclose(np.float32(mine), theirs, atol=1e-2)


def test_examples_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="range of float32 in x"):
        fits(*MODEL, np.float64(X) * 1e300, X[..., 0])
    with pytest.raises(ValueError, match="range of int32 in x"):
        fits(*MODEL, np.int64(X) + 2**40, X[..., 0])
    with pytest.raises(ValueError, match="expected real x, got complex"):
        fits(*MODEL, X + 1j, X[..., 0])


@pytest.mark.parametrize(
    "value, message",
    [
        (X[0].astype(BIG), "expected x in the byte order of this machine, got >f4; convert it by"),
        (X[0].astype(LONG), r"expected x of 64 bits at most, .* `x.astype\('float64'\)`"),
        (np.float64(X[0]) * 1e300, "within the range of float32 in x"),
        (X[0] + 1j, "expected floating-point x, got complex"),
        (np.int32(X[0]), "expected floating-point x, got int32"),
    ],
)
def test_contexts(value, message):
    check = support_of(fits(*MODEL, X, X[..., 0])).check
    check({"x": X[0].astype(np.float64), "y": X[0, :, 0].astype(np.float16)})
    with pytest.raises(ValueError, match=message):
        check({"x": value, "y": X[0, :, 0]})


def image_door(pool):
    table = TaskTable(np.array([[0, 1]], np.int32), np.array([[0, 1]], np.int32))
    tables = {"train": table, "held_out": table}
    return image_family("mine", ImageSet(pool, pool, "mine"), tables, network="linear", shots=1)


@pytest.mark.parametrize("name", RIGHT)
def test_image_sets_of_any_real_type(name):
    pool = RNG.uniform(0, 1, (2, 3, 4, 4, 1)).astype(typed(name))
    family = image_door(pool)
    x = family.context(family.sample(jax.random.key(0)), jax.random.key(1))["x"]
    known = np.float64(pool).reshape(1, 6, 16)
    distance = np.abs(np.float64(x).reshape(2, 1, 16) - known).max(axis=2)
    assert (distance.min(axis=1) < 1e-6).all()


def test_image_sets_that_do_not_fit_are_refused():
    pool = RNG.integers(0, 255, (2, 3, 4, 4, 1))
    with pytest.raises(ValueError, match=r"images in .0, 1. in train, got uint8; divide"):
        image_door(pool.astype(np.uint8))
    with pytest.raises(ValueError, match=r"images in .0, 1. in train, got uint16; divide"):
        image_door(pool.astype(">u2"))
    with pytest.raises(ValueError, match="expected real numbers in train, got complex128"):
        image_door(pool + 1j)


PROBLEM = {"A": np.eye(5, 10) + 0.1, "b": np.ones(5), "penalty": np.array(0.1)}


@pytest.mark.parametrize("name", ["float16", ">f4", "longdouble", "int32"])
def test_problems_of_a_file(name, tmp_path):
    problem = {k: np.ceil(v).astype(typed(name)) for k, v in PROBLEM.items()}
    np.savez(tmp_path / "p.npz", **{k: v[None] for k, v in problem.items()})
    found = read_problems(tmp_path / "p.npz", lasso(5, 10))
    for key, array in found.items():
        assert array.dtype == np.float32 and array.dtype.isnative
        np.testing.assert_array_equal(array[0], np.float32(problem[key]))


@pytest.mark.parametrize(
    "name, array, message",
    [
        ("A", PROBLEM["A"] * 1e300, "range of float32 in A, got float64"),
        ("b", PROBLEM["b"] + 1j, "expected .*b.*, got complex128"),
        ("b", PROBLEM["b"].astype(">f8"), "b in the byte order of this machine"),
    ],
)
def test_problems_that_do_not_fit_are_refused(name, array, message, tmp_path):
    family = lasso(5, 10)
    with pytest.raises(ValueError, match=message):
        family.check(PROBLEM | {name: array})
    if array.dtype.isnative:
        arrays = {k: v[None] for k, v in (PROBLEM | {name: array}).items()}
        np.savez(tmp_path / "p.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            read_problems(tmp_path / "p.npz", family)


def test_codecs():
    params = {"w": np.float32([1.0, 2.0])}
    make = functools.partial(make_codec, channels=2)
    with pytest.raises(ValueError, match=r"make_codec: expected .*'w'.* byte order"):
        make({"w": np.ones(2, BIG)})
    with pytest.raises(ValueError, match=r"make_codec: expected .*'w'.* 64 bits at most"):
        make({"w": np.ones(2, LONG)})
    with pytest.raises(ValueError, match="expected floating-point arrays, got complex"):
        make({"w": np.ones(2, complex)})
    codec = make(params)
    np.testing.assert_array_equal(codec.encode({"w": np.array([1, 2], BIG)}), [[1, 2]])
    np.testing.assert_array_equal(codec.encode({"w": np.array([1, 2], LONG)}), [[1, 2]])
    with pytest.raises(ValueError, match=r"expected real weights at .*'w'"):
        codec.encode({"w": np.array([1, 2j])})
    ends = np.array([[3.0, 4.0], [3.0, 4.0]])
    for name in RIGHT:
        scale = standard_scale({"w": ends.astype(typed(name))}, {"w": np.zeros(2, typed(name))})
        np.testing.assert_allclose(scale["w"], np.sqrt(12.5), rtol=1e-3)
    with pytest.raises(ValueError, match="expected real weights"):
        standard_scale({"w": ends + 1j}, {"w": np.zeros(2)})


def bowl(params, data, key):
    return sum(jnp.sum(jnp.abs(x) ** 2) for x in jax.tree.leaves(params))


def test_params_of_a_rollout():
    family = TaskFamily(None, None, bowl, None, None)
    run = functools.partial(rollout, family, optax.sgd(0.1), None, key=jax.random.key(0))
    for name in ("float16", "bfloat16", "complex64"):
        params = {"w": np.ones(2).astype(typed(name))}
        states = run(params=params, num_steps=2).states["w"]
        assert states.dtype == typed(name)
        np.testing.assert_allclose(np.complex64(states[-1]), 0.64, rtol=1e-2)
    with pytest.raises(ValueError, match=r"rollout: .*'w'.* byte order"):
        run(params={"w": np.ones(2, BIG)}, num_steps=2)
    with pytest.raises(ValueError, match=r"rollout: .*'w'.* 64 bits"):
        run(params={"w": np.ones(2, LONG)}, num_steps=2)
    with pytest.raises(ValueError, match="floating-point or complex params"):
        run(params={"w": np.arange(2)}, num_steps=2)


@pytest.mark.parametrize("make", [optimizers.sam, lambda o: optimizers.hub(o, o), None])
def test_parameters_and_gradients_of_optimizers(make):
    optimizer = (
        optimizers.pretrained_optimizer("small", 5) if make is None else make(optax.sgd(0.1))
    )
    params = {"w": np.ones(2, np.float32)}
    with pytest.raises(ValueError, match=r"expected .*w.* in the byte order"):
        optimizer.init({"w": np.ones(2, BIG)})
    with pytest.raises(ValueError, match=r"expected .*w.* of 64 bits at most"):
        optimizer.init({"w": np.ones(2, LONG)})
    with pytest.raises(ValueError, match=r"expected floating-point .*got int"):
        optimizer.init({"w": np.arange(2)})
    state = optimizer.init(params)
    update = functools.partial(optimizer.update, state=state, params=params, value=1.0)
    if make is optimizers.sam:
        update = functools.partial(update, grad_fn=lambda p, _: p)
    for gradient in (np.ones(2, complex), np.ones(2, int)):
        with pytest.raises(
            ValueError, match=r"gradient at .* is of type .*, its parameter of float32"
        ):
            update({"w": gradient})
    with pytest.raises(ValueError, match="the gradient at w in the byte order"):
        update({"w": np.ones(2, BIG)})
