"""The command that solves optimization problems by diffusion."""

import argparse
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Annotated

import tyro

from lohp_jax.cli.errors import UsageError, usage_errors
from lohp_jax.cli.output import print_solutions, print_values, progress
from lohp_jax.problems import make_problem
from lohp_jax.problems.family import read_problems
from lohp_jax.runs import solve as solve_runs
from lohp_jax.training.distributed import Strategy
from lohp_jax.types import Progress


def solve(
    config: Annotated[solve_runs.SolveConfig, tyro.conf.arg(name="")],
    out: pathlib.Path | None = None,
    problems: pathlib.Path | None = None,
    resume: bool = False,
    strategy: Strategy = "jit",
    json: bool = False,
) -> None:
    """Train Diff-L2O on a family of optimization problems, or load it, and solve a batch.

    Writes results.json, solutions.npz and plots. Defaults below are those of the family; with --resume,
    those of the run that is there, of which family, seed and diffusion cannot be changed.

    Args:
        config: settings of the run.
        out: run directory; unset for runs/solve-FAMILY-SEED.
        problems: .npz of problems to solve; unset to generate held-out ones.
        resume: solve with the generator that is in the directory, if there is one.
        strategy: of the training: one device, or every batch shared among all of them.
        json: print the results as JSON.
    """
    out = out or _solve_directory(config.family, config.seed)
    if (out / "config.json").exists() and not resume:
        raise UsageError(f"{out} holds a run; go on with --resume, or choose another --out.")
    if problems and not problems.is_file():
        raise UsageError(f"expected a file of problems, got {problems}, where there is none.")
    with usage_errors():
        given = None
        if problems:
            given = read_problems(problems, make_problem(config.family))
            solve_runs.check_problems(config, given)
        solve_runs.open_solve_run(out, config)

    def show(at: Progress) -> None:
        text = f"{at.method} loss {at.metrics['loss']:.4g}"
        update(completed=at.step, total=at.updates, text=text)

    with progress("solve", config.diffusion.updates, "") as update:
        told = {"on_progress": show, "on_stage": lambda text: update(text=text)}
        results = solve_runs.solve_run(out, config, given, strategy=strategy, **told)
    if json:
        print_values(results, json)
        return
    print_solutions(results)
    print_values({"solutions": out / "solutions.npz"}, json)


def with_defaults(arguments: Sequence[str]) -> Callable[..., None]:
    """`solve` with the defaults of the run to resume, or of the family that the arguments name."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--family", "--seed", "--out"):
        parser.add_argument(name)
    parser.add_argument("--resume", action="store_true")
    known = parser.parse_known_args(arguments)[0]
    family = known.family or solve_runs.SolveConfig.family
    out = pathlib.Path(known.out or _solve_directory(family, known.seed or 0))
    config = None
    if known.resume and (out / "config.json").exists():
        config = solve_runs.read_solve_config(out)
    if config is None or known.family not in (None, config.family):
        config = solve_runs.preset(family)
    command = functools.partial(solve, config=config)
    command.__doc__ = solve.__doc__
    return command


def _solve_directory(family: str, seed: int | str) -> pathlib.Path:
    return pathlib.Path("runs") / f"solve-{family}-{seed}"
