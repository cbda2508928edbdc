"""Generators refuse problems that their network was not made for, and prepare each problem once."""

import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.diffusion.config import DiffusionConfig
from lohp_jax.diffusion.generator import diffusion_generator, problem_check, regression_config
from lohp_jax.diffusion.training import initial_params
from lohp_jax.networks.denoiser import DenoiserConfig, product_pairs
from lohp_jax.problems import make_problem

KEY = jax.random.key(0)
DENSE, UNROLLED = (DiffusionConfig(network=DenoiserConfig(kind, 8, 2)) for kind in ("mlp", "lasso"))
FIXED = make_problem("lasso_fixed_5x10")


@pytest.fixture(scope="module")
def dense_check():
    return problem_check(FIXED, DENSE)


@pytest.fixture(scope="module")
def problem():
    return jax.device_get(FIXED.sample(KEY, "held_out"))


def test_problems_of_the_family_pass(dense_check, problem):
    """Whatever else they hold. Under `jit`, where they are constants, others are refused as well."""
    assert dense_check(problem) is None
    assert dense_check({"also": np.zeros(3)} | problem) is None
    with pytest.raises(ValueError, match="the penalty that all"):
        jax.jit(lambda: dense_check(problem | {"penalty": 2 * problem["penalty"]}))()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda p: p | {"A": p["A"][:, ::-1]},
            "the A that all training problems share, .* kind 'l",
        ),
        (lambda p: p | {"penalty": 2 * p["penalty"]}, "the penalty that all .* does not see it"),
        (lambda p: p | {"A": p["A"][:, :8]}, r"A of shape \[5, 10\], as in training, got \[5, 8\]"),
    ],
)
def test_what_a_dense_network_does_not_see_is_refused(dense_check, problem, change, message):
    changed = change(problem)
    with pytest.raises(ValueError, match=f"lasso_fixed_5x10: expected {message}"):
        dense_check(changed)
    problem_check(FIXED, UNROLLED)(changed)


def test_a_missing_array_is_named(quadratic):
    with pytest.raises(ValueError, match=r"expected b of shape \[2\], as in training, got \['c'\]"):
        problem_check(quadratic, DENSE)({"c": np.zeros(2)})


@pytest.mark.parametrize("warm_start", [False, True])
def test_all_samples_share_the_preparation_and_the_warm_start(warm_start):
    """By the products with A in the traced program."""
    family = make_problem("lasso_5x10")
    config = dataclasses.replace(UNROLLED, warm_start=warm_start, num_steps=3)

    def params():
        warm = None
        if warm_start:
            warm = initial_params(family, regression_config(config), KEY) | {"scale": jnp.ones(())}
        return initial_params(family, config, KEY) | {"warm": warm}

    def propose(params, problem, keys):
        generator = diffusion_generator(family, config, params)
        return jax.vmap(lambda key: generator.apply(params, problem, key))(keys)

    def num_products(equation):
        """Vectors that a product with A takes at once."""
        contracted, _ = equation.params["dimension_numbers"]
        shapes = [v.aval.shape for v in equation.invars]
        for shape, other, (axis,) in zip(shapes, shapes[::-1], contracted[::-1], strict=True):
            if shape in ((5, 10), (10, 5)):
                return np.prod(other) / other[axis]
        return 0

    def count(jaxpr, times=1):
        products = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                products += times * num_products(equation)
            inner = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
            for nested in jax.extend.core.jaxprs_in_params(equation.params):
                products += count(nested, times * inner)
        return products

    shapes = jax.eval_shape(params), jax.eval_shape(family.sample, KEY), jax.random.split(KEY, 4)
    pairs = product_pairs(config.network, 4 * 3) + warm_start * product_pairs(config.network, 1)
    found = count(jax.make_jaxpr(propose)(*shapes).jaxpr)
    assert 2 * pairs - 1 - warm_start <= found <= 2 * pairs
