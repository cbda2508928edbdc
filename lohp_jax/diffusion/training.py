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
from lohp_jax.diffusion.config import DiffusionConfig, OracleConfig
from lohp_jax.diffusion.denoiser import make_network
from lohp_jax.diffusion.generator import (
    diffusion_generator,
    frame_of,
    make_observer,
    regression_config,
)
from lohp_jax.diffusion.sampler import ddim_rule
from lohp_jax.diffusion.schedule import alpha_sigma, from_x0, to_x0
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


class Solved(NamedTuple):
    """A training problem and what is known of it.

    Attributes:
      key: the problem is `family.sample(key, "train")`, drawn anew where it is needed.
      solution: `[n]`.
      value: the objective there.
      start_value: the objective at the family's start.
      iterates: `[S, n]`, of a classic optimizer; None where none are asked for.
    """

    key: jax.Array
    solution: jax.Array
    value: jax.Array
    start_value: jax.Array
    iterates: jax.Array | None


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


def solved(family: ProblemFamily, oracle: OracleConfig, keys: jax.Array) -> Solved:
    """Training problems with their labels, one for each key."""

    def one(key):
        sample_key, solve_key = jax.random.split(key)
        problem = family.sample(sample_key, "train")
        solution, start = family.solve(problem, solve_key), family.start(problem)
        iterates = (
            _iterates(family, problem, oracle.trajectory_steps) if oracle.trajectories else None
        )
        values = (family.objective(x, problem) for x in (solution, start))
        return Solved(sample_key, solution, *values, iterates)

    return jax.lax.map(one, keys, batch_size=RESIDUALS)


def _iterates(family: ProblemFamily, problem: PyTree, num_steps: int) -> jax.Array:
    """`[num_steps, n]` from the start: of proximal gradient descent, or of Adam in the frame."""
    start = family.start(problem)
    if family.composite is not None:
        step = 1.0 / family.composite.lipschitz(problem)

        def descend(x, _):
            moved = x - step * jax.grad(family.composite.smooth)(x, problem)
            moved = family.composite.prox(moved, step, problem)
            return moved, moved

        return jax.lax.scan(descend, start, length=num_steps)[1]
    _, scale = family.frame(problem)
    adam = optax.adam(0.1)

    def adapt(carry, _):
        x, state = carry
        slope = scale * jnp.nan_to_num(jax.grad(family.objective)(x, problem))
        change, state = adam.update(slope, state)
        x = x + scale * change
        return (x, state), x

    return jax.lax.scan(adapt, (start, adam.init(start)), length=num_steps)[1]


def _residual_size(
    family: ProblemFamily, config: DiffusionConfig, warm: PyTree, items: Solved
) -> jax.Array:
    """Root mean square, in the family's frame, of what the regression leaves of the solutions."""

    def squared(item):
        problem = family.sample(item.key, "train")
        mean, scale = frame_of(family, config, {**warm, "scale": jnp.float32(1.0)}, problem)
        return jnp.mean(((item.solution - mean) / scale) ** 2)

    return jnp.sqrt(jnp.mean(jax.vmap(squared)(items))) + 1e-6


