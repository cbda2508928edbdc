"""The command that meta-trains a learned optimizer."""

import pathlib
from typing import Annotated

import tyro

from lohp_jax.cli.errors import UsageError, usage_errors
from lohp_jax.cli.output import print_standings, print_values, progress, standings
from lohp_jax.runs import meta as meta_runs
from lohp_jax.runs.meta_training import MetaConfig
from lohp_jax.training.distributed import Strategy


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
    config = _open(out, config, resume)

    def show(at: meta_runs.Standing) -> None:
        update(completed=at.progress.step, text=f"loss {at.progress.metrics['loss']:.4g}")
        if at.learned:
            update(below=standings(at.learned, at.adam))

    total, done = config.updates, meta_runs.trained_meta_updates(out)
    with progress("meta-train", total, "", completed=done) as update:
        told = {"on_progress": show, "on_stage": lambda text: update(text=text)}
        results = meta_runs.meta_train_run(out, config, strategy=strategy, **told)
    if json:
        print_values(results, json)
        return
    learned, adam = (
        {row["family"]: row for row in results["rows"] if row["method"] == method}
        for method in ("small", "adam_best")
    )
    print_standings(learned, adam)
    print_values({"theta": out / "theta.msgpack"} | results["rate"], json)


def _open(out: pathlib.Path, config: MetaConfig, resume: bool) -> MetaConfig:
    """The config of a new run, or of the one to resume; no options take up the stored ones."""
    if (out / "config.json").exists():
        if not resume:
            raise UsageError(
                f"{out} holds a run; continue it with --resume, or choose another --out."
            )
        if config == MetaConfig():
            return meta_runs.read_meta_config(out)
    with usage_errors():
        meta_runs.open_meta_run(out, config)
    return config
