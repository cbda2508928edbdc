"""Does a PAC-Bayes bound say how well Diff-L2O generalises, and are noisy copies worth instances?

    taskset -c 0 python benchmarks/diffl2o_pac_bayes.py [--families NAME ...] [--seeds 5]
        [--results FILE] [--quick] [--report]

Every run trains on m distinct instances with 2048 / m copies of each, the first exact and the others
with noise on their solutions. A cell is a family and a setting of width, learning rate, alpha and
noise; it trains all m and seeds at once, is written at once and not repeated. `--quick` hardly trains
and writes to another file. At the end, or at once with `--report`, comes `diffl2o_pac_bayes.md` with a
picture.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import diffl2o_pac_report
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
from diffl2o_pac_statistics import best_certificate, monte_carlo_bound

from lohp_jax.diffusion.config import DiffusionConfig
from lohp_jax.diffusion.denoiser import NetworkConfig
from lohp_jax.diffusion.generator import diffusion_generator
from lohp_jax.diffusion.guidance import GuidanceConfig
from lohp_jax.diffusion.loss import make_loss
from lohp_jax.diffusion.oracle import OracleConfig, Solved
from lohp_jax.diffusion.training import initial_params
from lohp_jax.files import write_atomically
from lohp_jax.runs import environment
from lohp_jax.tasks.lasso import lasso
from lohp_jax.tasks.rastrigin import rastrigin
from lohp_jax.types import ProblemFamily, PyTree, Split

RESULTS = pathlib.Path(__file__).parent / "results" / "diffl2o_pac_bayes.json"
FAMILIES = {
    "lasso5x10": lambda: lasso(5, 10, penalty=0.1, dictionary="fixed"),
    "rastrigin_n2": lambda: rastrigin(2),
}
BUDGET = 2048
"""Instances times copies."""
AXES = {
    "m": (32, 64, 128, 256, 512, 1024, 2048),
    "width": (16, 64),
    "learning_rate": (1e-3, 4e-3),
    "alpha": (0.5, 1.0),
    "noise": (0.0, 0.5),
}
"""The grid; the noise on copies is its largest standard deviation in the family's frame."""
SPREADS = tuple(float(s) for s in np.geomspace(0.003, 0.3, 6))
"""Standard deviations of prior and posterior; one is chosen, the bound pays for all."""
LAST = "output"
"""The layer that has a posterior."""
PENALTY_SPREAD = 0.03
"""The standard deviation by which the posterior's training counts its KL."""
DELTA, DELTA_DRAWS = 0.05, 0.01


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is trained and measured."""

    updates: int = 800
    batch_size: int = 64
    draws: int = 2048
    """Of posterior, sampler noise and training instance, of each mean on training instances."""
    held_out: int = 4096
    seeds: int = 5


QUICK = Effort(updates=20, batch_size=8, draws=2048, held_out=128, seeds=2)


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
        network=NetworkConfig(width=width, depth=2),
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
    def train_all(runs, pool):
        return jax.vmap(lambda run: train(run, jax.tree.map(lambda leaf: leaf[run.seed], pool)))(
            runs
        )

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
            rows, chosen = draw_rows(row_key, run.m, instances, (config.batch_size,))
            items = jax.tree.map(lambda leaf: leaf[chosen], pool)
            away = run.noise * noise[rows] * (rows >= run.m)[:, None] * items.key["frame"][1]
            items = items._replace(iterates=(items.solution + away)[:, None, :])
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
        both = jax.vmap(functools.partial(part, start, lambda p: p, config.updates, 0.0))
        networks, objective = both(jnp.stack([run.m, run.m // 2]), jax.random.split(both_key))
        solver, prior = (jax.tree.map(lambda leaf, i=i: leaf[i], networks) for i in (0, 1))
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
    items = jax.tree.map(lambda leaf: leaf[seed][rows], pool)
    flat, restore = jax.flatten_util.ravel_pytree(last)

    def loss(item, key):
        sampler_key, last_key = jax.random.split(key)
        drawn = restore(flat + spread * jax.random.normal(last_key, flat.shape))
        x = generator.apply({**_with_last(params, drawn), "warm": None}, item.key, sampler_key)
        return bounded_loss(known, x, item)

    return jax.vmap(loss)(items, keys).mean()


def run_cell(study: Study, setting: dict, pool: Solved, held_out: Solved, effort: Effort) -> list:
    """All m and seeds of one setting, as rows."""
    grid = list(itertools.product(AXES["m"], range(effort.seeds)))
    m, seed = (np.array(column) for column in zip(*grid, strict=True))
    same = [np.full(len(grid), setting[k], np.float32) for k in ("learning_rate", "alpha", "noise")]
    trained = study.train(Run(m, *same, seed), pool)
    found = {name: np.asarray(size, float) for name, size in trained["sizes"].items()}
    outside = jax.tree.map(lambda leaf: leaf[None], held_out)
    nowhere, half = np.zeros_like(m), m // 2

    def mean(name, last=None, spread=nowhere, first=nowhere, count=None):
        network = trained[name]
        last = network["network"][LAST] if last is None else last
        size = effort.held_out if count is None else effort.draws
        where = (nowhere, nowhere, nowhere + size) if count is None else (seed, first, count)
        keys = jax.vmap(lambda s: jax.random.split(jax.random.fold_in(jax.random.key(5), s), size))
        spread = np.asarray(spread, np.float32)
        data = outside if count is None else pool
        values = study.evaluate(network, last, spread, where, keys(seed), data)
        return np.clip(np.asarray(values, float), 0.0, 1.0)

    posterior = trained["posterior"]
    found["train"] = mean("solver", count=m)
    found["held_out"] = mean("solver")
    found["validation"] = mean("prior", first=half, count=half)
    found["prior_held_out"] = mean("prior")
    found["posterior_held_out"] = mean("prior", posterior)
    gibbs = [mean("prior", posterior, nowhere + s, half, half) for s in SPREADS]
    rows = []
    for index, (size, number) in enumerate(grid):
        row = {"m": size, "seed": number, **setting}
        row |= {name: float(values[index]) for name, values in found.items()}
        rows.append(row | certify(row, [values[index] for values in gibbs], effort.draws))
    spread = np.array([row["spread"] for row in rows])
    for row, value in zip(rows, mean("prior", posterior, spread), strict=True):
        row["gibbs_held_out"] = float(value)
    return rows


def certify(row: dict, gibbs: Sequence[float], draws: int) -> dict:
    """The best spread and its bound; and the bound of the prior's network, as on a test set."""
    n = row["m"] // 2
    divergences = [row["moved"] ** 2 / (2.0 * spread**2) for spread in SPREADS]
    best, bound = best_certificate(
        gibbs, divergences, num_draws=draws, n=n, delta=DELTA, delta_draws=DELTA_DRAWS
    )
    return {
        "n": n,
        "spread": SPREADS[best],
        "divergence": divergences[best],
        "gibbs": float(gibbs[best]),
        "bound": bound,
        "test_set_bound": monte_carlo_bound(row["validation"], n, DELTA),
    }


