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
from lohp_jax.diffusion.generator import diffusion_generator, problem_check, regression_config
from lohp_jax.diffusion.guidance import GuidanceConfig, gradient_calls
from lohp_jax.diffusion.sampler import num_evaluations
from lohp_jax.diffusion.training import DIFFUSION, WARM_START, initial_params, train_diffusion
from lohp_jax.files import SCHEMA, first_difference, write_atomically, write_json
from lohp_jax.networks.denoiser import DenoiserConfig, product_pairs
from lohp_jax.problems import PROBLEMS, make_problem
from lohp_jax.problems.reference import TOLERANCE, solve_certified
from lohp_jax.runs.config import from_json
from lohp_jax.runs.directory import environment, open_directory, read_config
from lohp_jax.solvers.descent import lbfgs, run_optax
from lohp_jax.solvers.multistart import gaussian_starts
from lohp_jax.solvers.newton import damped_newton
from lohp_jax.solvers.proximal import fista
from lohp_jax.solvers.refine import refine
from lohp_jax.solvers.trace import objective_of
from lohp_jax.training import checkpoint
from lohp_jax.training.distributed import Strategy
from lohp_jax.training.engine import OnProgress, Saving, silent
from lohp_jax.types import Generator, ProblemFamily, PyTree

REFINERS = ("fista", "newton", "lbfgs", "adam")
SUCCESS = 1e-2
"""A gap below it is a success."""
_MEMORY, _MOST = 2**30, 256  # of the problems solved in one piece: bytes, and their number
_NUM_CHECKPOINTS = 10  # of a training
_ARRAYS = ("x", "value", "reference", "certified")  # of solutions.npz


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
    large = family == "fit_mlp"  # labels take half a second each, and n is 1510
    diffusion = DiffusionConfig(
        network=DenoiserConfig(width=128),
        guidance=GuidanceConfig(("smoothed_gradient",)),
        alpha=0.9,
        pool=512 if large else 8192,
        batch_size=32 if large else 256,
        updates=1000 if large else 3000,
        ema=0.995,
    )
    count = 8 if large else 64
    return SolveConfig(family, num_samples=count, refine_steps=20, diffusion=diffusion)


