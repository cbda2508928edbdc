"""From the parameters of a problem straight to its solution, without noise and without gradients."""

import jax

from lohp_jax.diffusion.config import DiffusionConfig
from lohp_jax.diffusion.generator import frame_of, problem_check, regression_config
from lohp_jax.diffusion.training import denoiser_training, solved_pool
from lohp_jax.training.distributed import Strategy
from lohp_jax.training.engine import OnProgress, silent, train
from lohp_jax.types import Generator, ProblemFamily


def train_regression(
    family: ProblemFamily,
    config: DiffusionConfig,
    key: jax.Array,
    *,
    strategy: Strategy = "jit",
    on_progress: OnProgress = silent,
) -> Generator:
    """Trains the regression of a warm start, which is ours beside Diff-L2O, alone.

    Network and loss are those of the warm start, α of the config included: 1 trains on labels, 0 on
    the objective.

    Args:
      family: the problems.
      config: of a diffusion; what concerns noise and guidance does not matter.
      key: randomness of problems, start and training; the result depends on it alone.
      strategy: of `compile_update`; the result is the same up to rounding.
      on_progress: told of each chunk.

    Returns: a `Generator` of points x `[n]`, which has no randomness.

    Raises: what `train_diffusion` raises.
    """
    config = regression_config(config)
    pool_key, key = jax.random.split(key)
    pool = solved_pool(family, config, pool_key)
    training = denoiser_training(family, "regression", config, None, pool, key)
    params = train(training, strategy=strategy, on_progress=on_progress).ema

    def apply(params, context, key=None, *, temperature=0.0, num_steps=None, guidance=0.0):
        return frame_of(family, config, {**params, "scale": 1.0}, context)[0]

    return Generator(apply, params, family.name, config, problem_check(family, config))
