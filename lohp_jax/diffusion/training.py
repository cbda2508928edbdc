"""Training of Diff-L2O: from a family of problems to a generator of their solutions."""

import functools
from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import optax

from lohp_jax.diffusion import guidance as guiding
from lohp_jax.diffusion.config import DiffusionConfig
from lohp_jax.diffusion.fitting import (
    FitState,
    OnProgress,
    OnState,
    first_state,
    fit,
    make_optimizer,
    make_update,
    silent,
)
from lohp_jax.diffusion.generator import (
    diffusion_generator,
    frame_of,
    make_observer,
    regression_config,
)
from lohp_jax.diffusion.loss import REACH, make_loss
from lohp_jax.diffusion.oracle import Solved, solved
from lohp_jax.networks.denoiser import make_network
from lohp_jax.types import Generator, ProblemFamily, PyTree

RESIDUALS = 256  # problems on which the residual of a warm start is measured
WARM_START, DIFFUSION = "warm_start", "diffusion"


def train_diffusion(
    family: ProblemFamily,
    config: DiffusionConfig,
    key: jax.Array,
    *,
    on_progress: OnProgress = silent,
    states: Mapping[str, FitState | None] = MappingProxyType({}),
    on_state: OnState = silent,
) -> Generator:
    """Trains a denoiser on problems of a family, solved by the family's own solver.

    Args:
      family: the problems.
      config: settings.
      key: randomness of problems, start and training; the result depends on it alone.
      on_progress: called after each chunk of `config.log_every` updates.
      states: where to go on, by method; what `on_state` was told last, under the same config and key.
        Problems are solved anew.
      on_state: called with the method, "warm_start" or "diffusion", and its state after each chunk.

    Returns: a `Generator` of points x `[n]`; see `diffusion_generator`.

    Raises: FloatingPointError for a loss or gradient that is not finite; ValueError for a family that
      lacks a function which training needs.
    """

    def fit_one(method, config, warm, pool, key):
        told = {"on_progress": on_progress, "on_state": on_state, "state": states.get(method)}
        return fit_denoiser(method, family, config, warm, pool, key, **told)

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
    """`fit_denoiser` in one scan."""
    optimizer = _optimizer(config)
    update = make_update(_batch_loss(method, family, config, warm), optimizer, config.ema)
    state, key = first_state(functools.partial(_start, family, config), optimizer, key)
    scanned = jax.lax.scan(
        lambda s, _: (update(s, key, pool)[0], None), state, length=config.updates
    )
    return scanned[0].ema


def solved_pool(
    family: ProblemFamily, config: DiffusionConfig, key: jax.Array, count: int | None = None
) -> Solved | None:
    """`count` problems, or `config.pool`, with their labels; None if there are to be none.

    Raises: ValueError for a family that lacks a function which training needs.
    """
    _check_family(family)
    count = config.pool if count is None else count
    solve = jax.jit(functools.partial(solved, family, config.oracle))
    return solve(jax.random.split(key, count)) if count else None


def fit_denoiser(
    method: str,
    family: ProblemFamily,
    config: DiffusionConfig,
    warm: PyTree | None,
    pool: Solved | None,
    key: jax.Array,
    **options,
) -> PyTree:
    """Trains one denoiser, or the regression of a warm start.

    Args:
      method: DIFFUSION; anything else is a regression.
      family: the problems.
      config: settings; `regression_config` for a regression.
      warm: of the warm start; None without one.
      pool: of `solved_pool`.
      key: randomness of start and updates.
      **options: of `fit`.

    Returns: `{"network", "gates"}`.
    """
    return fit(
        method,
        _batch_loss(method, family, config, warm),
        functools.partial(_start, family, config),
        key,
        updates=config.updates,
        optimizer=_optimizer(config),
        ema=config.ema,
        data=pool,
        log_every=config.log_every,
        **options,
    )


def initial_state(
    family: ProblemFamily, config: DiffusionConfig, method: str, key: jax.Array
) -> FitState:
    """The state of a method before its first update; its shapes are those of every later one."""
    config = config if method == DIFFUSION else regression_config(config)
    return first_state(functools.partial(_start, family, config), _optimizer(config), key)[0]


def _batch_loss(method, family, config, warm):
    """`(params, carry, pool, step, key) -> (loss, (carry, metrics))`, the mean over a batch."""
    problem_loss = make_loss(family, config, warm, regression=method != DIFFUSION)

    def loss_fn(params, carry, pool, step, key):
        batch_key, loss_key = jax.random.split(key)
        items = _draw(family, config, pool, batch_key)
        keys = jax.random.split(loss_key, config.batch_size)
        losses, metrics = jax.vmap(problem_loss, (None, 0, 0))(params, items, keys)
        return jnp.mean(losses), (carry, jax.tree.map(jnp.mean, metrics))

    return loss_fn


def _start(family, config, key):
    return initial_params(family, config, key), ()


def _optimizer(config: DiffusionConfig) -> optax.GradientTransformation:
    return make_optimizer(
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


def _draw(family, config, pool, key) -> Solved:
    """A batch from the pool, or of new problems."""
    if pool is None:
        return solved(family, config.oracle, jax.random.split(key, config.batch_size))
    rows = jax.random.randint(key, (config.batch_size,), 0, len(pool.key))
    return jax.tree.map(lambda leaf: leaf[rows], pool)


def _check_family(family: ProblemFamily) -> None:
    missing = [n for n in ("objective", "start", "solve", "frame") if getattr(family, n) is None]
    if missing:
        raise ValueError(
            f"train_diffusion: expected a family with {', '.join(missing)}, got {family.name!r} "
            "without; give it these functions."
        )
