"""A run of Diff-L2O over one directory: train or load, solve, compare. Nothing here prints.

config.json   metrics.jsonl   checkpoints/   results.json   solutions.npz   convergence.svg ...
"""

import dataclasses
import functools
import io
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lohp_jax.checks import check_option
from lohp_jax.diffusion.config import DiffusionConfig
from lohp_jax.diffusion.denoiser import DenoiserConfig, product_pairs
from lohp_jax.diffusion.fitting import OnProgress, silent
from lohp_jax.diffusion.generator import diffusion_generator, regression_config
from lohp_jax.diffusion.guidance import GuidanceConfig, gradient_calls
from lohp_jax.diffusion.refine import refine
from lohp_jax.diffusion.sampler import num_evaluations
from lohp_jax.diffusion.training import (
    DIFFUSION,
    WARM_START,
    initial_params,
    initial_state,
    train_diffusion,
)
from lohp_jax.evaluation.records import SCHEMA
from lohp_jax.files import write_atomically
from lohp_jax.runs import environment, open_directory, read_config, write_json
from lohp_jax.solvers.descent import lbfgs, run_optax
from lohp_jax.solvers.multistart import gaussian_starts
from lohp_jax.solvers.newton import damped_newton
from lohp_jax.solvers.proximal import fista
from lohp_jax.tasks import PROBLEMS, make_problem
from lohp_jax.training import checkpoint, metrics
from lohp_jax.types import Generator, ProblemFamily, PyTree

REFINERS = ("fista", "newton", "lbfgs", "adam")
SUCCESS = 1e-2
"""A relative gap below it is a success."""
_BATCH = 256  # problems solved in one piece
_SAVE_SECONDS = 20.0