def run_family(name: str, arguments: argparse.Namespace, results: dict) -> None:
    """Every cell of a family that is missing."""
    effort, family = arguments.effort, FAMILIES[name]()
    pool_keys = jax.random.split(jax.random.key(1), (effort.seeds, BUDGET))
    pool = jax.lax.map(lambda keys: solved_instances(family, keys, "train"), pool_keys)
    keys = jax.random.split(jax.random.key(2), effort.held_out)
    held_out = solved_instances(family, keys, "held_out")
    cells = results["cells"].setdefault(name, {})
    for width in AXES["width"]:
        study = make_study(family, width, effort)
        others = ("learning_rate", "alpha", "noise")
        for values in itertools.product(*(AXES[k] for k in others)):
            setting = {"width": width} | dict(zip(others, values, strict=True))
            label = " ".join(f"{k}={v}" for k, v in setting.items())
            if label in cells:
                continue
            began = time.perf_counter()
            rows = run_cell(study, setting, pool, held_out, effort)
            cells[label] = {"rows": rows, "seconds": round(time.perf_counter() - began, 1)}
            write_atomically(arguments.results, (json.dumps(results) + "\n").encode())
            holds = np.mean([row["gibbs_held_out"] <= row["bound"] for row in rows])
            print(name, label, cells[label]["seconds"], "s; bound holds in", holds, flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=tuple(FAMILIES))
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--results", type=pathlib.Path)
    parser.add_argument("--quick", action="store_true", help="next to no training")
    parser.add_argument("--report", action="store_true", help="of the results that are there")
    parsed = parser.parse_args(arguments)
    parsed.effort = QUICK if parsed.quick else Effort()
    if parsed.seeds is not None:
        parsed.effort = dataclasses.replace(parsed.effort, seeds=parsed.seeds)
    if parsed.results is None:
        stem = RESULTS.stem + "_quick" * parsed.quick
        parsed.results = RESULTS.with_stem(stem)
    return parsed


def main() -> None:
    """Runs what is missing, then reports."""
    arguments = parse()
    settings = {"effort": dataclasses.asdict(arguments.effort), "axes": AXES, "spreads": SPREADS}
    settings = json.loads(json.dumps(settings | {"budget": BUDGET, "delta": DELTA}))
    results = {"settings": settings, "cells": {}}
    if arguments.results.exists():
        results = json.loads(arguments.results.read_text())
    if not arguments.report:
        if results["settings"] != settings:
            raise SystemExit(f"{arguments.results} is of other settings: {results['settings']}.")
        results["environment"] = environment()
        for name in arguments.families:
            run_family(name, arguments, results)
    diffl2o_pac_report.write(results, arguments.results)


if __name__ == "__main__":
    sys.exit(main())
