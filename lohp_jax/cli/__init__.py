"""The `lohp` command: the stages of a run, each on a run directory.

Everything that is printed is printed here: progress on standard error, results on standard output.
"""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import jax
import numpy as np
import rich.box
import rich.console
import rich.progress
import rich.table
import tyro

from lohp_jax.checks import check_option
from lohp_jax.evaluation.report import write_report
from lohp_jax.evaluation.scores import draw_tasks, scores
from lohp_jax.export import write_weights
from lohp_jax.generation import generate as generate_weights
from lohp_jax.methods import METHODS
from lohp_jax.methods.training import num_updates
from lohp_jax.problems import make_problem
from lohp_jax.problems.family import read_problems
from lohp_jax.runs import lohp as runs
from lohp_jax.runs import meta as meta_runs
from lohp_jax.runs import solve as solve_runs
from lohp_jax.runs.config import RunConfig, from_json, resolve
from lohp_jax.runs.evaluation import evaluate_run
from lohp_jax.runs.families import family_of
from lohp_jax.runs.loading import load
from lohp_jax.runs.meta_training import MetaConfig
from lohp_jax.runs.stage import Stage, open_run, open_stage, trained_steps
from lohp_jax.tasks import FAMILIES
from lohp_jax.tasks.door import describe_family
from lohp_jax.training.distributed import Strategy
from lohp_jax.training.engine import DivergedError
from lohp_jax.trajectories.store import Store
from lohp_jax.types import Progress, TaskFamily

Config = Annotated[RunConfig, tyro.conf.arg(name="")]
_errors = rich.console.Console(stderr=True)


class UsageError(Exception):
    """What the user asked for makes no sense; nothing was changed."""


def run(
    config: Config,
    out: pathlib.Path | None = None,
    resume: bool = False,
    strategy: Strategy = "jit",
    json: bool = False,
) -> None:
    """Prepare, train, generate, evaluate and report, all in one.

    Args:
        config: settings of the run.
        out: run directory; unset for runs/FAMILY-SEED.
        resume: continue the run that is in the directory, if there is one.
        strategy: one device, or every batch shared among all of them.
        json: print the results as JSON.
    """
    out = out or _default_directory(config)
    config = _open(out, config, resume)
    stage = open_stage(out, config, _prepare(out, config))
    for method in config.methods:
        _train(stage, method, strategy)
    results = _evaluate(stage)
    path = write_report(out)
    _print_results(results, json)
    if not json:
        print(f"report: {path}")


def prepare(
    config: Config, out: pathlib.Path | None = None, resume: bool = False, json: bool = False
) -> None:
    """Stage 1: run the teachers on training tasks and store their trajectories.

    Args:
        config: settings of the run.
        out: run directory; unset for runs/FAMILY-SEED.
        resume: continue the run that is in the directory, if there is one.
        json: print a summary as JSON.
    """
    out = out or _default_directory(config)
    store = _prepare(out, _open(out, config, resume))
    summary = {"out": str(out), "num_trajectories": len(store), "num_dropped": store.num_dropped}
    _print(summary, json)


def train(
    out: pathlib.Path,
    method: str = "lohp",
    resume: bool = False,
    strategy: Strategy = "jit",
    json: bool = False,
) -> None:
    """Stage 2: train one method on the stored trajectories.

    Args:
        out: run directory of `lohp prepare`.
        method: what to train, by name or as path/to/file.py:attribute.
        resume: continue from the newest checkpoint, if there is one.
        strategy: one device, or every batch shared among all of them.
        json: print a summary as JSON.
    """
    with _usage_errors():
        if ":" not in method:
            check_option("train", "method", method, METHODS)
    config = open_run(out)
    name = config.method(method).name
    if not resume and (done := trained_steps(out, name)):
        raise UsageError(
            f"{out} holds {done} updates of {name}; continue them with --resume, "
            "or choose another --out."
        )
    _train(open_stage(out, config), method, strategy)
    _print({"out": str(out), "method": name, "updates": trained_steps(out, name)}, json)


