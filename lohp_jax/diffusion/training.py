"""Training of Diff-L2O: from a family of problems to a generator of their solutions."""

import functools

import jax
import jax.numpy as jnp
import optax

from lohp_jax.diffusion import guidance as guiding
from lohp_jax.diffusion.config import DiffusionConfig
from lohp_jax.diffusion.generator import (
    diffusion_generator,
    frame_of,
    make_observer,
    regression_config,
)
from lohp_jax.diffusion.loss import REACH, make_loss
from lohp_jax.diffusion.oracle import Solved, certify, solved
from lohp_jax.networks.denoiser import make_network
from lohp_jax.training.distributed import Strategy
from lohp_jax.training.engine import (
    OnProgress,
    Saving,
    Training,
    each_step,
    silent,
    step_keys,
    train,
)
from lohp_jax.training.gradient import FitState, first_state, make_update, scheduled_adam
from lohp_jax.types import Generator, ProblemFamily, PyTree

RESIDUALS = 256  # problems on which the residual of a warm start is measured
WARM_START, DIFFUSION = "warm_start", "diffusion"
_ADVICE = (
    "Lower the learning rate, and see that the family's objective, its label solver and its frame are "
    "finite on its own problems."
)


def train_diffusion(
    family: ProblemFamily,
    config: DiffusionConfig,
    key: jax.Array,
    *,
    strategy: Strategy = "jit",
    saving: Saving | None = None,
    on_progress: OnProgress = silent,
) -> Generator:
    """Trains a denoiser on problems of a family, solved by the family's own solver.

    Args:
      family: the problems.
      config: settings.
      key: randomness of problems, start and training; the result depends on it alone.
      strategy: of `compile_update`; the result is the same up to rounding.
      saving: where checkpoints and metrics of "warm_start" and "diffusion" go, and where a training that
        was interrupted goes on; problems are solved anew. None trains in memory only.
      on_progress: called after each chunk of `config.log_every` updates.

    Returns: a `Generator` of points x `[n]`; see `diffusion_generator`.

    Raises: ValueError for a family that lacks a function which training needs; what `engine.train`
      raises.
    """
    options = {"strategy": strategy, "saving": saving, "on_progress": on_progress}

    def fit_one(*setting):
        return train(denoiser_training(family, *setting), **options).ema

    return diffusion_generator(family, config, _train(family, config, key, fit_one))


def diffusion_params(
    family: ProblemFamily, config: DiffusionConfig, key: jax.Array, *, pool: Solved | None = None
) -> PyTree:
    """`train_diffusion` as one pure function, for `jax.vmap` over keys: an ensemble, or an ablation.

    Nothing is reported on the way and nothing is checked; where training diverges, params are NaN.

    Args:
      family: the problems.
      config: settings.
      key: as in `train_diffusion`, which gives the same params up to rounding.
      pool: of `solved_pool`, for several trainings on the same problems; None solves its own.

    Returns: params of `diffusion_generator`.
    """
    return _train(family, config, key, functools.partial(_scan_denoiser, family), pool)


def _train(family, config, key, fit_one, pool=None) -> PyTree:
    """Params of a generator, by `fit_one(method, config, warm, pool, key)`."""
    pool_key, more_key, warm_key, train_key = jax.random.split(key, 4)
    pool = solved_pool(family, config, pool_key) if pool is None else pool
    warm = None
    if config.warm_start:
        warm = fit_one(WARM_START, regression_config(config), None, pool, warm_key)
        some = solved_pool(family, config, more_key, RESIDUALS)
        size = jax.jit(functools.partial(_residual_size, family, config))(warm, some)
        warm = warm | {"scale": size}
    return fit_one(DIFFUSION, config, warm, pool, train_key) | {"warm": warm}


def _scan_denoiser(family, method, config, warm, pool, key) -> PyTree:
    """The training of `denoiser_training` in one scan."""
    start_key, key = jax.random.split(key)
    update = _make_update(method, family, config)

    def body(state, _):
        keys = step_keys(key, state.step, config.batch_size)
        return update(state, keys, pool, warm)[0], None

    start = initial_state(family, config, start_key)
    return jax.lax.scan(body, start, length=config.updates)[0].ema


