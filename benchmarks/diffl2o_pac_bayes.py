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
from typing import Any, NamedTuple

import diffl2o_pac_report
import jax
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
      measure: `(runs, pool, held_out, trained) -> {name: [runs]}`, with "gibbs" `[runs, spreads]`.
      gibbs: `(trained, held_out, spread [runs]) -> [runs]`, held-out loss of the posterior.
    """

    train: Any
    measure: Any
    gibbs: Any


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
    losses = functools.partial(_losses, known, diffusion_generator(known, config, {}))
    measure = functools.partial(_measure, losses, effort.draws)

    def gibbs(trained, held_out, spread, seed):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(7), seed), len(held_out.value))
        return losses(trained["prior"], trained["posterior"], spread, held_out, keys).mean()

    def of(runs, pool):
        return jax.tree.map(lambda leaf: leaf[runs.seed], pool)

    return Study(
        jax.jit(lambda runs, pool: jax.vmap(lambda run: train(run, of(run, pool)))(runs)),
        jax.jit(
            lambda runs, pool, held_out, trained: jax.lax.map(
                lambda pair: measure(pair[0], of(pair[0], pool), held_out, pair[1]),
                (runs, trained),
            )
        ),
        jax.jit(
            lambda runs, held_out, trained, spread: jax.lax.map(
                lambda each: gibbs(each[0], held_out, each[1], each[2]),
                (trained, spread, runs.seed),
            )
        ),
    )


def make_training(known: ProblemFamily, config: DiffusionConfig, initial):
    """Builds `(run, pool) -> {"solver", "prior", "posterior"}`.

    The solver is trained on all m instances. The prior is a network trained on the first half, so that
    it does not know the other; the posterior is its last layer, trained on for all m instances.
    """
    loss_fn = make_loss(known, config)
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.scale_by_adam())

    def fit(run, pool, noise, start, join, instances, updates, key):
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
                return jnp.mean(mixed + (1.0 - run.alpha) * metrics["task"])

            value, grads = jax.value_and_grad(mean_loss)(params)
            changes, opt_state = optimizer.update(grads, opt_state, params)
            rate = run.learning_rate * 0.5 * (1.0 + jnp.cos(jnp.pi * step / updates))
            params = jax.tree.map(lambda p, change: p - rate * change, params, changes)
            return (params, opt_state), value

        state, values = jax.lax.scan(update, (start, optimizer.init(start)), jnp.arange(updates))
        return state[0], jnp.mean(values[-updates // 10 :])

    def train(run, pool):
        start_key, copy_key, *keys = jax.random.split(jax.random.key(run.seed), 5)
        start = initial(start_key)
        level_key, noise_key = jax.random.split(copy_key)
        noise = jax.random.uniform(level_key, (BUDGET, 1))
        noise = noise * jax.random.normal(noise_key, (BUDGET, pool.solution.shape[1]))
        part = functools.partial(fit, run, pool, noise)
        solver, objective = part(start, lambda p: p, run.m, config.updates, keys[0])
        prior, _ = part(start, lambda p: p, run.m // 2, config.updates, keys[1])

        def join(last):
            return {**prior, "network": {**prior["network"], LAST: last}}

        last = prior["network"][LAST]
        posterior, _ = part(last, join, run.m, config.updates // 4, keys[2])
        sizes = {
            "objective": objective,
            "weight_norm": optax.tree.norm(solver["network"]),
            "distance": optax.tree.norm(optax.tree.sub(solver["network"], start["network"])),
            "moved": optax.tree.norm(optax.tree.sub(posterior, last)),
        }
        return {"solver": solver, "prior": prior, "posterior": posterior, "sizes": sizes}

    return train


def _losses(known, generator, params: PyTree, last: PyTree, spread, items: Solved, keys):
    """Bounded losses, each of sampler noise and of a draw of the last layer of its own, if spread."""

    def one(item, key):
        sampler_key, *noise_keys = jax.random.split(key, 1 + len(jax.tree.leaves(last)))
        leaves, form = jax.tree.flatten(last)
        noise = [jax.random.normal(k, x.shape) for k, x in zip(noise_keys, leaves, strict=True)]
        drawn = [leaf + spread * other for leaf, other in zip(leaves, noise, strict=True)]
        network = {**params["network"], LAST: form.unflatten(drawn)}
        everything = {**params, "network": network, "warm": None}
        return bounded_loss(known, generator.apply(everything, item.key, sampler_key), item)

    return jax.vmap(one)(items, keys)


def _measure(losses, draws: int, run: Run, pool: Solved, held_out: Solved, trained: PyTree) -> dict:
    """Losses of one run; the other half of the instances certifies."""
    solver, prior, posterior = (trained[k] for k in ("solver", "prior", "posterior"))
    key = jax.random.fold_in(jax.random.key(5), run.seed)

    def mean(params, last, spread, first, count, key):
        rows = first + jnp.arange(draws) % count
        items = jax.tree.map(lambda leaf: leaf[rows], pool)
        return losses(params, last, spread, items, jax.random.split(key, draws)).mean()

    def outside(params, last):
        keys = jax.random.split(jax.random.key(6), len(held_out.value))
        return losses(params, last, 0.0, held_out, keys).mean()

    half, last = run.m // 2, solver["network"][LAST]
    keys = jax.random.split(key, 3 + len(SPREADS))
    return trained["sizes"] | {
        "train": mean(solver, last, 0.0, 0, run.m, keys[0]),
        "held_out": outside(solver, last),
        "validation": mean(prior, prior["network"][LAST], 0.0, half, half, keys[1]),
        "prior_held_out": outside(prior, prior["network"][LAST]),
        "posterior_held_out": outside(prior, posterior),
        "gibbs": jax.lax.map(
            lambda each: mean(prior, posterior, each[0], half, half, each[1]),
            (jnp.array(SPREADS), keys[3:]),
        ),
    }


def run_cell(study: Study, setting: dict, pool: Solved, held_out: Solved, effort: Effort) -> list:
    """All m and seeds of one setting, as rows."""
    grid = list(itertools.product(AXES["m"], range(effort.seeds)))
    m, seed = (jnp.array(column) for column in zip(*grid, strict=True))
    same = [jnp.full(len(grid), setting[k]) for k in ("learning_rate", "alpha", "noise")]
    runs = Run(m, *same, seed)
    trained = study.train(runs, pool)
    found = jax.device_get(study.measure(runs, pool, held_out, trained))
    rows, chosen = [], []
    for index, (size, number) in enumerate(grid):
        row = {"m": size, "seed": number, **setting}
        row |= {name: float(v[index]) for name, v in found.items() if name != "gibbs"}
        best, certificate = certify(row, found["gibbs"][index], effort.draws)
        chosen.append(SPREADS[best])
        rows.append(row | certificate)
    outside = study.gibbs(runs, held_out, trained, jnp.array(chosen))
    for row, value in zip(rows, jax.device_get(outside), strict=True):
        row["gibbs_held_out"] = float(value)
    return rows


def certify(row: dict, gibbs: np.ndarray, draws: int) -> tuple[int, dict]:
    """Which spread is best, and the bounds: PAC-Bayes, and of the prior's network as on a test set."""
    n = row["m"] // 2
    divergences = [row["moved"] ** 2 / (2.0 * spread**2) for spread in SPREADS]
    means = np.clip(gibbs.astype(float), 0.0, 1.0)
    best, bound = best_certificate(
        means, divergences, num_draws=draws, n=n, delta=DELTA, delta_draws=DELTA_DRAWS
    )
    return best, {
        "n": n,
        "spread": SPREADS[best],
        "divergence": divergences[best],
        "gibbs": float(means[best]),
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
