"""Asks if a PAC-Bayes bound predicts how Diff-L2O generalises, and what noisy copies are worth.

    taskset -c 0 python -m benchmarks.diffl2o_pac_bayes.run [--families NAME ...] [--seeds 5]
        [--results FILE] [--quick]

Every run trains on m distinct instances with 2048 / m copies of each, the first exact and the others
with noise on their solutions. A cell is a family and a setting of width, learning rate, alpha and
noise; it trains all m and seeds at once, is written at once and not repeated. `--quick` hardly trains
and writes to another file. At the end come tables and a picture; `benchmarks.diffl2o_pac_bayes.report`
makes them of what is there.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np

from benchmarks.diffl2o_pac_bayes import report
from benchmarks.diffl2o_pac_bayes.bounds import best_certificate, monte_carlo_bound
from benchmarks.diffl2o_pac_bayes.training import (
    BUDGET,
    LAST,
    Effort,
    Run,
    Study,
    make_study,
    solved_instances,
)
from lohp_jax.diffusion.oracle import Solved
from lohp_jax.files import write_atomically
from lohp_jax.problems.lasso import lasso
from lohp_jax.problems.rastrigin import rastrigin
from lohp_jax.runs.directory import environment

RESULTS = pathlib.Path(__file__).with_name("results.json")
FAMILIES = {
    "lasso5x10": lambda: lasso(5, 10, penalty=0.1, dictionary="fixed"),
    "rastrigin_n2": lambda: rastrigin(2),
}
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
DELTA, DELTA_DRAWS = 0.05, 0.01
"""Chance that a bound does not hold, and the part of it that is left to the draws of the posterior."""
QUICK = Effort(updates=20, batch_size=8, draws=128, held_out=128, seeds=2)
QUICK_AXES = AXES | {"m": (32, 256), "width": (8,), "learning_rate": (4e-3,)}


def run_cell(
    study: Study,
    sizes: Sequence[int],
    setting: dict,
    pool: Solved,
    held_out: Solved,
    effort: Effort,
) -> list[dict]:
    """All m, `sizes`, and seeds of one setting, as rows."""
    grid = list(itertools.product(sizes, range(effort.seeds)))
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
        base = jax.random.key(5 if count is None else 6)
        keys = jax.vmap(lambda s: jax.random.split(jax.random.fold_in(base, s), size))(seed)
        spread = np.asarray(spread, np.float32)
        data = outside if count is None else pool
        values = study.evaluate(network, last, spread, where, keys, data)
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
    effort, axes, family = arguments.effort, arguments.axes, FAMILIES[name]()
    pool_keys = jax.random.split(jax.random.key(1), (effort.seeds, BUDGET))
    pool = jax.lax.map(lambda keys: solved_instances(family, keys, "train"), pool_keys)
    keys = jax.random.split(jax.random.key(2), effort.held_out)
    held_out = solved_instances(family, keys, "held_out")
    cells = results["cells"].setdefault(name, {})
    for width in axes["width"]:
        study = make_study(family, width, effort)
        others = ("learning_rate", "alpha", "noise")
        for values in itertools.product(*(axes[k] for k in others)):
            setting = {"width": width} | dict(zip(others, values, strict=True))
            label = " ".join(f"{k}={v}" for k, v in setting.items())
            if label in cells:
                continue
            began = time.perf_counter()
            rows = run_cell(study, axes["m"], setting, pool, held_out, effort)
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
    parsed = parser.parse_args(arguments)
    parsed.effort, parsed.axes = (QUICK, QUICK_AXES) if parsed.quick else (Effort(), AXES)
    if parsed.seeds is not None:
        parsed.effort = dataclasses.replace(parsed.effort, seeds=parsed.seeds)
    if parsed.results is None:
        stem = RESULTS.stem + "_quick" * parsed.quick
        parsed.results = RESULTS.with_stem(stem)
    return parsed


def main() -> None:
    """Runs what is missing, then reports."""
    arguments = parse()
    settings = {"effort": dataclasses.asdict(arguments.effort), "axes": arguments.axes}
    settings |= {"spreads": SPREADS, "budget": BUDGET, "delta": DELTA}
    settings = json.loads(json.dumps(settings))  # as they are read again
    results = {"settings": settings, "cells": {}}
    if arguments.results.exists():
        results = json.loads(arguments.results.read_text())
    if results["settings"] != settings:
        raise SystemExit(f"{arguments.results} is of other settings: {results['settings']}.")
    results["environment"] = environment()
    for name in arguments.families:
        run_family(name, arguments, results)
    report.write(arguments.results)


if __name__ == "__main__":
    sys.exit(main())