def solved_pool(
    family: ProblemFamily, config: DiffusionConfig, key: jax.Array, count: int | None = None
) -> Solved | None:
    """`count` problems, or `config.pool`, with their labels; None if there are to be none.

    Labels that float32 does not certify are solved again in float64 on the host; not so inside
    `jax.jit` or `jax.vmap`, where there is one precision.

    Warns: UserWarning, if labels are left that nothing certifies.

    Raises: ValueError for a family that lacks a function which training needs.
    """
    _check_family(family)
    count = config.pool if count is None else count
    solve = jax.jit(functools.partial(solved, family, config.oracle))
    if not count:
        return None
    pool = solve(jax.random.split(key, count))
    return pool if isinstance(key, jax.core.Tracer) else certify(family, pool)


def denoiser_training(
    family: ProblemFamily,
    method: str,
    config: DiffusionConfig,
    warm: PyTree | None,
    pool: Solved | None,
    key: jax.Array,
) -> Training:
    """The training of one denoiser, or of the regression of a warm start; `ema` of its state is trained.

    Args:
      family: the problems.
      method: DIFFUSION; anything else is a regression.
      config: settings; `regression_config` for a regression.
      warm: of the warm start; None without one.
      pool: of `solved_pool`.
      key: randomness of start and updates.
    """
    start_key, key = jax.random.split(key)
    return Training(
        method,
        functools.partial(initial_state, family, config),
        _make_update(method, family, config),
        each_step(lambda step: step_keys(key, step, config.batch_size)),
        config.updates,
        start_from=(start_key,),
        replicated=(pool, warm),
        log_every=config.log_every,
        advice=_ADVICE,
    )


def initial_state(family: ProblemFamily, config: DiffusionConfig, key: jax.Array) -> FitState:
    """The state before the first update."""
    return first_state(initial_params(family, config, key), _optimizer(config))


def _make_update(method, family, config):
    """`(state, keys, pool, warm, axis_name=None) -> (state, metrics)`, a key for each example."""

    def loss_fn(params, carry, keys, step, pool, warm):
        item_keys, keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        items = _draw(family, config, pool, item_keys)
        problem_loss = make_loss(family, config, warm, regression=method != DIFFUSION)
        losses, metrics = jax.vmap(problem_loss, (None, 0, 0))(params, items, keys)
        return jnp.mean(losses), (carry, jax.tree.map(jnp.mean, metrics))

    return make_update(loss_fn, _optimizer(config), config.ema)


def _optimizer(config: DiffusionConfig) -> optax.GradientTransformation:
    return scheduled_adam(
        config.updates,
        config.learning_rate,
        warmup=max(1, config.updates // 20),
        clip_norm=config.clip_norm,
    )


def initial_params(family: ProblemFamily, config: DiffusionConfig, key: jax.Array) -> PyTree:
    """`{"network", "gates"}` before training."""
    problem = family.sample(key, "train")
    gates = guiding.gate_start(config.guidance)
    frame = family.frame(problem)
    weights = guiding.resolve_weights(config.guidance, None)
    see = make_observer(family, config, gates, problem, frame, weights)
    z, level = jnp.zeros_like(frame[0]), jnp.zeros(())
    condition = see(z, level, z, key)
    return {"network": make_network(config.network).init(key, z, level, condition), "gates": gates}


def _residual_size(
    family: ProblemFamily, config: DiffusionConfig, warm: PyTree, items: Solved
) -> jax.Array:
    """Root mean square, in the family's frame, of what the regression leaves of the solutions."""

    def left(item):
        problem = family.sample(item.key, "train")
        mean, scale = frame_of(family, config, {**warm, "scale": jnp.float32(1.0)}, problem)
        return (item.solution - mean) / scale

    residual = jax.vmap(left)(items)
    return jnp.sqrt(jnp.mean(residual**2, where=jnp.abs(residual) <= REACH)) + 1e-6


def _draw(
    family: ProblemFamily, config: DiffusionConfig, pool: Solved | None, keys: jax.Array
) -> Solved:
    """Problems of the pool, or new ones, one for each key."""
    if pool is None:
        return solved(family, config.oracle, keys)
    rows = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(pool.key)))(keys)
    return jax.tree.map(lambda leaf: leaf[rows], pool)


def _check_family(family: ProblemFamily) -> None:
    missing = [n for n in ("objective", "start", "solve", "frame") if getattr(family, n) is None]
    if missing:
        raise ValueError(
            f"train_diffusion: expected a family with {', '.join(missing)}, got {family.name!r} "
            "without; give it these functions."
        )