class Solutions(NamedTuple):
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
      reference: `[M]` float64, what gaps count from, see `Reference.floor`: f* where it is certified.
      certified: `[M]` whether it is.
      objective_calls: stage -> `[M]`, of "refine" (from proposals and start), "multistart" and
        "baseline".
      gradient_calls: likewise.
    """

    proposals: jax.Array
    proposed: jax.Array
    x: jax.Array
    value: jax.Array
    baseline: jax.Array
    multistart: jax.Array
    curves: jax.Array
    reference: np.ndarray
    certified: np.ndarray
    objective_calls: dict[str, jax.Array]
    gradient_calls: dict[str, jax.Array]


def open_solve_run(directory: str | os.PathLike, config: SolveConfig) -> None:
    """Makes a run directory for `config`, or checks that the one that is there trains the same.

    Raises: ValueError for a config of another training (with the first field that differs) or one that
      does not read.
    """
    if not (pathlib.Path(directory) / "config.json").exists():
        open_directory(directory, config)
    _check_training(directory, read_solve_config(directory), config)


def _check_training(place: str | os.PathLike, stored: SolveConfig, config: SolveConfig) -> None:
    """Raises ValueError if two configs differ in what the training depends on."""
    there, here = (
        {name: values[name] for name in ("family", "training_family", "seed", "diffusion")}
        for values in map(dataclasses.asdict, (stored, config))
    )
    if difference := first_difference(there, here):
        raise ValueError(
            f"{place} holds a run with another config: {difference}; choose another --out, or give the "
            "same options."
        )


def read_solve_config(directory: str | os.PathLike) -> SolveConfig:
    """The config of a run that is there.

    Raises: ValueError if it does not read.
    """
    return read_config(directory, SolveConfig)


def trained_generator(
    directory: str | os.PathLike,
    config: SolveConfig,
    *,
    strategy: Strategy = "jit",
    on_progress: OnProgress = silent,
) -> Generator:
    """The generator of a run; trained, from where an earlier process stopped, if it is not there yet.

    Raises: ValueError if a checkpoint is damaged or of another training; DivergedError if training
      diverges; KeyboardInterrupt after saving, if interrupted.
    """
    served = make_problem(config.family)
    family = make_problem(config.training_family or config.family)
    directory, folder = pathlib.Path(directory), pathlib.Path(directory) / "checkpoints"
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("generator", WARM_START, DIFFUSION):
        _check_stored(folder / name, config)
    if checkpoint.latest_step(folder / "generator") is not None:
        shapes = jax.eval_shape(functools.partial(_initial, family, config.diffusion))
        params = checkpoint.restore(folder / "generator", shapes)[1]
        return diffusion_generator(served, config.diffusion, params)
    every, settings = -(-config.diffusion.updates // _NUM_CHECKPOINTS), dataclasses.asdict(config)
    generator = train_diffusion(
        family,
        config.diffusion,
        jax.random.fold_in(jax.random.key(config.seed), 0),
        strategy=strategy,
        saving=Saving(directory, every, settings),
        on_progress=on_progress,
    )
    updates = config.diffusion.updates
    checkpoint.save(folder / "generator", updates, generator.params, settings)
    return diffusion_generator(served, config.diffusion, generator.params)


def load_solver(directory: str | os.PathLike) -> Generator:
    """The generator that `lohp solve` left in a directory; its `family` names what it serves.

    Raises: FileNotFoundError if there is none, ValueError if it is damaged, or of another family than
      the directory's config.
    """
    if checkpoint.latest_step(pathlib.Path(directory) / "checkpoints" / "generator") is None:
        raise FileNotFoundError(
            f"load_solver: expected a trained generator in {os.fspath(directory)!r}, got none; make one "
            "with `lohp solve --out DIR`."
        )
    return trained_generator(directory, read_solve_config(directory))


def _check_stored(folder: pathlib.Path, config: SolveConfig) -> None:
    """Raises ValueError for a newest checkpoint of another training."""
    if checkpoint.latest_step(folder) is not None:
        stored = from_json(checkpoint.read_config(folder), SolveConfig, os.fspath(folder))
        _check_training(folder, stored, config)


def _initial(family: ProblemFamily, config: DiffusionConfig) -> PyTree:
    key, warm = jax.random.key(0), None
    if config.warm_start:
        warm = initial_params(family, regression_config(config), key) | {"scale": jnp.ones(())}
    return initial_params(family, config, key) | {"warm": warm}


def check_problems(config: SolveConfig, problems: PyTree) -> None:
    """Refuses problems that the generator of a config will not serve; needs no training.

    Args:
      config: of the run.
      problems: with a leading axis.

    Raises: ValueError that names the first of them.
    """
    check = problem_check(make_problem(config.family), config.diffusion)
    problems = jax.device_get(problems)
    for index in range(len(jax.tree.leaves(problems)[0])):
        try:
            check({name: array[index] for name, array in problems.items()})
        except ValueError as error:
            raise ValueError(f"problem {index}: {error}") from error


def solve(
    generator: Generator, config: SolveConfig, problems: PyTree, key: jax.Array
) -> tuple[Solutions, dict[str, float]]:
    """Proposes, refines and compares.

    Args:
      generator: of `trained_generator`.
      config: of the run.
      problems: with a leading axis `[M]`, all of one shape.
      key: randomness of the samples.

    Returns: the solutions, and seconds of one problem for "propose", "refine", "multistart" and
      "baseline", in batches, after compilation.

    Raises: ValueError for a generator of another family.
    """
    if generator.family not in (config.family, config.training_family):
        raise ValueError(
            f"solve: expected a generator of {config.training_family or config.family}, got one of "
            f"{generator.family}; load it with `load_solver`, or set the config's family."
        )
    family = make_problem(config.family)
    stages = _stages(generator, config, family, refiner_of(config, family, problems))
    keys = jax.random.split(key, len(jax.tree.leaves(problems)[0]))
    batched = functools.partial(_in_batches, batch_size(config, family, problems))
    refined, seconds = {}, {}
    proposals, seconds["propose"] = batched(stages.propose, problems, keys)
    refined["refine"], seconds["refine"] = batched(stages.from_proposals, problems, proposals)
    refined["multistart"], seconds["multistart"] = batched(stages.from_random, problems, keys)
    refined["baseline"], seconds["baseline"] = batched(stages.from_start, problems)
    proposed, _ = batched(stages.look, problems, proposals)
    reference = solve_certified(family, problems, keys)
    solutions = Solutions(
        proposals=proposals,
        proposed=proposed,
        x=refined["refine"].x,
        value=refined["refine"].value,
        baseline=refined["refine"].baseline,
        multistart=refined["multistart"].value,
        curves=jnp.stack([found.curve for found in refined.values()], axis=1),
        reference=reference.floor,
        certified=reference.certified,
        objective_calls={name: found.objective_calls for name, found in refined.items()},
        gradient_calls={name: found.gradient_calls for name, found in refined.items()},
    )
    return solutions, seconds


class _Stages(NamedTuple):
    """What is done with one problem.

    Attributes:
      propose: `(problem, key) -> [K, n]`, samples of the generator.
      from_proposals: `(problem, proposals) -> Refined`, with the family's start beside them.
      from_random: `(problem, key) -> Refined`, from as many random starts.
      from_start: `(problem) -> Refined`, from the family's start.
      look: `(problem, proposals) -> [K]`, the objective there.
    """

    propose: Callable[..., Any]
    from_proposals: Callable[..., Any]
    from_random: Callable[..., Any]
    from_start: Callable[..., Any]
    look: Callable[..., Any]


def _stages(
    generator: Generator, config: SolveConfig, family: ProblemFamily, run: Callable[..., Any]
) -> _Stages:
    def propose(problem, key):
        samples = functools.partial(generator.apply, generator.params, problem, temperature=1.0)
        return jax.vmap(samples)(jax.random.split(key, config.num_samples))

    def improve(problem, starts, baseline=None):
        objective, solver = objective_of(family, problem), functools.partial(run, problem)
        return refine(objective, starts, solver, config.refine_steps, baseline=baseline)

    def from_proposals(problem, proposals):
        return improve(problem, proposals, family.start(problem))

    def from_random(problem, key):
        return improve(problem, gaussian_starts(family, problem, key, config.num_samples))

    def from_start(problem):
        return improve(problem, family.start(problem))

    def look(problem, proposals):
        return jax.vmap(objective_of(family, problem))(proposals)

    return _Stages(propose, from_proposals, from_random, from_start, look)


def batch_size(config: SolveConfig, family: ProblemFamily, problems: PyTree) -> int:
    """Problems to solve in one piece: as many as `_MEMORY` has room for, at most 256.

    Of each sample there are the paths of sampler and refiner, in two copies, and some 40 vectors that
    L-BFGS keeps; and gradients at all probes, each as large as a problem on its way.
    """
    one = jax.eval_shape(lambda trees: jax.tree.map(lambda leaf: leaf[0], trees), problems)
    n, size = jax.eval_shape(family.start, one).size, sum(x.size for x in jax.tree.leaves(one))
    path = 2 * (config.refine_steps + 1 + config.diffusion.num_steps) + 40
    floats = n * path + 2 * config.diffusion.guidance.probes * (n + size)
    return int(np.clip(_MEMORY // (4 * config.num_samples * floats), 1, _MOST))


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


def _in_batches(size: int, fn: Callable, *trees: PyTree) -> tuple[PyTree, float]:
    """`fn` over leading axes, `size` at once, and the seconds of one problem in a second run."""
    mapped = jax.jit(lambda *args: jax.lax.map(lambda a: fn(*a), args, batch_size=size))
    jax.block_until_ready(mapped(*trees))
    began = time.perf_counter()
    out = jax.block_until_ready(mapped(*trees))
    return out, (time.perf_counter() - began) / len(jax.tree.leaves(trees)[0])


def solve_run(
    directory: str | os.PathLike,
    config: SolveConfig,
    problems: PyTree | None = None,
    *,
    strategy: Strategy = "jit",
    on_progress: OnProgress = silent,
    on_stage: Callable[[str], None] = silent,
) -> dict[str, Any]:
    """Trains or loads, solves, and writes results.json, solutions.npz and plots.

    Args:
      directory: that `open_solve_run` made.
      config: the same.
      problems: of `read_problems`; None for held-out ones of the family.
      strategy: of the training, see `compile_update`.
      on_progress: called after each chunk of training.
      on_stage: called with what is being done.

    Returns: the results.

    Raises: ValueError, before training, for problems that the generator would not serve; OSError if
      the disk is full; what `trained_generator` raises.
    """
    from lohp_jax.evaluation.solve_plots import draw_solve_plots

    directory, family = pathlib.Path(directory), make_problem(config.family)
    if problems is not None:
        check_problems(config, problems)
    on_stage("training")
    generator = trained_generator(directory, config, strategy=strategy, on_progress=on_progress)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    problem_key, sample_key = jax.random.split(key)
    if problems is None:
        keys = jax.random.split(problem_key, config.num_problems)
        problems = jax.jit(jax.vmap(lambda key: family.sample(key, "held_out")))(keys)
    on_stage("solving")
    solutions, seconds = solve(generator, config, problems, sample_key)
    results = {
        "schema": SCHEMA,
        "family": config.family,
        "gap": gap_of(family),
        "certified": int(np.sum(solutions.certified)),
        "config": dataclasses.asdict(config),
        "environment": environment(),
        "rows": rows_of(config, solutions, seconds),
    }
    arrays = {name: np.asarray(getattr(solutions, name)) for name in _ARRAYS}
    _write_npz(directory / "solutions.npz", arrays)
    write_json(directory / "results.json", results)
    on_stage("drawing")
    curves = convergence(config, solutions, seconds)
    draw_solve_plots(directory, family, generator, problems, curves, sample_key, gap=results["gap"])
    return results


class Calls(NamedTuple):
    """What one problem costs.

    Attributes:
      networks: evaluations of the denoiser, and of the regression of a warm start.
      objectives: evaluations of the objective.
      gradients: of the objective, or pairs of products with A and A^T.
    """

    networks: int
    objectives: float
    gradients: float


def calls_of(config: SolveConfig, solutions: Solutions) -> dict[str, Calls]:
    """Counts the calls of the stages "propose", "refine", "multistart" and "baseline"."""
    diffusion, count = config.diffusion, config.num_samples
    networks = num_evaluations(diffusion.sampler, diffusion.num_steps) * count
    seen = gradient_calls(diffusion.guidance, diffusion.num_steps, count, sampler=diffusion.sampler)
    if diffusion.network.kind == "lasso":  # all samples share the preparation
        seen += product_pairs(diffusion.network, networks)
        seen += diffusion.warm_start * product_pairs(diffusion.network, 1)
    calls = {"propose": Calls(networks + diffusion.warm_start, 0.0, float(seen))}
    for stage, gradients in solutions.gradient_calls.items():
        objectives = float(np.mean(solutions.objective_calls[stage]))
        calls[stage] = Calls(0, objectives, float(np.mean(gradients)))
    return calls


def rows_of(
    config: SolveConfig, solutions: Solutions, seconds: dict[str, float]
) -> list[dict[str, Any]]:
    """A row of results for each method; calls and milliseconds are those of one problem."""
    calls, gap = calls_of(config, solutions), gap_of(make_problem(config.family))
    proposed = np.asarray(solutions.proposed)
    best = np.min(np.where(np.isfinite(proposed), proposed, np.inf), axis=1)
    chosen = Calls(0, float(config.num_samples), 0.0)  # looks, to find the best proposal
    methods = {
        "diffusion": (best, ("propose",), (calls["propose"], chosen)),
        "diffusion_refined": (
            solutions.value,
            ("propose", "refine"),
            (calls["propose"], calls["refine"]),
        ),
        "multistart": (solutions.multistart, ("multistart",), (calls["multistart"],)),
        "baseline": (solutions.baseline, ("baseline",), (calls["baseline"],)),
    }
    rows = []
    for method, (values, stages, costs) in methods.items():
        networks, objectives, gradients = map(sum, zip(*costs, strict=True))
        row = {
            "method": method,
            "seed": config.seed,
            "split": "held_out",
            "num_problems": len(solutions.value),
            **gap_statistics(gaps_of(gap, values, solutions.reference)),
            "milliseconds": 1e3 * sum(seconds[stage] for stage in stages),
            "network_calls": networks,
            "objective_calls": objectives,
            "gradient_calls": gradients,
        }
        rows.append(row)
    return rows


def convergence(
    config: SolveConfig, solutions: Solutions, seconds: dict[str, float]
) -> dict[str, dict[str, np.ndarray]]:
    """The refiner from proposals, from random starts and from the family's start; see `Solutions`."""
    calls, steps = calls_of(config, solutions), np.linspace(0, 1, config.refine_steps + 1)
    propose, refine, multistart, baseline = (stage.gradients for stage in calls.values())
    gap = gap_of(make_problem(config.family))
    gaps = gaps_of(gap, solutions.curves, np.asarray(solutions.reference)[:, None, None])
    costs = {  # before the first step, and of all steps
        "from proposals": (propose, refine - baseline, "propose", "refine"),
        "from as many random starts": (0, multistart, None, "multistart"),
        "from the start": (0, baseline, None, "baseline"),
    }
    return {
        name: {
            "gaps": gaps[:, row],
            "calls": before + gradients * steps,
            "milliseconds": 1e3 * (seconds.get(first, 0.0) + seconds[then] * steps),
        }
        for row, (name, (before, gradients, first, then)) in enumerate(costs.items())
    }


