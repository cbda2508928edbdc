"""Compares Diff-L2O with classic and learned solvers at equal numbers of calls, and by the clock.

    taskset -c 0 python -m benchmarks.diffl2o.run [--sets NAME ...] [--methods NAME ...] [--seeds 5]
        [--oracles l2o.npz] [--results FILE] [--quick] [--throughput]

A cell is a set, a method, a budget and a seed of its training. Each is written at once and not
repeated. `--quick` runs everything with next to no training, to see that it runs; its figures mean
nothing and go to another file. `--throughput` measures instances per second against scikit-learn.
`benchmarks.diffl2o.report` turns results into tables and a picture.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.diffl2o import throughput
from benchmarks.diffl2o.methods import METHODS, Answer, Method
from benchmarks.diffl2o.sets import SETS, ProblemSet, make_set
from lohp_jax.files import write_atomically
from lohp_jax.runs.directory import environment
from lohp_jax.training.engine import DivergedError

RESULTS = pathlib.Path(__file__).with_name("results.json")
MEASURED_SECONDS = 0.5
"""A solver runs again until all its runs have lasted this long; the median counts."""
SUCCESS = 1e-2


def measure(problem_set: ProblemSet, method: Method, budget: int, params: Any, seed: int) -> dict:
    """One cell."""
    run = _on_host if method.on_host else _compiled
    answer, seconds, compile_seconds = run(problem_set, method, budget, params, seed)
    gaps = problem_set.gaps(answer.x)
    quartiles = np.quantile(gaps, (0.25, 0.5, 0.75), method="nearest")
    calls = {k: float(np.mean(getattr(answer, k))) for k in Answer._fields if k != "x"}
    return {
        "gap_mean": _number(np.mean(gaps)),
        "gap_q25": _number(quartiles[0]),
        "gap_median": _number(quartiles[1]),
        "gap_q75": _number(quartiles[2]),
        "success": float(np.mean(gaps < SUCCESS)),
        "num_instances": len(gaps),
        **calls,
        "set_up": method.set_up,
        "seconds_per_instance": _number(seconds / len(gaps)),
        "compile_seconds": round(compile_seconds, 2),
    }


def _compiled(problem_set, method, budget, params, seed) -> tuple[Answer, float, float]:
    """All instances in one vmapped call."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), len(problem_set.optimum))
    solve = jax.vmap(method.solve(problem_set, budget), (None, problem_set.axes, 0))
    problems = jax.device_put(problem_set.problems)
    began = time.perf_counter()
    run = jax.jit(solve).lower(params, problems, keys).compile()
    compile_seconds = time.perf_counter() - began
    answer = jax.block_until_ready(run(params, problems, keys))
    seconds = timed(lambda: run(params, problems, keys))
    return jax.device_get(answer), seconds, compile_seconds


def timed(run: Callable[[], Any]) -> float:
    """Median seconds of a run, which has run before."""
    seconds: list[float] = []
    while sum(seconds) < MEASURED_SECONDS:
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _on_host(problem_set, method, budget, params, seed) -> tuple[Answer, float, float]:
    """One instance after another, each with a seed of its own."""
    run, count = method.solve(problem_set, budget), len(problem_set.optimum)
    began = time.perf_counter()
    answers = [run(problem_set.instance(i), count * seed + i) for i in range(count)]
    seconds = time.perf_counter() - began
    return Answer(*(np.array(part) for part in zip(*answers, strict=True))), seconds, 0.0


def _number(value: float) -> float | None:
    """Four significant digits, None for what is not finite."""
    return float(f"{value:.4g}") if np.isfinite(value) else None


def train(
    name: str, method: Method, problem_set: ProblemSet, seed: int, quick: bool, trained: dict
):
    """What a method learns, from `trained` if it is there, with its seconds; or why it failed."""
    if method.train is None:
        return None, {}
    place = (problem_set.training_name, name, seed)
    if place not in trained:
        began, params, failure = time.perf_counter(), None, {}
        try:
            params = jax.block_until_ready(method.train(problem_set, jax.random.key(seed), quick))
        except DivergedError as error:
            failure = {"failed": str(error)}
        seconds = round(time.perf_counter() - began, 1)
        trained[place] = params, {"training_seconds": seconds} | failure
    return trained[place]


def run_set(name: str, arguments: argparse.Namespace, results: dict, trained: dict) -> None:
    """Every cell of a set that is missing."""
    problem_set = make_set(name, arguments.oracles)
    cells = results["cells"].setdefault(name, {})
    results["sets"][name] = {
        "num_instances": len(problem_set.optimum),
        "certain": problem_set.certain,
        "gap": "relative" if problem_set.kind == "lasso" else "absolute",
        "trained_on": problem_set.training_name,
    }
    for method_name in arguments.methods:
        method = METHODS[method_name]
        if not method.serves(problem_set):
            continue
        repeats = arguments.seeds if method.train or method.random else 1
        for seed in range(repeats):
            rows = cells.setdefault(method_name, {})
            missing = [b for b in problem_set.budgets if str(seed) not in rows.get(str(b), {})]
            if not missing:
                continue
            params, training = train(
                method_name, method, problem_set, seed, arguments.quick, trained
            )
            for budget in missing:
                row = (
                    {}
                    if "failed" in training
                    else measure(problem_set, method, budget, params, seed)
                )
                rows.setdefault(str(budget), {})[str(seed)] = row | training
                write_atomically(arguments.results, (json.dumps(results) + "\n").encode())
                print(name, method_name, budget, seed, row.get("gap_mean"), row.get("success"))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=tuple(METHODS))
    parser.add_argument("--seeds", type=int, default=5, help="of training, or of random starts")
    parser.add_argument("--oracles", type=pathlib.Path, help=".npz of instances with known optima")
    parser.add_argument("--results", type=pathlib.Path)
    parser.add_argument("--quick", action="store_true", help="next to no training")
    parser.add_argument("--throughput", action="store_true")
    parsed = parser.parse_args(arguments)
    if parsed.results is None:
        parsed.results = RESULTS.with_stem("results_quick") if parsed.quick else RESULTS
    return parsed


def main() -> None:
    """Runs what is missing."""
    arguments = parse()
    results = {"quick": arguments.quick, "sets": {}, "cells": {}}
    if arguments.results.exists():
        results = json.loads(arguments.results.read_text())
    if results["quick"] != arguments.quick:
        raise SystemExit(f"{arguments.results} is not of a run with quick={arguments.quick}.")
    results["environment"] = environment()
    if arguments.throughput:
        results["throughput"] = throughput.compare(arguments.quick)
        write_atomically(arguments.results, (json.dumps(results) + "\n").encode())
        return
    trained: dict = {}
    for name in arguments.sets:
        run_set(name, arguments, results, trained)


if __name__ == "__main__":
    sys.exit(main())
