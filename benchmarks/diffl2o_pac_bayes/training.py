"""What is trained and evaluated in the study of PAC-Bayes bounds, all runs of a setting at once."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax

from lohp_jax.diffusion.config import DiffusionConfig
from lohp_jax.diffusion.generator import diffusion_generator
from lohp_jax.diffusion.guidance import GuidanceConfig
from lohp_jax.diffusion.loss import make_loss
from lohp_jax.diffusion.oracle import OracleConfig, Solved
from lohp_jax.diffusion.training import initial_params
from lohp_jax.networks.denoiser import DenoiserConfig
from lohp_jax.types import ProblemFamily, PyTree, Split

BUDGET = 2048
"""Instances times copies."""
LAST = "output"
"""The layer that has a posterior."""
PENALTY_SPREAD = 0.03
"""The standard deviation by which the posterior's training counts its KL."""


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is trained and measured."""

    updates: int = 1000
    batch_size: int = 64
    draws: int = 2048
    """Of posterior, sampler noise and training instance, of each mean on training instances."""
    held_out: int = 4096
    seeds: int = 5


class Run(NamedTuple):
    """What differs between the runs that are trained at once.

    Attributes:
      m: distinct instances, a power of 2.
      learning_rate: peak of a cosine.
      alpha: weight of the reconstruction.
      noise: of the copies.
      seed: of the instances, the start and the training.
    """

    m: jax.Array
    learning_rate: jax.Array
    alpha: jax.Array
    noise: jax.Array
    seed: jax.Array


class Study(NamedTuple):
    """Compiled functions of one family and width; all take a batch of runs.

    Attributes:
      train: `(runs, pool) -> trained`, of the instances of all seeds.
      evaluate: `(params, last, spread, where, keys, pool) -> [runs]`, mean bounded losses; see `_mean`.
    """

    train: Callable[..., PyTree]
    evaluate: Callable[..., jax.Array]


def known_family(family: ProblemFamily) -> ProblemFamily:
    """The same where an instance is its own key, with its frame and features, so drawn only once."""
    return dataclasses.replace(
        family,
        sample=lambda instance, split="train": instance,
        frame=lambda instance: instance["frame"],
        features=lambda instance: instance["features"],
    )


def solved_instances(family: ProblemFamily, keys: jax.Array, split: Split) -> Solved:
    """Instances of a known family with their labels; as `solved`, which keeps keys instead."""

    def one(key):
        problem = family.sample(key, split)
        x, start = family.solve(problem, key), family.start(problem)
        values = (family.objective(point, problem) for point in (x, start))
        known = {"frame": family.frame(problem), "features": family.features(problem)}
        return Solved(problem | known, x, *values, None)

    return jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=256))(keys)


def draw_rows(key: jax.Array, m: jax.Array, instances: jax.Array, shape: tuple) -> tuple:
    """Draws rows of the budget, `copy * m + instance`, of the first `instances` of m; and which."""
    instance, copy = jax.random.uniform(key, (2, *shape))
    instance = jnp.minimum((instance * instances).astype(jnp.int32), instances - 1)
    copies = BUDGET // m
    return jnp.minimum((copy * copies).astype(jnp.int32), copies - 1) * m + instance, instance


def bounded_loss(family: ProblemFamily, x: jax.Array, item: Solved) -> jax.Array:
    """1 - exp(-gap) in [0, 1), the gap f(x) - f* in units of the start's; 1 where it is not finite."""
    unit = jnp.maximum(item.start_value - item.value, 1e-3 * jnp.abs(item.value) + 1e-12)
    gap = (family.objective(x, item.key) - item.value) / unit
    return jnp.where(jnp.isfinite(gap), -jnp.expm1(-jnp.maximum(gap, 0.0)), 1.0)


def make_study(family: ProblemFamily, width: int, effort: Effort) -> Study:
    """Compiles what a cell needs."""
    config = DiffusionConfig(
        network=DenoiserConfig(width=width, depth=2),
        guidance=GuidanceConfig(dropout=(0.0,)),
        oracle=OracleConfig(solutions=0.0, trajectories=1.0),  # points are given as iterates
        batch_size=effort.batch_size,
        updates=effort.updates,
        num_steps=4,
    )
    known = known_family(family)
    train = make_training(known, config, lambda key: initial_params(family, config, key))
    mean = functools.partial(_mean, known, diffusion_generator(known, config, {}))

    @jax.jit
    def train_all(runs, pool):  # a CPU is slower at the batched products of jax.vmap
        return jax.lax.map(lambda run: train(run, _pick(pool, run.seed)), runs)

    @jax.jit
    def evaluate(params, last, spread, where, keys, pool):
        each = (params, last, spread, where, keys)
        return jax.lax.map(lambda one: mean(*one, pool), each)

    return Study(train_all, evaluate)