def gap_of(family: ProblemFamily) -> Literal["relative", "absolute"]:
    """What gaps of a family are: of LASSO, (f - f*) / f*; of others, whose f* may be 0, f - f*."""
    return "absolute" if family.composite is None else "relative"


def gaps_of(
    gap: Literal["relative", "absolute"], values: np.ndarray, reference: np.ndarray
) -> np.ndarray:
    """Gaps of values to the reference, `inf` where they are not finite.

    Below the reference they are negative, but 0 within `TOLERANCE`, which is what f* is known to.
    Relative gaps are `inf` where the reference is a bound of another sign than the value.
    """
    values, reference = np.float64(values), np.float64(reference)
    gaps = values - reference
    if gap == "relative":  # there is no bound on it where f* can be 0
        gaps = np.where(values * reference > 0, gaps, np.inf) / np.where(
            reference, abs(reference), 1.0
        )
    gaps = np.where((gaps < 0) & (gaps >= -TOLERANCE), 0.0, gaps)
    return np.where(np.isfinite(gaps), gaps, np.inf)


def gap_statistics(gaps: np.ndarray) -> dict[str, Any]:
    """Mean, quartiles, each None where it is not finite, the share of successes, and of gaps below 0."""
    with np.errstate(invalid="ignore"):  # between infinities
        low, middle, high = np.quantile(gaps, [0.25, 0.5, 0.75])
    return {
        "gap_mean": _finite(np.mean(gaps)),
        "gap_median": _finite(middle),
        "gap_quartiles": [_finite(low), _finite(high)],
        "success": float(np.mean(gaps < SUCCESS)),
        "below_reference": float(np.mean(gaps < 0)),
    }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _write_npz(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomically(path, buffer.getvalue())
