"""From the parameters of a problem straight to its solution, without noise and without gradients."""

import functools

import jax
import jax.numpy as jnp

from lohp_jax.baselines.fitting import RUNS_ONCE, OnProgress, fit, silent
from lohp_jax.diffusion.config import DiffusionConfig
from lohp_jax.diffusion.generator import frame_of, regression_config
from lohp_jax.diffusion.loss import make_loss
from lohp_jax.diffusion.oracle import solved
from lohp_jax.diffusion.training import initial_params
from lohp_jax.types import Generator, ProblemFamily


def train_regression(
    family: ProblemFamily,
    config: DiffusionConfig,
    key: jax.Array,
    *,
    on_progress: OnProgress = silent,
) -> Generator:
    """Trains the regression of Diff-L2O's warm start, alone.

    Network and loss are those of the warm start, α of the config included: 1 trains on labels, 0 on
    the objective.

    Args:
      family: the problems.
      config: of a diffusion; what concerns noise and guidance does not matter. `pool` >= 1.
      key: randomness of problems, start and training; the result depends on it alone.
      on_progress: told of each chunk.

    Returns: a `Generator` of points x `[n]`, which has no randomness.

    Raises: ValueError for `pool=0`; FloatingPointError if training diverges.
    """
    if config.pool < 1:
        raise ValueError(f"regression: pool must be at least 1, got {config.pool}.")
    config = regression_config(config)
    pool_key, init_key, key = jax.random.split(key, 3)
    pool = jax.jit(lambda keys: solved(family, config.oracle, keys))(
        jax.random.split(pool_key, config.pool)
    )
    problem_loss = make_loss(family, config, regression=True)

    def loss_fn(params, carry, step, key):
        row_key, loss_key = jax.random.split(key)
        rows = jax.random.randint(row_key, (config.batch_size,), 0, config.pool)
        items = jax.tree.map(lambda leaf: leaf[rows], pool)
        keys = jax.random.split(loss_key, config.batch_size)
        losses, _ = jax.vmap(problem_loss, (None, 0, 0))(params, items, keys)
        return jnp.mean(losses), carry

    params = fit(
        "regression",
        loss_fn,
        jax.jit(functools.partial(initial_params, family, config), compiler_options=RUNS_ONCE)(
            init_key
        ),
        (),
        key,
        updates=config.updates,
        learning_rate=config.learning_rate,
        log_every=config.log_every,
        on_progress=on_progress,
    )

    def apply(params, context, key=None, *, temperature=0.0, num_steps=None, guidance=0.0):
        return frame_of(family, config, {**params, "scale": 1.0}, context)[0]

    return Generator(apply, params, family.name, config, family.check)