def make_training(
    known: ProblemFamily, config: DiffusionConfig, initial: Callable[[jax.Array], PyTree]
) -> Callable[[Run, Solved], PyTree]:
    """Builds `(run, pool) -> {"solver", "prior", "posterior", "sizes"}`.

    The solver is trained on all m instances. The prior is a network trained on the first half, so that
    it does not know the other; the mean of the posterior is its last layer, trained on for all m
    instances with a penalty of KL / n.
    """
    loss_fn = make_loss(known, config)
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.scale_by_adam())

    def fit(run, pool, noise, start, join, updates, penalty, instances, key):
        def update(state, step):
            params, opt_state = state
            row_key, loss_key = jax.random.split(jax.random.fold_in(key, step))
            items = _draw_batch(row_key, run, pool, noise, instances, config.batch_size)
            keys = jax.random.split(loss_key, config.batch_size)

            def mean_loss(params):
                metrics = jax.vmap(loss_fn, (None, 0, 0))(join(params), items, keys)[1]
                mixed = run.alpha * metrics["reconstruction"]
                moved = optax.tree.norm(optax.tree.sub(params, start), squared=True)
                mixed = jnp.mean(mixed + (1.0 - run.alpha) * metrics["task"])
                return mixed + penalty * moved, mixed

            grads, value = jax.grad(mean_loss, has_aux=True)(params)
            changes, opt_state = optimizer.update(grads, opt_state, params)
            rate = run.learning_rate * 0.5 * (1.0 + jnp.cos(jnp.pi * step / updates))
            params = jax.tree.map(lambda p, change: p - rate * change, params, changes)
            return (params, opt_state), value

        state, values = jax.lax.scan(update, (start, optimizer.init(start)), jnp.arange(updates))
        return state[0], jnp.mean(values[-max(1, updates // 10) :])

    def train(run, pool):
        start_key, copy_key, both_key, last_key = jax.random.split(jax.random.key(run.seed), 4)
        start = initial(start_key)
        level_key, noise_key = jax.random.split(copy_key)
        noise = jax.random.uniform(level_key, (BUDGET, 1))
        noise = noise * jax.random.normal(noise_key, (BUDGET, pool.solution.shape[1]))
        part = functools.partial(fit, run, pool, noise)
        whole = functools.partial(part, start, lambda p: p, config.updates, 0.0)
        both = jnp.stack([run.m, run.m // 2]), jax.random.split(both_key)
        networks, objective = jax.lax.map(lambda each: whole(*each), both)
        solver, prior = _pick(networks, 0), _pick(networks, 1)
        last = prior["network"][LAST]
        penalty = 1.0 / (2.0 * PENALTY_SPREAD**2 * (run.m // 2))
        updates = max(1, config.updates // 4)
        join = functools.partial(_with_last, prior)
        posterior, _ = part(last, join, updates, penalty, run.m, last_key)
        sizes = {
            "objective": objective[0],
            "weight_norm": optax.tree.norm(solver["network"]),
            "distance": optax.tree.norm(optax.tree.sub(solver["network"], start["network"])),
            "moved": optax.tree.norm(optax.tree.sub(posterior, last)),
        }
        return {"solver": solver, "prior": prior, "posterior": posterior, "sizes": sizes}

    return train


def _draw_batch(
    key: jax.Array, run: Run, pool: Solved, noise: jax.Array, instances: jax.Array, size: int
) -> Solved:
    """Instances whose one iterate is the solution, or for a copy a point away from it."""
    rows, chosen = draw_rows(key, run.m, instances, (size,))
    items = _pick(pool, chosen)
    away = run.noise * noise[rows] * (rows >= run.m)[:, None] * items.key["frame"][1]
    return items._replace(iterates=(items.solution + away)[:, None, :])


def _pick(tree: PyTree, index) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _with_last(params: PyTree, last: PyTree) -> PyTree:
    return {**params, "network": {**params["network"], LAST: last}}


def _mean(known, generator, params, last, spread, where, keys, pool) -> jax.Array:
    """Mean bounded loss over instances, each as often, with sampler noise and a last layer of its own.

    Args:
      known: the family.
      generator: of the family, without params.
      params: of a network.
      last: mean of its last layer.
      spread: standard deviation of the last layer; 0 for none.
      where: seed, first instance and number of instances in the pool.
      keys: `[draws]`.
      pool: instances, `[seeds, instances, ...]`.
    """
    seed, first, count = where
    rows = first + jnp.arange(len(keys)) % count
    items = _pick(_pick(pool, seed), rows)
    flat, restore = jax.flatten_util.ravel_pytree(last)

    def loss(item, key):
        sampler_key, last_key = jax.random.split(key)
        drawn = restore(flat + spread * jax.random.normal(last_key, flat.shape))
        x = generator.apply({**_with_last(params, drawn), "warm": None}, item.key, sampler_key)
        return bounded_loss(known, x, item)

    return jax.vmap(loss)(items, keys).mean()
