"""Compares guidance by landscape: fixed weights of gradients, and weights that follow their SNR.

    taskset -c 0 python -m benchmarks.diffl2o_guidance.run [--sets NAME ...] [--seeds 5]
        [--sampler ancestral] [--results FILE] [--quick]

A cell is a set of problems, a trained network and a seed of its training; it samples all arms of that
network. Each is written at once and not repeated. At the end pages and a picture are made of the
results; `benchmarks.diffl2o_guidance.report` does so for an unfinished run. `--quick` runs everything
with next to no training; its figures mean nothing and go to another file.
"""

import argparse
import functools
import json
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np

from benchmarks.diffl2o_guidance import report
from benchmarks.diffl2o_guidance.arms import (
    ARMS,
    CONTROL_SAMPLES,
    LEAKS,
    NETWORKS,
    SAMPLERS,
    SAMPLES,
    SETS,
    Problems,
    draw_problems,
    make_config,
    make_refiner,
    make_sampler,
    make_set,
    make_trainer,
    refine_calls,
    refine_steps,
    score,
)
from benchmarks.diffl2o_guidance.snr import measure_snr
from lohp_jax.files import write_atomically
from lohp_jax.runs.directory import environment
from lohp_jax.types import ProblemFamily

RESULTS = pathlib.Path(__file__).with_name("results.json")
NUM_PROBLEMS = 128


class Bench:
    """One set of problems, with what is compiled for it."""

    def __init__(self, family: ProblemFamily, sampler: str, quick: bool):
        self.family, self.quick = family, quick
        self.sampler_name = sampler
        self.problems: Problems = draw_problems(family, 4 if quick else NUM_PROBLEMS)
        self.trainer = functools.cache(self._trainer)
        self.sampler = functools.cache(self._sampler)
        self.refiner = functools.cache(functools.partial(make_refiner, family))

    def _trainer(self, network: str):
        return make_trainer(self.family, make_config(network, self.quick))

    def _sampler(self, network: str, gated: bool):
        count = CONTROL_SAMPLES if network == "alone" else SAMPLES
        return make_sampler(self.family, network, gated, count, self.sampler_name)

    def gaps(self, points: jax.Array, num_steps: int) -> np.ndarray:
        """`[N, K, n]` -> `[2, N, K]`, before and after refinement."""
        values = np.asarray(self.refiner(num_steps)(self.problems.arrays, points), np.float64)
        return (values - self.problems.optimum[:, None]) / self.problems.unit[:, None]

    def run_cell(self, network: str, seed: int) -> dict[str, Any]:
        """Trains a network and scores its arms."""
        begun = time.perf_counter()
        params = jax.block_until_ready(self.trainer(network)(jax.random.key(seed)))
        cell = {"training_seconds": round(time.perf_counter() - begun, 1), "arms": {}}
        cell["gates"] = {part: np.asarray(gate).tolist() for part, gate in params["gates"].items()}
        key = jax.random.fold_in(jax.random.key(seed), 1)  # the same noise for all arms
        for name, arm in ARMS.items():
            if arm.network != network:
                continue
            sampler = self.sampler(network, arm.gated)
            points = sampler(params, arm.shown, self.problems.arrays, key)
            steps = refine_steps(self.family)
            gaps = self.gaps(points[:, :SAMPLES], steps)
            calls = arm.sampling_calls
            cell["arms"][name] = {
                "sampling_calls": calls,
                "refine_calls": refine_calls(self.family, self.problems),
                **{
                    stage: {str(k): score(found, k) for k in (1, SAMPLES)}
                    for stage, found in zip(("raw", "refined"), gaps, strict=True)
                },
            }
            if name == "parameters_alone":
                cell["matched"] = self._matched(points)
        return cell

    def _matched(self, points: jax.Array) -> dict[str, Any]:
        """Parameters alone with the gradients of an arm: more starts, or for LASSO more steps."""
        own, matched = refine_calls(self.family, self.problems), {}
        steps = refine_steps(self.family)
        for calls in sorted({arm.sampling_calls for arm in ARMS.values()} - {0}):
            if self.family.composite is not None:
                gaps = self.gaps(points[:, :SAMPLES], steps + calls)[1]
                scores = {str(k): score(gaps, k) for k in (1, SAMPLES)}
            else:
                gaps = self.gaps(points, steps)[1]
                share = (own + calls) / own
                scores = {str(k): score(gaps, int(k * share)) for k in (1, SAMPLES)}
            matched[str(calls)] = scores
        return matched


def run_set(name: str, arguments: argparse.Namespace, results: dict) -> None:
    """Every cell of a set that is missing."""
    leaks = name in LEAKS
    cells = results["cells"].setdefault(name, {})
    networks = ("alone",) if leaks else tuple(NETWORKS)
    missing = [
        (network, seed)
        for network in networks
        for seed in range(arguments.seeds)
        if str(seed) not in cells.get(network, {})
    ]
    if not missing and (leaks or name in results["snr"]):
        return
    bench = Bench(make_set(name), arguments.sampler, arguments.quick)
    if not leaks and name not in results["snr"]:
        results["snr"][name] = measure_snr(bench.family, bench.problems.arrays, arguments.quick)
        _write(arguments.results, results)
    for network, seed in missing:
        begun = time.perf_counter()
        cell = bench.run_cell(network, seed)
        cells.setdefault(network, {})[str(seed)] = cell
        _write(arguments.results, results)
        seconds = time.perf_counter() - begun
        print(f"{name} {network} {seed}: {seconds:.0f} s", flush=True)


def _write(path: pathlib.Path, results: dict) -> None:
    write_atomically(path, (json.dumps(results) + "\n").encode())


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = (*SETS, *LEAKS)
    parser.add_argument("--sets", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", type=int, default=5, help="of training")
    parser.add_argument("--sampler", choices=SAMPLERS, default=SAMPLERS[0])
    parser.add_argument("--results", type=pathlib.Path)
    parser.add_argument("--quick", action="store_true", help="next to no training")
    parsed = parser.parse_args(arguments)
    if parsed.results is None:
        stem = RESULTS.stem if parsed.sampler == SAMPLERS[0] else f"{RESULTS.stem}_{parsed.sampler}"
        parsed.results = RESULTS.with_stem(f"{stem}_quick" if parsed.quick else stem)
    return parsed


def main(arguments: list[str] | None = None) -> None:
    """Runs what is missing."""
    parsed = parse(arguments)
    settings = {"quick": parsed.quick, "sampler": parsed.sampler}
    results = settings | {"cells": {}, "snr": {}}
    if parsed.results.exists():
        results = json.loads(parsed.results.read_text())
    if any(results[name] != setting for name, setting in settings.items()):
        raise SystemExit(f"{parsed.results} is not of a run with {settings}.")
    results["environment"] = environment()
    for name in parsed.sets:
        run_set(name, parsed, results)
    report.write(parsed.results)


if __name__ == "__main__":
    sys.exit(main())
