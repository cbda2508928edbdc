"""The `lohp` command: the stages of a run, each on a run directory.

Everything that is printed is printed here: progress on standard error, results on standard output.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import jax
import numpy as np
import rich.console
import rich.progress
import rich.table
import tyro

from lohp_jax import runs
from lohp_jax.evaluation.report import write_report
from lohp_jax.evaluation.scores import accuracies, draw_tasks
from lohp_jax.generation import generate as generate_weights
from lohp_jax.generation import load
from lohp_jax.tasks import FAMILIES
from lohp_jax.training.config import METHODS, RunConfig
from lohp_jax.training.distributed import Strategy
from lohp_jax.training.loop import DivergedError, Progress
from lohp_jax.training.problem import family_of

Config = Annotated[RunConfig, tyro.conf.arg(name="")]
Method = Literal[METHODS]

app = tyro.extras.SubcommandApp()
_errors = rich.console.Console(stderr=True)


@app.command
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
        resume: continue the run that is in the directory.
        strategy: one device, or every batch shared among all of them.
        json: print the results as JSON.
    """
    out = out or _default_directory(config)
    config = _open(out, config, resume)
    _prepare(out, config)
    for method in config.methods:
        _train(out, config, method, strategy)
    _evaluate(out, config, json)
    _report(out, json)


@app.command
def prepare(
    config: Config, out: pathlib.Path | None = None, resume: bool = False, json: bool = False
) -> None:
    """Stage 1: run the teachers on training tasks and store their trajectories.

    Args:
        config: settings of the run.
        out: run directory; unset for runs/FAMILY-SEED.
        resume: continue the preparation that is in the directory.
        json: print a summary as JSON.
    """
    out = out or _default_directory(config)
    store = _prepare(out, _open(out, config, resume))
    summary = {"out": str(out), "num_trajectories": len(store), "num_dropped": store.num_dropped}
    _print(summary, json)


@app.command
def train(
    out: pathlib.Path,
    method: Method = "lohp",
    resume: bool = False,
    strategy: Strategy = "jit",
    json: bool = False,
) -> None:
    """Stage 2: train one method on the stored trajectories.

    Args:
        out: run directory of `lohp prepare`.
        method: what to train.
        resume: continue from the newest checkpoint.
        strategy: one device, or every batch shared among all of them.
        json: print a summary as JSON.
    """
    config = runs.open_run(out)
    if not resume and runs.trained_steps(out, method):
        raise FileExistsError(
            f"{out} holds {runs.trained_steps(out, method)} updates of {method}; "
            "continue them with --resume, or choose another --out."
        )
    _train(out, config, method, strategy)
    _print({"out": str(out), "method": method, "updates": runs.trained_steps(out, method)}, json)


