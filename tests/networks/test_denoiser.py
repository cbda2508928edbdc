"""Symmetries and sizes of the denoisers, and ISTA as the start of the one for LASSO."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from lohp_jax.networks.denoiser import (
    Condition,
    DenoiserConfig,
    make_network,
    prepare_lasso,
    product_pairs,
    soft_threshold,
)

CONFIG = DenoiserConfig("lasso", width=8, depth=3)
LEVEL = jnp.float32(1.5)
ALPHA = (1 + np.exp(-1.5)) ** -0.5


def lasso(rows=5, columns=10, seed=0):
    """A LASSO, and what else a denoiser sees of it: frame, z and one vector."""
    rng = np.random.default_rng(seed)
    problem = {"A": rng.normal(size=(rows, columns)), "b": rng.normal(size=rows), "penalty": 0.3}
    problem = {name: jnp.float32(value) for name, value in problem.items()}
    centre, scale = rng.normal(size=columns), rng.uniform(0.5, 2, size=columns)
    return (problem, *(jnp.float32(x) for x in (centre, scale, *rng.normal(size=(2, columns)))))


def apply(params, problem, centre, scale, z, vector, known=1.0):
    network, known = make_network(CONFIG), jnp.float32(known)
    prepared = network.prepare(problem, centre, scale)
    condition = Condition(prepared, known, problem["b"], vector[:, None], jnp.stack([known]))
    return network.apply(params, z, LEVEL, condition)


@pytest.fixture(scope="module")
def params():
    """Random weights in every layer."""
    network, (problem, centre, scale, z, vector) = make_network(CONFIG), lasso()
    prepared = network.prepare(problem, centre, scale)
    known = jnp.ones(())
    condition = Condition(prepared, known, problem["b"], vector[:, None], jnp.ones(1))
    shapes = jax.eval_shape(network.init, jax.random.key(0), z, LEVEL, condition)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.float32(rng.normal(0, 0.3, size=p.shape)), shapes)


compiled = jax.jit(apply)


def test_permuting_the_columns_permutes_the_output(params):
    problem, *rest = lasso()
    out = compiled(params, problem, *rest)
    order = np.random.default_rng(1).permutation(10)
    permuted = problem | {"A": problem["A"][:, order]}
    again = compiled(params, permuted, *(x[order] for x in rest))
    assert np.ptp(out) > 0.1
    np.testing.assert_allclose(again, out[order], rtol=1e-3, atol=1e-4)


def test_rotating_the_rows_changes_nothing(params):
    problem, *rest = lasso()
    rotation = jnp.float32(scipy.stats.ortho_group.rvs(5, random_state=2))
    rotated = problem | {"A": rotation @ problem["A"], "b": rotation @ problem["b"]}
    expected = compiled(params, problem, *rest)
    np.testing.assert_allclose(compiled(params, rotated, *rest), expected, rtol=1e-3, atol=1e-4)


def test_one_set_of_weights_serves_all_sizes_without_a_square_matrix(params):
    problem, *rest = lasso(7, 31)
    program = jax.make_jaxpr(apply)(params, problem, *rest)
    assert program.out_avals[0].shape == (31,)
    assert "31,31]" not in str(program) and "7,31]" in str(program)


def test_product_pairs_are_those_of_the_program(params):
    """Matrix-vector products in the traced program, those of the two loops times their length."""
    problem, centre, scale, z, vector = lasso()
    network = make_network(CONFIG)

    def count(jaxpr, times=1):
        products = 0
        for equation in jaxpr.eqns:
            shapes = [v.aval.shape for v in equation.invars]
            if equation.primitive.name == "dot_general" and shapes[0] in ((5, 10), (10, 5)):
                products += times
            inner = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
            for nested in jax.extend.core.jaxprs_in_params(equation.params):
                products += count(nested, times * inner)
        return products

    prepared = network.prepare(problem, centre, scale)
    condition = Condition(prepared, jnp.ones(()), jnp.zeros(0), vector[:, None], jnp.ones(1))
    once = count(jax.make_jaxpr(network.prepare)(problem, centre, scale).jaxpr)
    each = count(jax.make_jaxpr(network.apply)(params, z, LEVEL, condition).jaxpr)
    assert each == 2 * CONFIG.depth
    assert once <= 2 * product_pairs(CONFIG, 0) <= once + 1
    assert product_pairs(CONFIG, 7) == product_pairs(CONFIG, 0) + 7 * CONFIG.depth


def test_a_hidden_problem_has_no_effect(params):
    problem, *rest = lasso()
    other, *_ = lasso(seed=3)
    assert np.abs(compiled(params, problem, *rest) - compiled(params, other, *rest)).max() > 0.1
    hidden = {k: v for k, v in other.items() if k != "b"} | {"b": problem["b"]}
    expected = compiled(params, problem, *rest, 0.0)
    np.testing.assert_allclose(compiled(params, hidden, *rest, 0.0), expected, rtol=1e-4)


def test_training_starts_from_ista():
    """In float64, in x itself: three steps of length 1 / L from where α z is."""
    problem, centre, scale, z, vector = lasso()
    network = make_network(CONFIG)
    prepared = network.prepare(problem, centre, scale)
    condition = Condition(prepared, jnp.ones(()), jnp.zeros(0), vector[:, None], jnp.ones(1))
    start = jax.jit(network.init)(jax.random.key(0), z, LEVEL, condition)
    out = compiled(start, problem, centre, scale, z, vector)

    a, b, c, s = (np.float64(x) for x in (problem["A"], problem["b"], centre, scale))
    curvature = ((a * s).sum() / np.float64(prepared["B"]).sum()) ** 2
    exact = np.linalg.eigvalsh((a * s).T @ (a * s))[-1]
    assert 0.95 * exact < curvature < 1.06 * exact
    y = ALPHA * np.float64(z)
    for _ in range(CONFIG.depth):
        u = y - s * (a.T @ (a @ (c + s * y) - b)) / curvature + c / s
        y = np.sign(u) * np.maximum(np.abs(u) - 0.3 * s / curvature, 0) - c / s
    np.testing.assert_allclose(out, y, rtol=1e-3, atol=1e-4)


def test_preparing_keeps_the_objective():
    """Up to its unit L: the same function of y."""
    problem, centre, scale, z, vector = lasso()
    prepared = {k: np.float64(v) for k, v in prepare_lasso(problem, centre, scale).items()}

    def before(y):
        x = np.float64(centre) + np.float64(scale) * y
        residual = np.float64(problem["A"]) @ x - np.float64(problem["b"])
        return residual @ residual / 2 + 0.3 * np.abs(x).sum()

    def after(y):
        smooth = ((prepared["B"] @ y) ** 2).sum() / 2 - prepared["target"] @ y
        return smooth + (prepared["t"] * np.abs(y + prepared["o"])).sum()

    points = [np.float64(z), np.float64(vector), np.ones(10)]
    zero = np.zeros(10)
    ratios = [(before(y) - before(zero)) / (after(y) - after(zero)) for y in points]
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-4)
    np.testing.assert_allclose(prepared["diagonal"], (prepared["B"] ** 2).sum(axis=0), rtol=1e-4)


def test_soft_threshold_equals_its_definition():
    x = np.linspace(-3, 3, 13, dtype=np.float32)
    grid = np.linspace(-4, 4, 80_001)
    cost = 1.1 * np.abs(grid) + (grid - x[:, None]) ** 2 / 2
    actual = soft_threshold(jnp.asarray(x), jnp.float32(1.1))
    np.testing.assert_allclose(actual, grid[cost.argmin(axis=1)], atol=2e-4)


@pytest.mark.parametrize(
    "kind, size", [("mlp", 3), pytest.param("unet", 9, marks=pytest.mark.slow)]
)
def test_dense_networks_start_at_zero_and_everything_reaches_the_output(kind, size):
    network = make_network(DenoiserConfig(kind, width=8, depth=2, channels=4))
    rng = np.random.default_rng(0)
    z, vectors = (jnp.float32(rng.normal(size=s)) for s in ((size,), (size, 2)))
    condition = Condition((), jnp.ones(()), jnp.ones(3), vectors, jnp.ones(4))
    quickly = {"xla_backend_optimization_level": 0}
    init = jax.jit(network.init, compiler_options=quickly)
    params = init(jax.random.key(0), z, LEVEL, condition)
    output = next(name for name in params if name.endswith("output"))
    assert not params[output]["w"].any() and not params[output]["b"].any()
    filled = jax.tree.map(lambda p: jnp.float32(rng.normal(0, 0.3, size=p.shape)), params)

    @jax.jit
    def slopes(z, level, condition):
        def one(*seen):
            return network.apply(filled, *seen) @ jnp.arange(1.0, size + 1)

        return jax.grad(one, (0, 1, 2))(z, level, condition)

    of_z, of_level, of_condition = slopes(z, LEVEL, condition)
    for slope in (of_z, of_level, *of_condition[2:]):
        assert (np.abs(slope) > 0).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "unett"}, r"kind must be one of .* did you mean 'unet'\?"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
    ],
)
def test_bad_sizes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DenoiserConfig(**options)