def generate(
    out: pathlib.Path,
    weights: pathlib.Path,
    support: pathlib.Path | None = None,
    method: str = "lohp",
    num_samples: int = 1,
    temperature: float = 0.0,
    guidance: float = 0.0,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Stage 3: generate the weights of one task from its support examples.

    Args:
        out: run directory with a trained method.
        weights: file to write, safetensors; every array has a leading axis of samples.
        support: .npz file with the arrays of a context, such as `x` [n, ...] and `y` [n]; unset for a
            held-out task, whose score is then printed.
        method: which trained method.
        num_samples: independent samples.
        temperature: factor of the policy's standard deviations; 0 follows its means.
        guidance: how far to exaggerate the effect of the support.
        seed: of the samples, and of the held-out task.
        json: print a summary as JSON.
    """
    generator = load(out, method)
    family = family_of(resolve(from_json(generator.config["run"])))
    task_key, key = jax.random.split(jax.random.key(seed))
    tasks = draw_tasks(family, task_key, 1, "held_out") if support is None else None
    context = _read_context(support, family) if tasks is None else _first(tasks.contexts)
    with _usage_errors():
        made = generate_weights(
            generator,
            context,
            key,
            num_samples=num_samples,
            temperature=temperature,
            guidance=guidance,
        )
    write_weights(weights, made)
    summary: dict[str, Any] = {"weights": str(weights), "num_samples": num_samples}
    if tasks is not None:
        repeated = jax.tree.map(lambda leaf: np.repeat(leaf, num_samples, axis=0), tasks.data)
        measure = describe_family(family).measure
        summary[measure] = scores(family, made, repeated).tolist()
    _print(summary, json)


def evaluate(out: pathlib.Path, json: bool = False) -> None:
    """Stage 4: score every trained method on held-out tasks and write results.json.

    Args:
        out: run directory with the methods of its config trained.
        json: print the results as JSON.
    """
    _print_results(_evaluate(open_stage(out, open_run(out))), json)


def report(out: pathlib.Path, json: bool = False) -> None:
    """Stage 5: write report.html from the results.

    Args:
        out: run directory that was evaluated.
        json: print the path as JSON.
    """
    _print({"report": str(write_report(out))}, json)


def tasks(json: bool = False) -> None:
    """List the task families and their default settings.

    Args:
        json: print them as JSON.
    """
    families = {name: _describe(name) for name in FAMILIES}
    if json:
        _print(families, json)
        return
    for name, description in families.items():
        print(name)
        _print({f"    {field}": value for field, value in description.items()}, json)


def meta_train(
    config: Annotated[MetaConfig, tyro.conf.arg(name="")],
    out: pathlib.Path,
    resume: bool = False,
    strategy: Strategy = "jit",
    json: bool = False,
) -> None:
    """Meta-train a small learned optimizer and compare it with Adam; writes theta.msgpack.

    Args:
        config: settings of the run.
        out: run directory.
        resume: continue the run that is in the directory, if there is one.
        strategy: one device, or the pairs shared among all of them.
        json: print the results as JSON.
    """
    config = _open_meta(out, config, resume)

    def show(at: meta_runs.Standing) -> None:
        update(completed=at.progress.step, text=f"loss {at.progress.metrics['loss']:.4g}")
        if at.learned:
            update(below=_standings(at.learned, at.adam))

    total, done = config.updates, meta_runs.trained_meta_updates(out)
    with _progress("meta-train", total, "", completed=done) as update:
        told = {"on_progress": show, "on_stage": lambda text: update(text=text)}
        results = meta_runs.meta_train_run(out, config, strategy=strategy, **told)
    if json:
        _print(results, json)
        return
    learned, adam = (
        {row["family"]: row for row in results["rows"] if row["method"] == method}
        for method in ("small", "adam_best")
    )
    rich.console.Console().print(_standings(learned, adam))
    _print({"theta": out / "theta.msgpack"} | results["rate"], json)


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
    with _usage_errors():
        given = None
        if problems:
            given = read_problems(problems, make_problem(config.family))
            solve_runs.check_problems(config, given)
        solve_runs.open_solve_run(out, config)

    def show(at: Progress) -> None:
        text = f"{at.method} loss {at.metrics['loss']:.4g}"
        update(completed=at.step, total=at.updates, text=text)

    with _progress("solve", config.diffusion.updates, "") as update:
        told = {"on_progress": show, "on_stage": lambda text: update(text=text)}
        results = solve_runs.solve_run(out, config, given, strategy=strategy, **told)
    if json:
        _print(results, json)
        return
    columns = {
        "gap_mean": "mean gap",
        "gap_median": "median gap",
        "success": "success",
        "gradient_calls": "gradients",
        "milliseconds": "ms",
    }
    gap = {"relative": "(f - f*) / f*", "absolute": "f - f*"}[results["gap"]]
    title = f"{results['family']}, gaps are {gap}"
    table = rich.table.Table("method", *columns.values(), title=title, box=rich.box.SIMPLE)
    for row in results["rows"]:
        cells = (row[name] for name in columns)
        table.add_row(row["method"], *("-" if cell is None else f"{cell:.3g}" for cell in cells))
    rich.console.Console().print(table)
    _print({"solutions": out / "solutions.npz"}, json)


COMMANDS = {
    command.__name__.replace("_", "-"): command
    for command in (run, prepare, train, generate, evaluate, report, tasks, meta_train, solve)
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns: 0; 1 if the command failed or was interrupted; 2 for bad usage.
    """
    try:
        command = _parse(sys.argv[1:] if arguments is None else arguments)
        command()
    except SystemExit as stop:  # of the parser: 0 after --help, 2 after a bad flag
        return int(stop.code or 0)
    except KeyboardInterrupt:
        _fail(
            "interrupted; what was finished is saved. Go on with the same command "
            "(run, prepare, train, meta-train and solve: with --resume).",
            1,
        )
        if arguments is None:  # a compilation cut off runs on in XLA; Python's shutdown would crash
            sys.stdout.flush()
            os._exit(1)
        return 1
    except BrokenPipeError:  # whoever read our output, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UsageError as error:
        return _fail(str(error), 2)
    except (ValueError, OSError, DivergedError) as error:
        return _fail(str(error), 1)
    return 0


def _parse(arguments: Sequence[str]) -> Callable[[], None]:
    """The command that the arguments ask for, not yet run.

    A command is parsed on its own where it is known: messages then name only what belongs to it.
    """
    commands = {name: _deferred(command) for name, command in COMMANDS.items()}
    markers = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    with _usage_errors():
        if arguments and arguments[0] in commands:
            name, *rest = arguments
            if name == "solve":
                commands[name] = _deferred(_with_defaults(rest))
            return tyro.cli(commands[name], prog=f"lohp {name}", args=rest, config=markers)
        return tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="lohp",
            description="Generate the weights of neural networks instead of training them.",
            args=arguments,
            config=markers,
        )


