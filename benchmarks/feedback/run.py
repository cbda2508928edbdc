"""Measures what a policy gains by seeing the task where it is, and what that costs.

Runs `lohp run` for each setting, variant and seed, each in a process of its own, and gathers the rows:

    python -m benchmarks.feedback.run [--settings NAME ...] [--variants NAME ...] [--seeds 5] [--jobs 1]

A finished run is not repeated. Writes results.json, the tables of README.md and its pictures.
"""

import argparse
import concurrent.futures
import itertools
import json
import pathlib
import sys

from benchmarks.feedback import report
from benchmarks.feedback.report import RESULTS
from benchmarks.lohp.run import run, summarise
from lohp_jax.files import write_atomically

SETTINGS: dict[str, list[str]] = {
    "new_classes": ["--tasks.holdout", "classes"],
    "seen_classes": [],
    "partitions": [
        *("--family", "digits_partitions", "--training.compression", "12"),
        *("--training.updates", "2000", "--balance.on-policy", "0"),
    ],
}
ALONE = ["--methods", "lohp_feedback", "--evaluation.no-baselines"]
VARIANTS: dict[str, list[str]] = {
    "gradient": ["--methods", "lohp_feedback", "lohp"],
    "loss": [*ALONE, "--loop.sees", "loss"],
    "likelihood": [*ALONE, "--loop.objective", "likelihood"],
    "task_loss": [*ALONE, "--loop.objective", "task_loss"],
}
"""What the policy sees and is trained by; the first has the open loop and the baselines beside it."""


def main() -> None:
    """Runs what is missing and writes the summary."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/feedback"))
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    pool = concurrent.futures.ThreadPoolExecutor(options.jobs)
    running = {}
    for setting, variant in itertools.product(options.settings, options.variants):
        arguments = [*SETTINGS[setting], *VARIANTS[variant]]
        running[setting, variant] = [
            pool.submit(run, arguments, seed, options.out / f"{setting}-{variant}-{seed}")
            for seed in range(options.seeds)
        ]
    for (setting, variant), runs in running.items():
        keep(options, setting, variant, [one.result() for one in runs])
    report.write(options.results)


def keep(options: argparse.Namespace, setting: str, variant: str, results: list[dict]) -> None:
    """Writes what the runs of one setting and variant found in place of what was there."""
    there = json.loads(options.results.read_text()) if options.results.exists() else {}
    first = options.out / f"{setting}-{variant}-0" / "figures.json"
    figures = json.loads(first.read_text())
    there.setdefault(setting, {})[variant] = {
        "command": " ".join(
            ["lohp", "run", "--seed", "SEED", *SETTINGS[setting], *VARIANTS[variant]]
        ),
        "environment": results[0]["environment"],
        "num_weights": results[0]["num_weights"],
        "summary": {split: summarise(results, split) for split in ("held_out", "train")},
        "rows": [row for result in results for row in result["rows"]],
        "figures_of_seed_0": {name: figures[name] for name in ("score_by_step", "familiarity")},
    }
    write_atomically(options.results, (json.dumps(there, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
