import dataclasses

import jax
import jax.numpy as jnp
import pytest

from lohp_jax.diffusion.config import DiffusionConfig
from lohp_jax.learned_solvers.regression import train_regression
from lohp_jax.networks.denoiser import DenoiserConfig

CONFIG = DiffusionConfig(
    network=DenoiserConfig(width=32, depth=1),
    pool=512,
    batch_size=64,
    updates=200,
    learning_rate=1e-2,
)
KEY = jax.random.key(0)


@pytest.mark.parametrize(
    "alpha",
    [pytest.param(0.0, id="objective", marks=pytest.mark.slow), pytest.param(1.0, id="labels")],
)
def test_regression_solves_new_problems_without_a_key(small_quadratic, alpha):
    family, config = small_quadratic, dataclasses.replace(CONFIG, alpha=alpha)
    generator = train_regression(family, config, KEY)
    problems = jax.vmap(lambda key: family.sample(key, "held_out"))(jax.random.split(KEY, 64))

    @jax.jit
    @jax.vmap
    def values(problem):
        points = generator.apply(generator.params, problem), family.start(problem)
        return jnp.stack([family.objective(x, problem) for x in points])

    reached, started = values(problems).mean(axis=0)
    assert 0 < reached < 0.05 * started
    problem = family.sample(KEY)
    generator.check(problem)
    with pytest.raises(ValueError, match="quadratic: expected the A that all training problems sh"):
        generator.check(problem | {"A": 2 * problem["A"]})