def _with_defaults(arguments: Sequence[str]) -> Callable[..., None]:
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


def _deferred(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """`command` that only remembers its arguments, so that parsing and running fail apart."""

    @functools.wraps(command)
    def remember(*args, **kwargs):
        return functools.partial(command, *args, **kwargs)

    return remember


@contextlib.contextmanager
def _usage_errors() -> Iterator[None]:
    """Around what looks at the user's input only: its ValueErrors are bad usage."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def _fail(message: str, code: int) -> int:
    _errors.print(f"lohp: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    return code


def _default_directory(config: RunConfig) -> pathlib.Path:
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", config.family.rpartition("/")[2])
    return pathlib.Path("runs") / f"{name}-{config.seed}"


def _open(out: pathlib.Path, config: RunConfig, resume: bool) -> RunConfig:
    """The resolved config of a new run, or of the one to resume; no options take up the stored ones."""
    if (out / "config.json").exists():
        if not resume:
            raise UsageError(
                f"{out} holds a run; continue it with --resume, or choose another --out."
            )
        stored = open_run(out)
        if config == RunConfig():
            return stored
    with _usage_errors():
        return open_run(out, config)


def _open_meta(out: pathlib.Path, config: MetaConfig, resume: bool) -> MetaConfig:
    """The config of a new run, or of the one to resume; no options take up the stored ones."""
    if (out / "config.json").exists():
        if not resume:
            raise UsageError(
                f"{out} holds a run; continue it with --resume, or choose another --out."
            )
        if config == MetaConfig():
            return meta_runs.read_meta_config(out)
    with _usage_errors():
        meta_runs.open_meta_run(out, config)
    return config


def _prepare(out: pathlib.Path, config: RunConfig) -> Store:
    total = config.prepare.num_tasks * len(config.prepare.optimizers)
    with _progress("prepare", total, "trajectories") as update:
        return runs.prepare_run(out, config, lambda done, total: update(completed=done))


def _train(stage: Stage, name: str, strategy: Strategy) -> None:
    def show(at: Progress) -> None:
        text = f"loss {at.metrics['loss']:.4g}"
        if "progress" in at.metrics:
            text += f"  progress {at.metrics['progress']:.2f}"
            text += "  frozen" if at.metrics["frozen"] else ""
        update(completed=at.step, total=at.updates, description=f"train {at.method}", text=text)

    method = stage.config.method(name)
    total = num_updates(method, stage.config.training.updates)
    done = trained_steps(stage.directory, method.name)
    text = "compiling" if done < total else ""
    with _progress(f"train {method.name}", total, text, completed=done) as update:
        runs.train_run(stage, name, strategy=strategy, on_progress=show)


def _evaluate(stage: Stage) -> dict[str, Any]:
    with _progress("evaluate", None, "") as update:
        results = evaluate_run(
            stage,
            lambda method, done, total: update(completed=done, total=total, text=method),
        )
        update(completed=len(results["rows"]), text="")
    return results


def _print_results(results: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(results))
        return
    measure = results["measure"]
    sign, worst = (-1, "min") if measure == "accuracy" else (1, "max")
    title = f"{results['family']}, {results['rows'][0]['num_tasks']} held-out tasks"
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD)
    for column in ("method", measure, "worst task", "gradients", "ms each"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    digits = ".3f" if measure == "accuracy" else ".3g"
    for row in sorted(results["rows"], key=lambda row: sign * row[measure]):
        table.add_row(
            row["method"],
            f"{row[measure]:{digits}} ± {row[f'{measure}_std'] / row['num_tasks'] ** 0.5:{digits}}",
            f"{row[f'{measure}_{worst}']:{digits}}",
            str(row["gradients"]),
            f"{row['latency_ms_p50']:.2f}",
        )
    rich.console.Console().print(table)


def _standings(learned: dict[str, Any], adam: dict[str, Any]) -> rich.table.Table:
    """Scores of the learned optimizer, each beside that of Adam at the best of its learning rates."""
    title = "the learned optimizer / Adam at the best of five learning rates"
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD)
    table.add_column("family", no_wrap=True)
    for score in ("mean loss", "final loss", "query loss", "accuracy"):
        table.add_column(score, justify="right", no_wrap=True)
    for family, reached in learned.items():
        pairs = [
            f"{reached[name]:{digits}} / {adam[family][name]:{digits}}"
            for name, digits in (
                *(("mean_loss", ".2g"), ("final_loss", ".2g"), ("query_loss", ".2g")),
                ("accuracy", ".3f"),
            )
        ]
        table.add_row(family, *pairs)
    return table


def _describe(family: str) -> dict[str, Any]:
    config = resolve(RunConfig(family=family))
    return {
        "tasks": FAMILIES[family].summary,
        "network": config.tasks.network,
        "shots": config.tasks.shots,
        "optimizers": list(config.prepare.optimizers),
        "num_steps": config.prepare.num_steps,
        "compression": config.training.compression,
    }


def _read_context(path: pathlib.Path, family: TaskFamily) -> dict[str, np.ndarray]:
    """The arrays of a context from a file; a generator checks what they are."""
    key = jax.random.key(0)
    like = jax.eval_shape(lambda: family.context(family.sample(key, "train"), key))
    if not isinstance(like, dict):
        raise UsageError(f"expected a family whose contexts are dicts of arrays, got {like}.")
    with path.open("rb") as stream:
        if not zipfile.is_zipfile(stream):
            raise UsageError(f"{path}: expected an .npz file, as numpy.savez writes it.")
    wanted = ", ".join(like)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in like if name in file}
            found = sorted(file.files)
    except (ValueError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: expected numeric arrays {wanted}; {error}.") from error
    if len(arrays) < len(like):
        raise UsageError(f"{path}: expected arrays {wanted}, got {found}.")
    return {
        name: array.astype(like[name].dtype) if array.dtype.kind == like[name].dtype.kind else array
        for name, array in arrays.items()
    }


def _first(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], tree)


def _print(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(values))
        return
    for name, value in values.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        print(f"{name}: {text}")


@contextlib.contextmanager
def _progress(
    description: str, total: int | None, text: str, completed: int = 0
) -> Iterator[Callable[..., None]]:
    """A line on standard error: what is done, the rate, the time left, and a text that changes."""
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=None, table_column=rich.table.Column(ratio=1)),
        rich.progress.MofNCompleteColumn(),
        _Rate(),
        rich.progress.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        rich.progress.TextColumn("{task.fields[text]}", markup=False),
    )
    with _Progress(*columns, console=_errors, expand=True) as progress:
        task = progress.add_task(description, total=total, text=text, completed=completed)
        yield functools.partial(progress.update, task)


class _Progress(rich.progress.Progress):
    """Progress with what the field `below` of a task holds shown below."""

    def get_renderables(self) -> Iterator[rich.console.RenderableType]:
        """The lines of the tasks, then what is below."""
        yield from super().get_renderables()
        yield from (task.fields["below"] for task in self.tasks if "below" in task.fields)


class _Rate(rich.progress.ProgressColumn):
    """Units per second."""

    def render(self, task: rich.progress.Task) -> str:
        """The rate, or nothing before the first is known."""
        speed = task.finished_speed or task.speed
        return f"{speed:.1f}/s" if speed else ""
