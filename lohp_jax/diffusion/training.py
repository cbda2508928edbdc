"""Training of Diff-L2O: from a family of problems to a generator of their solutions."""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lohp_jax.diffusion import guidance as guiding
from lohp_jax.diffusion.config import DiffusionConfig
from lohp_jax.diffusion.denoiser import make_network
from lohp_jax.diffusion.generator import (
    diffusion_generator,
    frame_of,
    make_observer,
    regression_config,
)
from lohp_jax.diffusion.loss import REACH, make_loss
from lohp_jax.diffusion.oracle import Solved, solved
from lohp_jax.types import Generator, ProblemFamily, PyTree

RESIDUALS = 256  # problems on which the residual of a warm start is measured


class Progress(NamedTuple):
    """What a caller may show after each chunk.

    Attributes:
      method: what is trained, "warm_start" or "diffusion".
      step: updates so far.
      updates: updates in all.
      metrics: means over the chunk, as plain numbers.
      updates_per_second: of the chunk, with the compilation that the first one waits for.
    """

    method: str
    step: int
    updates: int
    metrics: dict[str, float]
    updates_per_second: float


class TrainState(NamedTuple):
    """Everything that an update changes.

    Attributes:
      params: `{"network", "gates"}`.
      ema: their running mean.
      opt_state: of the optimizer.
      step: int32 scalar, updates so far.
    """

    params: PyTree
    ema: PyTree
    opt_state: optax.OptState
    step: jax.Array


def train_diffusion(
    family: ProblemFamily,
    config: DiffusionConfig,
    key: jax.Array,
    *,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Generator:
    """Trains a denoiser on problems of a family, solved by the family's own solver.

    Args:
      family: the problems.
      config: settings.
      key: randomness of problems, start and training; the result depends on it alone.
      on_progress: called after each chunk of `config.log_every` updates.

    Returns: a `Generator` of points x `[n]`; see `diffusion_generator`.

    Raises: FloatingPointError for a loss or gradient that is not finite; ValueError for a family that
      lacks a function which training needs.
    """
    _check_family(family)
    pool_key, more_key, warm_key, train_key = jax.random.split(key, 4)
    solve = jax.jit(functools.partial(solved, family, config.oracle))
    pool = solve(jax.random.split(pool_key, config.pool)) if config.pool else None
    warm = None
    if config.warm_start:
        regression = regression_config(config)
        warm = _train("warm_start", family, regression, None, pool, warm_key, on_progress)
        some = solve(jax.random.split(more_key, RESIDUALS))
        warm["scale"] = jax.jit(functools.partial(_residual_size, family, config))(warm, some)
    params = _train("diffusion", family, config, warm, pool, train_key, on_progress)
    return diffusion_generator(family, config, params | {"warm": warm})


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


def _train(method, family, config, warm, pool, key, on_progress) -> PyTree:
    """Trains one denoiser, or the regression of a warm start; returns its `{"network", "gates"}`."""
    init_key, key = jax.random.split(key)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        max(1, config.updates // 20),
        config.updates,
        config.learning_rate / 100,
    )
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.adam(schedule))
    loss_fn = make_loss(family, config, warm, regression=method == "warm_start")

    def init(key):
        params = initial_params(family, config, key)
        return TrainState(params, params, optimizer.init(params), jnp.zeros((), jnp.int32))

    def update(pool, state, _):
        batch_key, loss_key = jax.random.split(jax.random.fold_in(key, state.step))
        items = _draw(family, config, pool, batch_key)
        keys = jax.random.split(loss_key, config.batch_size)

        def mean_loss(params):
            losses, metrics = jax.vmap(loss_fn, (None, 0, 0))(params, items, keys)
            return jnp.mean(losses), jax.tree.map(jnp.mean, metrics)

        grads, metrics = jax.grad(mean_loss, has_aux=True)(state.params)
        changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, changes)
        decay = jnp.minimum(config.ema, (1.0 + state.step) / (10.0 + state.step))
        ema = optax.incremental_update(params, state.ema, 1.0 - decay)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        return TrainState(params, ema, opt_state, state.step + 1), metrics

    @functools.partial(jax.jit, static_argnames="count")
    def run_chunk(state, pool, count):
        return jax.lax.scan(functools.partial(update, pool), state, length=count)

    quickly = {"xla_backend_optimization_level": 0}  # runs once: halves its compilation
    state = jax.jit(init, compiler_options=quickly)(init_key)
    while (step := int(state.step)) < config.updates:
        begun = time.perf_counter()
        count = min(config.log_every, config.updates - step)
        state, values = jax.block_until_ready(run_chunk(state, pool, count))
        rate = count / (time.perf_counter() - begun)
        means = {name: float(value.mean()) for name, value in jax.device_get(values).items()}
        _check_finite(method, values, step)
        on_progress(Progress(method, step + count, config.updates, means, rate))
    return state.ema


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


def _draw(family, config, pool, key) -> Solved:
    """A batch from the pool, or of new problems."""
    if pool is None:
        return solved(family, config.oracle, jax.random.split(key, config.batch_size))
    rows = jax.random.randint(key, (config.batch_size,), 0, len(pool.key))
    return jax.tree.map(lambda leaf: leaf[rows], pool)


def _check_finite(method: str, values: dict, step: int) -> None:
    bad = ~(np.isfinite(values["loss"]) & np.isfinite(values["gradient_norm"]))
    if bad.any():
        raise FloatingPointError(
            f"{method}: loss or gradient were not finite at update {step + bad.argmax() + 1}; "
            "lower learning_rate or clip_norm, and see that the family's objective, its label solver "
            "and its frame are finite on its own problems."
        )


def _check_family(family: ProblemFamily) -> None:
    missing = [n for n in ("objective", "start", "solve", "frame") if getattr(family, n) is None]
    if missing:
        raise ValueError(
            f"train_diffusion: expected a family with {', '.join(missing)}, got {family.name!r} "
            "without; give it these functions."
        )