@app.command
def generate(
    out: pathlib.Path,
    weights: pathlib.Path,
    support: pathlib.Path | None = None,
    method: Method = "lohp",
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
        support: .npz file with `images` [n, height, width, channels] in [0, 1] and `labels` [n];
            unset for a held-out task, whose accuracy is then printed.
        method: which trained method.
        num_samples: independent samples.
        temperature: factor of the policy's standard deviations; 0 follows its means.
        guidance: how far to exaggerate the effect of the support.
        seed: of the samples, and of the held-out task.
        json: print a summary as JSON.
    """
    generator = load(out, method)
    family = family_of(generator.config)
    key = jax.random.key(seed)
    tasks = None
    if support is None:
        tasks = draw_tasks(family, key, 1, "held_out")
        context = jax.tree.map(lambda leaf: leaf[0], tasks.contexts)
    else:
        context = _read_support(support)
    made = generate_weights(
        generator, context, key, num_samples=num_samples, temperature=temperature, guidance=guidance
    )
    runs.write_weights(weights, made)
    summary: dict[str, Any] = {"weights": str(weights), "num_samples": num_samples}
    if tasks is not None:
        repeated = jax.tree.map(lambda leaf: np.repeat(leaf, num_samples, axis=0), tasks.data)
        summary["accuracy"] = accuracies(family, made, repeated).tolist()
    _print(summary, json)


@app.command
def evaluate(out: pathlib.Path, json: bool = False) -> None:
    """Stage 4: score every method on held-out tasks and write results.json.

    Args:
        out: run directory with the methods of its config trained.
        json: print the results as JSON.
    """
    _evaluate(out, runs.open_run(out), json)


@app.command
def report(out: pathlib.Path, json: bool = False) -> None:
    """Stage 5: write report.html from the results.

    Args:
        out: run directory that was evaluated.
        json: print the path as JSON.
    """
    _report(out, json)


@app.command
def tasks(json: bool = False) -> None:
    """List the task families.

    Args:
        json: print them as JSON.
    """
    families = {name: tables.__doc__.partition("\n")[0] for name, tables in FAMILIES.items()}
    _print(families, json)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line.

    Returns: 0; 1 if the command failed or was interrupted; 2 for bad usage.
    """
    try:
        app.cli(prog="lohp", args=arguments)
    except SystemExit as stop:  # of the parser: 0 after --help, 2 after a bad flag
        return int(stop.code or 0)
    except KeyboardInterrupt:
        _errors.print("lohp: interrupted; what was done is saved, go on with --resume.")
        return 1
    except UsageError as error:
        _errors.print(f"lohp: {error}", style="red", markup=False, highlight=False)
        return 2
    except (ValueError, OSError, DivergedError) as error:
        _errors.print(f"lohp: {error}", style="red", markup=False, highlight=False)
        return 1
    return 0


class UsageError(Exception):
    """What the user asked for makes no sense; nothing was started."""


def _default_directory(config: RunConfig) -> pathlib.Path:
    return pathlib.Path("runs") / f"{config.family}-{config.seed}"


def _open(out: pathlib.Path, config: RunConfig, resume: bool) -> RunConfig:
    """The resolved config of a run; `--resume` alone takes up the stored one."""
    exists = (out / "config.json").exists()
    if exists and not resume:
        raise UsageError(f"{out} holds a run; continue it with --resume, or choose another --out.")
    if exists and config == RunConfig():
        return runs.open_run(out)
    try:
        return runs.open_run(out, config)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _prepare(out: pathlib.Path, config: RunConfig):
    with _progress() as progress:
        task = progress.add_task("prepare", total=None, unit="trajectories", text="")
        return runs.prepare_run(
            out, config, lambda done, total: progress.update(task, completed=done, total=total)
        )


def _train(out: pathlib.Path, config: RunConfig, method: str, strategy: Strategy) -> None:
    with _progress() as progress:
        task = progress.add_task(f"train {method}", total=None, unit="updates", text="")

        def show(at: Progress) -> None:
            text = f"loss {at.metrics['loss']:.4g}"
            if "progress" in at.metrics:
                text += f"  progress {at.metrics['progress']:.2f}"
            progress.update(task, completed=at.step, total=at.updates, text=text)

        runs.train_run(out, config, method, strategy=strategy, on_progress=show)


def _evaluate(out: pathlib.Path, config: RunConfig, as_json: bool) -> None:
    with _progress() as progress:
        task = progress.add_task("evaluate", total=None, unit="", text="")
        results = runs.evaluate_run(
            out, config, lambda method: progress.update(task, description=f"evaluate {method}")
        )
    if as_json:
        print(json.dumps(results))
        return
    table = rich.table.Table(title=f"{results['family']}, held-out tasks")
    for column in ("method", "accuracy", "worst task", "gradients", "ms per network"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in sorted(results["rows"], key=lambda row: -row["accuracy"]):
        latency = row["latency_ms_p50"]
        table.add_row(
            row["method"],
            f"{row['accuracy']:.3f} ± {row['accuracy_std'] / row['num_tasks'] ** 0.5:.3f}",
            f"{row['accuracy_min']:.3f}",
            str(row["gradients"]),
            "" if latency is None else f"{latency:.2f}",
        )
    rich.console.Console().print(table)


def _report(out: pathlib.Path, as_json: bool) -> None:
    path = write_report(out)
    if not as_json:
        print(f"report: {path}")


def _read_support(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        missing = {"images", "labels"} - set(file.files)
        if missing:
            raise ValueError(
                f"{path}: expected arrays images and labels, got {sorted(file.files)}."
            )
        return {"images": file["images"].astype(np.float32), "labels": file["labels"]}


def _print(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(values))
    else:
        for name, value in values.items():
            print(f"{name}: {value}")


@contextlib.contextmanager
def _progress() -> Iterator[rich.progress.Progress]:
    """A line on standard error with what is done, the rate and the time left."""
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("{task.completed:.0f}/{task.total} {task.fields[unit]}"),
        _Rate(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[text]}"),
    )
    with rich.progress.Progress(*columns, console=_errors) as progress:
        yield progress


class _Rate(rich.progress.ProgressColumn):
    """Units per second."""

    def render(self, task: rich.progress.Task) -> str:
        """The rate, or nothing before the first is known."""
        return f"{task.speed:.1f}/s" if task.speed else ""
