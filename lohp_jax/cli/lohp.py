"""The commands of a run of Lo-Hp, one for each stage and one for all."""

import pathlib
import re
import zipfile
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from lohp_jax.checks import check_option
from lohp_jax.cli.errors import UsageError, usage_errors
from lohp_jax.cli.output import print_results, print_values, progress
from lohp_jax.evaluation.report import write_report
from lohp_jax.evaluation.scores import draw_tasks, scores
from lohp_jax.export import write_weights
from lohp_jax.generation import generate as generate_weights
from lohp_jax.methods import METHODS
from lohp_jax.methods.training import num_updates
from lohp_jax.runs import lohp as runs
from lohp_jax.runs.config import RunConfig, from_json, resolve
from lohp_jax.runs.evaluation import evaluate_run
from lohp_jax.runs.families import family_of
from lohp_jax.runs.find import find_method
from lohp_jax.runs.loading import load
from lohp_jax.runs.stage import Stage, open_run, open_stage, trained_steps
from lohp_jax.tasks import FAMILIES
from lohp_jax.tasks.door import describe_family
from lohp_jax.training.distributed import Strategy
from lohp_jax.trajectories.store import Store
from lohp_jax.types import Progress, TaskFamily

Config = Annotated[RunConfig, tyro.conf.arg(name="")]
Named = Annotated[
    str,
    tyro.conf.arg(help=f"One of {', '.join(METHODS)}, or your own as path/to/file.py:attribute."),
]


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
    print_results(results, json)
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
    print_values(summary, json)


def train(
    out: pathlib.Path,
    method: Named = "lohp",
    resume: bool = False,
    strategy: Strategy = "jit",
    json: bool = False,
) -> None:
    """Stage 2: train one method on the stored trajectories.

    Args:
        out: run directory of `lohp prepare`.
        method: what to train, by name or where it is.
        resume: continue from the newest checkpoint, if there is one.
        strategy: one device, or every batch shared among all of them.
        json: print a summary as JSON.
    """
    with usage_errors():
        if ":" not in method:
            check_option("train", "method", method, METHODS)
    config = open_run(out)
    with usage_errors():
        name = config.method(method).name
    if not resume and (done := trained_steps(out, name)):
        raise UsageError(
            f"{out} holds {done} updates of {name}; continue them with --resume, "
            "or choose another --out."
        )
    _train(open_stage(out, config), method, strategy)
    print_values({"out": str(out), "method": name, "updates": trained_steps(out, name)}, json)


def generate(
    out: pathlib.Path,
    weights: pathlib.Path,
    support: pathlib.Path | None = None,
    method: Named = "lohp",
    imitate: str = "best",
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
        method: which trained method, by name or where it is.
        imitate: whose trajectories to follow: the name of a teacher; "best", the one that reached the
            lowest loss; or "mixed", drawn anew for every sample.
        num_samples: independent samples.
        temperature: factor of the policy's standard deviations; 0 follows its means.
        guidance: how far to exaggerate the effect of the support.
        seed: of the samples, and of the held-out task.
        json: print a summary as JSON.
    """
    with usage_errors():
        named = find_method(method) if ":" in method else method
    generator = load(out, named, imitate=imitate)
    family = family_of(resolve(from_json(generator.config["run"])))
    task_key, key = jax.random.split(jax.random.key(seed))
    tasks = draw_tasks(family, task_key, 1, "held_out") if support is None else None
    context = _read_context(support, family) if tasks is None else _first(tasks.contexts)
    with usage_errors():
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
    print_values(summary, json)


def evaluate(out: pathlib.Path, json: bool = False) -> None:
    """Stage 4: score every trained method on held-out tasks and write results.json.

    Args:
        out: run directory with the methods of its config trained.
        json: print the results as JSON.
    """
    print_results(_evaluate(open_stage(out, open_run(out))), json)


def report(out: pathlib.Path, json: bool = False) -> None:
    """Stage 5: write report.html from the results.

    Args:
        out: run directory that was evaluated.
        json: print the path as JSON.
    """
    print_values({"report": str(write_report(out))}, json)


def tasks(json: bool = False) -> None:
    """List the task families and their default settings.

    Args:
        json: print them as JSON.
    """
    families = {name: _describe(name) for name in FAMILIES}
    if json:
        print_values(families, json)
        return
    for name, description in families.items():
        print(name)
        print_values({f"    {field}": value for field, value in description.items()}, json)


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
    with usage_errors():
        return open_run(out, config)


def _prepare(out: pathlib.Path, config: RunConfig) -> Store:
    total = config.prepare.num_tasks * len(config.prepare.optimizers)
    with progress("prepare", total, "trajectories") as update:
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
    with progress(f"train {method.name}", total, text, completed=done) as update:
        runs.train_run(stage, name, strategy=strategy, on_progress=show)


def _evaluate(stage: Stage) -> dict[str, Any]:
    with progress("evaluate", None, "") as update:
        results = evaluate_run(
            stage,
            lambda method, done, total: update(completed=done, total=total, text=method),
        )
        update(completed=len(results["rows"]), text="")
    return results


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