def make_loss(
    family: ProblemFamily,
    config: DiffusionConfig,
    warm: PyTree | None = None,
    *,
    regression: bool = False,
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """Builds `(params, solved, key) -> (loss, metrics)` of one problem.

    At one noise level the loss is α reconstruction + (1 - α) task. The reconstruction is the mean
    squared error of the prediction. The task loss is the gap f(x_0) - f* over the gap of the family's
    start, which has no units, bent by log1p where it is positive so that far points do not rule. It is
    weighted by α_t²: where z is all noise, x_0 is the mean of all solutions, and f there says nothing.

    Stateless training hides the solution, or a point of the oracle in its place, in noise of a random
    level. A roll-out starts from noise and follows DDIM on the denoiser's own x_0, which it is fed with
    one step later; the gradient runs through `window` steps. It draws each roll-out to the one label, so
    that it is for problems with one solution.

    Args:
      family: the problems.
      config: settings.
      warm: of a warm start; None without one.
      regression: whether to say x_0 from z = 0 instead, which is training a warm start.
    """
    network = make_network(config.network)
    weights = guiding.resolve_weights(config.guidance, None)
    parts = config.guidance.parts
    dropout = config.guidance.dropout * (len(parts) if len(config.guidance.dropout) == 1 else 1)

    def loss_fn(params, item, key):
        uniform_key, normal_key, key = jax.random.split(
            key, 3
        )  # few calls: each compiles for 0.4 s
        chance = jax.random.uniform(uniform_key, (4 + len(parts),))
        problem = family.sample(item.key, "train")
        centre, scale = frame_of(family, config, warm, problem)
        kept = (chance[4:] >= jnp.array(dropout)).astype(jnp.float32)
        keep = dict(zip(parts, kept, strict=True))
        see = make_observer(family, config, params["gates"], problem, (centre, scale), weights)
        target = (item.solution - centre) / scale
        noise = jax.random.normal(normal_key, (2, len(target)))

        def at(z, log_snr, previous, key, trust=1.0):
            condition = see(z, log_snr, previous, key, keep)
            prediction = network.apply(params["network"], z, log_snr, condition)
            wanted = from_x0(config.prediction, target, z, log_snr)
            x0 = to_x0(config.prediction, prediction, z, log_snr)
            signal = 1.0 if regression else jax.nn.sigmoid(log_snr)
            metrics = {
                "reconstruction": jnp.mean((trust * (prediction - wanted)) ** 2),
                "task": signal * _task_loss(family.objective(centre + scale * x0, problem), item),
            }
            loss = config.alpha * metrics["reconstruction"]
            return loss + (1.0 - config.alpha) * metrics["task"], (x0, metrics)

        if regression:
            zero = jnp.zeros_like(target)
            loss, (_, metrics) = at(zero, jnp.float32(config.schedule.log_snr_min), zero, key)
        elif config.training == "rollout":
            loss, metrics = _rollout_loss(config, at, noise[0], key)
        else:
            iterates = (
                None if item.iterates is None else (item.iterates - centre[None]) / scale[None]
            )
            point, certain = _point(config.oracle, target, iterates, chance[:3], noise[1])
            loss, metrics = _stateless_loss(config, at, point, certain, chance[3], noise[0], key)
        return loss, {"loss": loss, **metrics}

    return loss_fn


def _task_loss(value: jax.Array, item: Solved) -> jax.Array:
    """The gap in units of the start's; its logarithm where it is positive."""
    unit = jnp.maximum(item.start_value - item.value, 1e-3 * jnp.abs(item.value) + 1e-12)
    gap = (value - item.value) / unit
    return jnp.log1p(jnp.maximum(gap, 0.0)) + jnp.minimum(gap, 0.0)


def _point(
    oracle: OracleConfig,
    solution: jax.Array,
    iterates: jax.Array | None,
    chance: jax.Array,
    noise: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """What noise is to hide, and whether it is the solution; `chance [3]` is uniform in [0, 1)."""
    points = [solution, solution, solution + oracle.noise * chance[0] * noise]
    if iterates is not None:
        points[1] = iterates[(chance[1] * len(iterates)).astype(jnp.int32)]
    shares = np.cumsum([oracle.solutions, oracle.trajectories, oracle.artificial])
    kind = jnp.sum(chance[2] >= shares[:2] / shares[2])
    return jnp.stack(points)[kind], kind == 0


def _stateless_loss(config, at, point, certain, time, noise, key):
    """Denoising at the level of a random time.

    Off the solution, ε and v would be wanted with an error of 1 / σ times that of z; it is taken off.
    """
    log_snr = config.schedule.log_snr(time)
    alpha, sigma = alpha_sigma(log_snr)
    z = alpha * point + sigma * noise
    damped = {"x0": 1.0, "eps": jnp.minimum(sigma / alpha, 1.0), "v": sigma}[config.prediction]
    loss, (_, metrics) = at(z, log_snr, jnp.zeros_like(z), key, jnp.where(certain, 1.0, damped))
    return loss, metrics


def _rollout_loss(config, at, start, key):
    """Mean loss over a roll-out on the levels of a sampler, from noise."""
    count = config.rollout_steps
    levels = config.schedule.log_snr(jnp.linspace(1.0, 0.0, count + 1)[:-1])
    rows, advance = ddim_rule(jnp.append(levels, jnp.inf), jnp.zeros(()))
    cuts = jnp.arange(count) % config.window == 0

    def body(state, inputs):
        row, cut, key = inputs
        z, previous = (jnp.where(cut, jax.lax.stop_gradient(x), x) for x in state)
        loss, (x0, metrics) = at(z, row["level"], previous, key)
        return (advance(row, z, x0, (), 0.0)[0], x0), (loss, metrics)

    inputs = rows, cuts, jax.random.split(key, count)
    values = jax.lax.scan(body, (start, jnp.zeros_like(start)), inputs)[1]
    return jax.tree.map(jnp.mean, values)


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