@dataclasses.dataclass(frozen=True)
class SolveConfig:
    """What is trained and how problems are solved."""

    family: str = "lasso_fixed"
    """Name of the family of problems."""
    seed: int = 0
    """Of training, problems and samples."""
    num_problems: int = 256
    """Held-out problems to generate where none are given."""
    num_samples: int = 8
    """Proposals for each problem; the best one after refinement counts."""
    refiner: Literal["auto", "fista", "newton", "lbfgs", "adam"] = "auto"
    """What improves proposals; "auto": fista where there is a proximal map, newton in up to ten
    dimensions, else lbfgs."""
    refine_steps: int = 10
    """Its steps from every proposal, and from the baseline's start."""
    diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)
    """Of the generator."""
    training_family: str | None = None
    """Family to train on, if another: LASSO of any size, for a denoiser of kind "lasso"."""

    def __post_init__(self):
        check_option("solve", "family", self.family, PROBLEMS)
        check_option("solve", "refiner", self.refiner, ("auto", *REFINERS))
        for name in ("num_problems", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.refine_steps < 0:
            raise ValueError(f"refine_steps must be 0 or more, got {self.refine_steps}.")
        if self.training_family in (None, self.family):
            return
        check_option("solve", "training_family", self.training_family, PROBLEMS)
        both = self.family, self.training_family
        if self.diffusion.network.kind != "lasso" or not all(f.startswith("lasso") for f in both):
            raise ValueError(
                f"training_family must be {self.family!r} or unset, got {self.training_family!r}; only "
                "a denoiser of kind 'lasso' serves another family, and that LASSO."
            )


def preset(family: str) -> SolveConfig:
    """Settings that suit a family, to be changed at will.

    Raises: ValueError for an unknown family, with the nearest.
    """
    check_option("solve", "family", family, PROBLEMS)
    if family.startswith("lasso"):
        diffusion = DiffusionConfig(
            network=DenoiserConfig(kind="lasso", width=32, depth=8),
            gap_unit="optimum",
            pool=8192,
            learning_rate=3e-3,
            ema=0.99,
            num_steps=2,
        )
        small = "lasso" if family == "lasso_250x500" else None
        return SolveConfig(family, num_samples=1, diffusion=diffusion, training_family=small)
    diffusion = DiffusionConfig(
        network=DenoiserConfig(width=128),
        guidance=GuidanceConfig(("smoothed_gradient",)),
        alpha=0.9,
        pool=8192,
        batch_size=256,
        updates=3000,
        ema=0.995,
    )
    return SolveConfig(family, num_samples=64, refine_steps=20, diffusion=diffusion)


class Solved(NamedTuple):
    """Solutions of problems, each with a leading axis of problems `[M, ...]`.

    Attributes:
      proposals: `[M, K, n]` samples of the generator.
      proposed: `[M, K]` the objective there.
      x: `[M, n]` after refinement.
      value: `[M]` the objective there.
      baseline: `[M]` what the refiner finds from the family's start.
      multistart: `[M]` what it finds from as many random starts as there are proposals.
      curves: `[M, 3, steps + 1]` best value so far of the refiner from all proposals, from the random
        starts and from the family's start.
      reference: `[M]` the objective at the label solver's solution.
      gradient_calls: `[M]` of refinement and baseline.
      objective_calls: `[M]` likewise.
    """

    proposals: jax.Array
    proposed: jax.Array
    x: jax.Array
    value: jax.Array
    baseline: jax.Array
    multistart: jax.Array
    curves: jax.Array
    reference: jax.Array
    gradient_calls: jax.Array
    objective_calls: jax.Array


def open_solve_run(directory: str | os.PathLike, config: SolveConfig) -> None:
    """Makes a run directory for `config`, or checks that the one that is there has the same.

    Raises: ValueError for another config (with the first field that differs) or one that does not read.
    """
    open_directory(directory, config)


def read_solve_config(directory: str | os.PathLike) -> SolveConfig:
    """The config of a run that is there.

    Raises: ValueError if it does not read.
    """
    return read_config(directory, SolveConfig)


def trained_generator(
    directory: str | os.PathLike, config: SolveConfig, on_progress: OnProgress = silent
) -> Generator:
    """The generator of a run; trained, from where an earlier process stopped, if it is not there yet.

    Raises: ValueError if a checkpoint is damaged; FloatingPointError if training diverges;
      KeyboardInterrupt after saving, if interrupted.
    """
    served = make_problem(config.family)
    family = make_problem(config.training_family or config.family)
    directory, folder = pathlib.Path(directory), pathlib.Path(directory) / "checkpoints"
    shapes = functools.partial(_initial, family, config.diffusion)
    stored = _restored(folder / "generator", shapes)
    if stored is not None:
        return diffusion_generator(served, config.diffusion, stored)
    lines, states = directory / "metrics.jsonl", {}
    for method in (WARM_START, DIFFUSION):
        shapes = functools.partial(
            initial_state, family, config.diffusion, method, jax.random.key(0)
        )
        states[method] = _restored(folder / method, shapes)
        metrics.drop_lines_after(lines, method, int(states[method].step) if states[method] else 0)

    def after_chunk(progress):
        line = {"method": progress.method, "step": progress.step, **progress.metrics}
        metrics.append_line(lines, line)
        on_progress(progress)

    saved = time.monotonic()

    def keep(method, state):
        nonlocal saved
        states[method], steps = state, int(state.step)
        if steps == config.diffusion.updates or time.monotonic() - saved > _SAVE_SECONDS:
            _save(folder / method, steps, state, config)
            saved = time.monotonic()

    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    try:
        generator = train_diffusion(
            family,
            config.diffusion,
            key,
            on_progress=after_chunk,
            states=states,
            on_state=keep,
        )
    except KeyboardInterrupt:
        for method, state in states.items():
            if state is not None:
                _save(folder / method, int(state.step), state, config)
        raise
    _save(folder / "generator", config.diffusion.updates, generator.params, config)
    return diffusion_generator(served, config.diffusion, generator.params)


def load_solver(directory: str | os.PathLike) -> Generator:
    """The generator that `lohp solve` left in a directory; its `family` names what it serves.

    Raises: FileNotFoundError if there is none, ValueError if it is damaged.
    """
    if checkpoint.latest_step(pathlib.Path(directory) / "checkpoints" / "generator") is None:
        raise FileNotFoundError(
            f"load_solver: expected a trained generator in {os.fspath(directory)!r}, got none; make one "
            "with `lohp solve --out DIR`."
        )
    return trained_generator(directory, read_solve_config(directory))


def _save(folder: pathlib.Path, step: int, tree: PyTree, config: SolveConfig) -> None:
    checkpoint.save(folder, step, _named(tree), dataclasses.asdict(config), keep=1)


def _restored(folder: pathlib.Path, make: Callable[[], PyTree]) -> PyTree | None:
    """The newest checkpoint, of the shapes of what `make` returns; None without one."""
    if checkpoint.latest_step(folder) is None:
        return None
    template = jax.eval_shape(make)
    stored = checkpoint.restore(folder, _named(template))[1]
    return jax.tree.unflatten(jax.tree.structure(template), [stored[n] for n in _named(template)])


def _initial(family: ProblemFamily, config: DiffusionConfig) -> PyTree:
    key, warm = jax.random.key(0), None
    if config.warm_start:
        warm = initial_params(family, regression_config(config), key) | {"scale": jnp.ones(())}
    return initial_params(family, config, key) | {"warm": warm}


def _named(tree: PyTree) -> dict[str, Any]:
    """Leaves by path: checkpoints hold no empty parts."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def solve(
    generator: Generator, config: SolveConfig, problems: PyTree, key: jax.Array
) -> tuple[Solved, dict[str, float]]:
    """Proposes, refines and compares.

    Args:
      generator: of `trained_generator`.
      config: of the run.
      problems: with a leading axis `[M]`, all of one shape.
      key: randomness of the samples.

    Returns: the solutions, and seconds of one problem for "propose", "refine", "multistart" and
      "baseline", in batches, after compilation.
    """
    family = make_problem(config.family)
    run = refiner_of(config, family, problems)
    keys = jax.random.split(key, len(jax.tree.leaves(problems)[0]))
    batched = functools.partial(_in_batches, len(keys))

    def propose(problem, key):
        samples = functools.partial(generator.apply, generator.params, problem, temperature=1.0)
        return jax.vmap(samples)(jax.random.split(key, config.num_samples))

    def improve(problem, proposals):
        objective, start = functools.partial(_objective, family, problem), family.start(problem)
        solver = functools.partial(run, problem)
        return refine(objective, proposals, solver, config.refine_steps, baseline=start)

    def random_starts(problem, key):
        return gaussian_starts(family, problem, key, config.num_samples)

    def from_random(problem, key):
        objective = functools.partial(_objective, family, problem)
        solver = functools.partial(run, problem)
        return refine(objective, random_starts(problem, key), solver, config.refine_steps).value

    def from_start(problem):
        return run(problem, family.start(problem), config.refine_steps).x

    def look(problem, key, proposals):
        objective = functools.partial(_objective, family, problem)
        starts = proposals, random_starts(problem, key), family.start(problem)[None]
        curves = [
            jax.vmap(lambda x: run(problem, x, config.refine_steps).values)(x) for x in starts
        ]
        best = [jnp.min(jnp.nan_to_num(curve, nan=jnp.inf), axis=0) for curve in curves]
        curves = jnp.stack([jax.lax.cummin(curve) for curve in best])
        return jax.vmap(objective)(proposals), curves, objective(family.solve(problem, key))

    seconds = {}
    proposals, seconds["propose"] = batched(propose, problems, keys)
    refined, seconds["refine"] = batched(improve, problems, proposals)
    multistart, seconds["multistart"] = batched(from_random, problems, keys)
    _, seconds["baseline"] = batched(from_start, problems)
    (proposed, curves, reference), _ = batched(look, problems, keys, proposals)
    solved = Solved(
        proposals=proposals,
        proposed=proposed,
        x=refined.x,
        value=refined.value,
        baseline=refined.baseline,
        multistart=multistart,
        curves=curves,
        reference=reference,
        gradient_calls=refined.gradient_calls,
        objective_calls=refined.objective_calls,
    )
    return solved, seconds


def refiner_of(config: SolveConfig, family: ProblemFamily, problems: PyTree) -> Callable[..., Any]:
    """`(problem, x0, num_steps) -> Trace` of the refiner that the config names or lets us choose.

    Raises: ValueError for fista where the family has no proximal map.
    """
    name = config.refiner
    if name == "auto":
        size = jax.eval_shape(family.start, jax.tree.map(lambda leaf: leaf[0], problems)).size
        name = "fista" if family.composite else "newton" if size <= 10 else "lbfgs"
    if name == "fista" and family.composite is None:
        raise ValueError(
            f"solve: refiner fista needs a proximal map, which {config.family} lacks; use newton, "
            "lbfgs or adam."
        )
    solver = {
        "fista": fista,
        "newton": damped_newton,
        "lbfgs": lbfgs,
        "adam": functools.partial(run_optax, optimizer=optax.adam(0.1)),
    }[name]
    return lambda problem, x0, num_steps: solver(family, problem, x0, num_steps)


def _objective(family: ProblemFamily, problem: PyTree, x: jax.Array) -> jax.Array:
    return family.objective(x, problem)


def _in_batches(count: int, fn: Callable, *trees: PyTree) -> tuple[PyTree, float]:
    """`fn` over leading axes, and the seconds of one problem in a second run."""
    mapped = jax.jit(lambda *args: jax.lax.map(lambda a: fn(*a), args, batch_size=_BATCH))
    jax.block_until_ready(mapped(*trees))
    began = time.perf_counter()
    out = jax.block_until_ready(mapped(*trees))
    return out, (time.perf_counter() - began) / count


def solve_run(
    directory: str | os.PathLike,
    config: SolveConfig,
    problems: PyTree | None = None,
    on_progress: OnProgress = silent,
    on_stage: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Trains or loads, solves, and writes results.json, solutions.npz and plots.

    Args:
      directory: that `open_solve_run` made.
      config: the same.
      problems: of `read_problems`; None for held-out ones of the family.
      on_progress: called after each chunk of training.
      on_stage: called with what is being done.

    Returns: the results.

    Raises: OSError if the disk is full.
    """
    from lohp_jax.evaluation.solve_plots import draw_solve_plots

    directory, family = pathlib.Path(directory), make_problem(config.family)
    on_stage("training")
    generator = trained_generator(directory, config, on_progress)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    problem_key, sample_key = jax.random.split(key)
    if problems is None:
        keys = jax.random.split(problem_key, config.num_problems)
        problems = jax.jit(jax.vmap(lambda key: family.sample(key, "held_out")))(keys)
    on_stage("solving")
    solved, seconds = solve(generator, config, problems, sample_key)
    results = {
        "schema": SCHEMA,
        "family": config.family,
        "config": dataclasses.asdict(config),
        "environment": environment(),
        "rows": rows_of(config, solved, seconds),
    }
    on_stage("drawing")
    arrays = {name: np.asarray(getattr(solved, name)) for name in ("x", "value", "reference")}
    _write_npz(directory / "solutions.npz", arrays)
    curves = convergence(config, solved, seconds)
    draw_solve_plots(directory, family, generator, problems, curves, sample_key)
    write_json(directory / "results.json", results)
    return results


class Calls(NamedTuple):
    """What one problem costs.

    Attributes:
      networks: evaluations of the denoiser.
      proposing: gradients, or pairs of products, that the denoiser asks for.
      refining: gradients of the refiner from all proposals and the baseline's start.
      baseline: gradients of the refiner from that start alone.
    """

    networks: int
    proposing: int
    refining: float
    baseline: float


def calls_of(config: SolveConfig, solved: Solved) -> Calls:
    """Counts the calls of a run."""
    diffusion, count = config.diffusion, config.num_samples
    networks = num_evaluations(diffusion.sampler, diffusion.num_steps)
    seen = gradient_calls(diffusion.guidance, diffusion.num_steps, count, sampler=diffusion.sampler)
    if diffusion.network.kind == "lasso":
        seen += product_pairs(diffusion.network, networks) * count
    refining = float(np.mean(solved.gradient_calls))
    return Calls(networks * count, seen, refining, refining / (count + 1))


def rows_of(config: SolveConfig, solved: Solved, seconds: dict[str, float]) -> list[dict[str, Any]]:
    """A row of results for each method; calls and milliseconds are those of one problem."""
    calls = calls_of(config, solved)
    best = np.nanmin(np.asarray(solved.proposed), axis=1)
    both = seconds["propose"] + seconds["refine"]
    methods = {
        "diffusion": (best, seconds["propose"], calls.networks, calls.proposing),
        "diffusion_refined": (
            solved.value,
            both,
            calls.networks,
            calls.proposing + calls.refining,
        ),
        "multistart": (
            solved.multistart,
            seconds["multistart"],
            0,
            calls.baseline * config.num_samples,
        ),
        "baseline": (solved.baseline, seconds["baseline"], 0, calls.baseline),
    }
    return [
        {
            "method": method,
            "seed": config.seed,
            "split": "held_out",
            "num_problems": len(solved.value),
            **gap_statistics(relative_gap(np.asarray(values), np.asarray(solved.reference))),
            "milliseconds": 1e3 * time_taken,
            "network_calls": network_calls,
            "gradient_calls": float(gradients),
        }
        for method, (values, time_taken, network_calls, gradients) in methods.items()
    ]


def convergence(
    config: SolveConfig, solved: Solved, seconds: dict[str, float]
) -> dict[str, dict[str, np.ndarray]]:
    """The refiner from the proposals, from random starts and from the family's start; see `Solved`."""
    calls, steps = calls_of(config, solved), np.linspace(0, 1, config.refine_steps + 1)
    reference, count = np.asarray(solved.reference)[:, None], config.num_samples
    costs = {  # before the first step, and of all steps
        "from proposals": (calls.proposing, calls.baseline * count, "propose", "refine"),
        "from as many random starts": (0, calls.baseline * count, None, "multistart"),
        "from the start": (0, calls.baseline, None, "baseline"),
    }
    return {
        name: {
            "gaps": relative_gap(np.asarray(solved.curves)[:, row], reference),
            "calls": before + gradients * steps,
            "milliseconds": 1e3 * (seconds.get(first, 0.0) + seconds[then] * steps),
        }
        for row, (name, (before, gradients, first, then)) in enumerate(costs.items())
    }


def relative_gap(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(f - f*) / |f*|; negative where f is below the label solver's."""
    return (values - reference) / np.maximum(np.abs(reference), np.finfo(np.float32).tiny)


def gap_statistics(gaps: np.ndarray) -> dict[str, float]:
    """Mean, quartiles, and the share of successes."""
    low, middle, high = np.quantile(gaps, [0.25, 0.5, 0.75])
    return {
        "gap_mean": float(np.mean(gaps)),
        "gap_median": float(middle),
        "gap_quartiles": [float(low), float(high)],
        "success": float(np.mean(gaps < SUCCESS)),
    }


def _write_npz(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomically(path, buffer.getvalue())
