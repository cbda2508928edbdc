"""Ablates Diff-L2O: what to predict, to train on, to guide by, how to sample, and when to stop.

    taskset -c 0 python -m benchmarks.diffl2o_ablations.run [--axes NAME ...] [--sets NAME ...]
        [--oracles l2o.npz] [--seeds 5] [--results FILE] [--quick]

One setting at a time differs from the base of its set. The seeds of a setting are trained in one vmapped
call, and every choice at sampling is tried on the networks of the base. Each cell is written at once and
not repeated; at the end `report.py` makes the pages. `--quick` runs
all with next to no training; its figures mean nothing.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.diffl2o.sets import ProblemSet, make_set, sized_set
from benchmarks.diffl2o_ablations import report
from benchmarks.diffl2o_ablations.report import MANY
from lohp_jax.diffusion.config import DiffusionConfig
from lohp_jax.diffusion.generator import diffusion_generator
from lohp_jax.diffusion.guidance import GuidanceConfig, gradient_calls
from lohp_jax.diffusion.oracle import OracleConfig, Solved
from lohp_jax.diffusion.sampler import SAMPLERS
from lohp_jax.diffusion.schedule import Schedule
from lohp_jax.diffusion.training import diffusion_params, solved_pool
from lohp_jax.files import write_atomically
from lohp_jax.networks.denoiser import DenoiserConfig
from lohp_jax.runs.directory import environment
from lohp_jax.solvers.multistart import gaussian_starts
from lohp_jax.solvers.newton import damped_newton
from lohp_jax.solvers.proximal import fista
from lohp_jax.solvers.refine import refine
from lohp_jax.solvers.trace import objective_of
from lohp_jax.types import PyTree

RESULTS = pathlib.Path(__file__).with_name("results.json")
SUCCESS = 1e-2
TOTAL = 100
"""Steps of sampler and classic optimizer together, on the axis "switch"."""
DIMENSIONS = (2, 10, 30, 50, 100, 200)

LASSO, RASTRIGIN = "lasso25x50_fixedA_0.1", "rastrigin_n2"
BASES = {
    LASSO: DiffusionConfig(
        network=DenoiserConfig(width=128), pool=4096, batch_size=64, updates=1500, ema=0.99
    ),
    RASTRIGIN: DiffusionConfig(
        network=DenoiserConfig(width=64),
        pool=4096,
        batch_size=128,
        updates=2000,
        ema=0.99,
        alpha=0.9,
    ),
}
SWEEPS = {
    "lasso_dimension": dataclasses.replace(
        BASES[LASSO],
        network=DenoiserConfig("lasso", width=32, depth=4),
        learning_rate=3e-3,
        pool=2048,
        batch_size=64,
        updates=1000,
        num_steps=4,
    ),
    "ackley_dimension": dataclasses.replace(BASES[RASTRIGIN], updates=1000),
}


class Cell(NamedTuple):
    """One setting.

    Attributes:
      axis: what is varied.
      value: to what, for the table.
      config: of the training.
      num_steps: of the sampler.
      refine_steps: of the classic optimizer; None for the set's own number.
    """

    axis: str
    value: str
    config: DiffusionConfig
    num_steps: int = 10
    refine_steps: int | None = None


def _guided(*parts: str, **options: Any) -> GuidanceConfig:
    return GuidanceConfig(parts, **options)


TRAINED: dict[str, dict[str, dict[str, Any]]] = {
    "prediction": {kind: {"prediction": kind} for kind in ("x0", "eps", "v")},
    "alpha": {str(a): {"alpha": a} for a in (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)},
    "oracle": {
        "solutions": {},
        "half trajectories": {"oracle": OracleConfig(1.0, 1.0, 0.0)},
        "half artificial": {"oracle": OracleConfig(1.0, 0.0, 1.0)},
        "a third each": {"oracle": OracleConfig(1.0, 1.0, 1.0)},
    },
    "guidance": {
        "none": {"guidance": _guided(dropout=(0.0,))},
        "parameters": {},
        "gradient": {"guidance": _guided("gradient")},
        "smoothed gradient": {"guidance": _guided("smoothed_gradient")},
        "parameters, gradient": {"guidance": _guided("parameters", "gradient")},
        "parameters, smoothed gradient": {"guidance": _guided("parameters", "smoothed_gradient")},
    },
    "training": {
        "stateless": {},
        "stateless, warm start": {"warm_start": True},
        **{
            f"roll-out, window {window}": {"training": "rollout", "window": window}
            for window in (1, 2, 5)
        },
    },
    "schedule": {kind: {"schedule": Schedule(kind)} for kind in ("cosine", "linear")},
}
"""What is trained: axis -> value -> changes of the base."""
SAMPLED = ("sampler", "switch")
SWEPT = "dimension"
AXES = (*TRAINED, *SAMPLED, SWEPT)


def cells_of(axis: str, base: DiffusionConfig) -> Iterator[Cell]:
    """The settings of an axis on a set."""
    if axis in TRAINED:
        for value, changes in TRAINED[axis].items():
            yield Cell(axis, value, dataclasses.replace(base, **changes))
    elif axis == "sampler":
        for sampler in SAMPLERS:
            for steps in (1, 2, 5, 10, 20, 50, 100):
                config = dataclasses.replace(base, sampler=sampler)
                yield Cell(axis, f"{sampler} {steps}", config, steps)
    else:
        for steps in (10, 25, 50, 75, 100):
            yield Cell(axis, f"{steps} of {TOTAL}", base, steps, TOTAL - steps)


class Trainer:
    """Trains the seeds of a setting in one call; settings share their problems, solved once."""

    def __init__(self, num_seeds: int, quick: bool):
        self._keys = jax.random.split(jax.random.key(0), num_seeds)
        self._quick = quick
        self._pools: dict[tuple[str, OracleConfig, int], Solved] = {}
        self._known: dict[tuple[str, DiffusionConfig], tuple[PyTree, float]] = {}

    def __call__(self, problem_set: ProblemSet, config: DiffusionConfig) -> tuple[PyTree, float]:
        """Params with a leading axis of seeds, and the seconds that all of them took."""
        config = dataclasses.replace(config, sampler="ddim")
        if self._quick:
            config = dataclasses.replace(config, updates=2, pool=4, batch_size=2)
        place = problem_set.training_name, config
        if place not in self._known:
            pool = self._pool(problem_set, config)
            train = functools.partial(diffusion_params, problem_set.training, config)
            began = time.perf_counter()
            many = jax.jit(jax.vmap(lambda key, pool: train(key, pool=pool)))
            params = jax.block_until_ready(many(self._keys, pool))
            self._known[place] = params, time.perf_counter() - began
        return self._known[place]

    def _pool(self, problem_set: ProblemSet, config: DiffusionConfig) -> Solved:
        place = problem_set.training_name, config.oracle, config.pool
        if place not in self._pools:
            keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(self._keys)
            solve = functools.partial(solved_pool, problem_set.training, config)
            self._pools[place] = jax.block_until_ready(jax.jit(jax.vmap(solve))(keys))
        return self._pools[place]


def measure(problem_set: ProblemSet, cell: Cell, params: PyTree) -> dict[str, Any]:
    """Gaps of a setting by seed: of one sample, of one after refinement, of the best of many."""
    family, config = problem_set.family, cell.config
    steps, runner = _refinement(problem_set, cell)
    apply = diffusion_generator(family, config, params).apply

    def one(params, problem, key):
        def propose(key):
            return apply(params, problem, key, num_steps=cell.num_steps)

        x = jax.vmap(propose)(jax.random.split(key, MANY))
        return x[0], *_first_and_best(problem_set, problem, x, runner, steps)

    many = jax.vmap(jax.vmap(one, (None, problem_set.axes, 0)), (0, None, 0))
    num_seeds = len(jax.tree.leaves(params)[0])
    points = jax.jit(many)(params, problem_set.problems, _keys(problem_set, num_seeds))
    calls = gradient_calls(config.guidance, cell.num_steps, sampler=config.sampler)
    return _summary(problem_set, points) | {"gradient_calls": calls, "refine_steps": steps}


def measure_without(problem_set: ProblemSet, num_seeds: int) -> dict[str, Any]:
    """The same without a network, from normal starts in the frame; for LASSO, from its own start."""
    family = problem_set.family
    steps, runner = _refinement(problem_set, None)

    def one(problem, key):
        x = gaussian_starts(family, problem, key, MANY)
        if problem_set.kind == "lasso":
            x = family.start(problem)[None]
        return x[0], *_first_and_best(problem_set, problem, x, runner, steps)

    many = jax.vmap(jax.vmap(one, (problem_set.axes, 0)), (None, 0))
    points = jax.jit(many)(problem_set.problems, _keys(problem_set, num_seeds))
    return _summary(problem_set, points) | {"gradient_calls": 0, "refine_steps": steps}


def _keys(problem_set: ProblemSet, num_seeds: int) -> jax.Array:
    return jax.random.split(jax.random.key(1), (num_seeds, len(problem_set.optimum)))


def _refinement(problem_set: ProblemSet, cell: Cell | None) -> tuple[int, Callable]:
    """Steps of the classic optimizer, and it."""
    lasso = problem_set.kind == "lasso"
    steps = cell.refine_steps if cell else None
    steps = (10 if lasso else 20) if steps is None else steps
    solver = functools.partial(fista, restart=True) if lasso else damped_newton
    return steps, functools.partial(solver, problem_set.family)


def _first_and_best(problem_set, problem, x, runner, steps):
    """The first proposal refined, and the best of all refined."""
    objective = objective_of(problem_set.family, problem)
    solver = functools.partial(runner, problem)
    return tuple(refine(objective, some, solver, steps).x for some in (x[:1], x))


def _summary(problem_set: ProblemSet, points: tuple[jax.Array, ...]) -> dict[str, Any]:
    """By seed: mean gap and share of successes, of each kind of points `[seeds, N, n]`."""
    row = {}
    for name, x in zip(("raw", "refined", "best"), points, strict=True):
        gaps = [problem_set.gaps(one) for one in np.asarray(x)]
        row[f"{name}_gap"] = [_number(g.mean()) for g in gaps]
        row[f"{name}_success"] = [float((g < SUCCESS).mean()) for g in gaps]
    return row


def _number(value: float) -> float | None:
    """Four significant digits, None for what is not finite."""
    return float(f"{value:.4g}") if np.isfinite(value) else None


def run(arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    """Every cell that is missing."""
    trainer = Trainer(arguments.seeds, arguments.quick)

    def add(problem_set: ProblemSet, place: tuple[str, str, str], cell: Cell | None):
        name, axis, value = place
        rows = results["cells"].setdefault(name, {}).setdefault(axis, {})
        if value in rows:
            return
        if cell is None:
            row = measure_without(problem_set, arguments.seeds)
        else:
            params, seconds = trainer(problem_set, cell.config)
            row = measure(problem_set, cell, params) | {"training_seconds": round(seconds, 1)}
        rows[value] = row
        write_atomically(arguments.results, (json.dumps(results) + "\n").encode())
        print(name, axis, value, np.mean([g or np.nan for g in row["refined_gap"]]), flush=True)

    for name in arguments.sets:
        axes = [axis for axis in arguments.axes if (axis == SWEPT) == (name in SWEEPS)]
        if axes and name in SWEEPS:
            for size in DIMENSIONS[: 1 if arguments.quick else None]:
                problem_set = sized_set(name.partition("_")[0], size)
                config = SWEEPS[name]
                cell = Cell(SWEPT, str(size), config, config.num_steps)
                add(problem_set, (name, SWEPT, str(size)), cell)
                add(problem_set, (name, "without a network", str(size)), None)
        elif axes:
            problem_set = make_set(name, arguments.oracles)
            add(problem_set, (name, "without a network", "-"), None)
            for cell in (cell for axis in axes for cell in cells_of(axis, BASES[name])):
                add(problem_set, (name, cell.axis, cell.value), cell)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    sets = (*BASES, *SWEEPS)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=AXES)
    parser.add_argument("--sets", nargs="+", choices=sets, default=sets)
    parser.add_argument("--seeds", type=int, default=5, help="of training, in one call")
    parser.add_argument("--oracles", type=pathlib.Path, help=".npz of instances with known optima")
    parser.add_argument("--results", type=pathlib.Path)
    parser.add_argument("--quick", action="store_true", help="next to no training")
    parsed = parser.parse_args(arguments)
    if parsed.results is None:
        parsed.results = RESULTS.with_stem("results_quick") if parsed.quick else RESULTS
    return parsed


def main() -> None:
    """Runs what is missing."""
    arguments = parse()
    results = {"quick": arguments.quick, "cells": {}}
    if arguments.results.exists():
        results = json.loads(arguments.results.read_text())
    if results["quick"] != arguments.quick:
        raise SystemExit(f"{arguments.results} is not of a run with quick={arguments.quick}.")
    results["environment"] = environment()
    run(arguments, results)
    report.write(arguments.results)


if __name__ == "__main__":
    sys.exit(main())
