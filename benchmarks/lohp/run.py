"""Compares Lo-Hp with what a user would try first, over settings and seeds.

Runs `lohp run` for each setting and seed, each in a process of its own, and gathers the rows:

    python -m benchmarks.lohp.run [--settings NAME ...] [--seeds 5] [--jobs 1] [--out runs/benchmark]

A finished run is not repeated. Latencies mean little where several runs share the machine. Writes
results.json and the tables of README.md.
"""

import argparse
import collections
import concurrent.futures
import json
import pathlib
import subprocess
import sys

import numpy as np

from benchmarks.lohp import report

LEARNED = ("lohp", "cloning", "hypernetwork", "hypernetwork_regression", "paper_literal")
DECOUPLED = ("lohp", "cloning", "hypernetwork_regression")

SETTINGS: dict[str, list[str]] = {
    "5way_10shot": ["--methods", *LEARNED],
    "5way_1shot": ["--tasks.shots", "1", "--methods", *LEARNED],
    # what each part adds, after table 2 of the paper, whose first row is a hypernetwork
    "5way_components": ["--methods", "lohp", "hypernetwork_regression", "lo_di", "lo_op"],
    "5way_support_teacher": ["--tasks.teacher-data", "support", "--methods", *DECOUPLED],
    "5way_new_classes": ["--tasks.holdout", "classes", "--methods", *DECOUPLED],
    "partitions": [
        *("--family", "digits_partitions", "--methods", "lohp", "lohp_consolidated", *LEARNED[1:-1])
    ],
    # as many updates as `lohp_consolidated` takes in its two parts
    "partitions_3000_updates": [
        *("--family", "digits_partitions", "--training.updates", "3000"),
        *("--methods", "lohp", "hypernetwork"),
    ],
}
RESULTS = pathlib.Path(__file__).with_name("results.json")


def run(arguments: list[str], seed: int, directory: pathlib.Path) -> dict:
    """Results of `lohp run` with these arguments and seed, from disk if they are there."""
    if not (directory / "results.json").exists():
        fresh = ["--seed", str(seed), *arguments]
        options = ["--resume"] if (directory / "config.json").exists() else fresh
        subprocess.run(["lohp", "run", "--out", str(directory), *options], check=True)
    return json.loads((directory / "results.json").read_text())


def summarise(results: list[dict], split: str = "held_out") -> list[dict]:
    """Mean and standard deviation over seeds of each method on tasks of a split, best first."""
    rows = collections.defaultdict(list)
    for result in results:
        for row in result["rows"]:
            if row["split"] == split:
                rows[row["method"]].append(row)
    table = [
        {
            "method": method,
            "accuracy": float(np.mean([row["accuracy"] for row in group])),
            "accuracy_std_over_seeds": _spread([row["accuracy"] for row in group]),
            "accuracy_min": min(row["accuracy_min"] for row in group),
            "gradients": float(np.mean([row["gradients"] for row in group])),
            "num_seeds": len(group),
        }
        for method, group in rows.items()
    ]
    return sorted(table, key=lambda row: -row["accuracy"])


def gathered(command: list[str], results: list[dict]) -> dict:
    """What is kept of the runs of one command, a run for each seed."""
    return {
        "command": " ".join(command),
        "environment": results[0]["environment"],
        "num_weights": results[0]["num_weights"],
        "summary": summarise(results),
        "rows": [row for result in results for row in result["rows"]],
        "honesty": [result["honesty"] for result in results],
    }


def _spread(values: list[float]) -> float | None:
    """Standard deviation; None of a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def main() -> None:
    """Runs what is missing and writes the summary."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/benchmark"))
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    summary = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    pool = concurrent.futures.ThreadPoolExecutor(arguments.jobs)
    running = {
        setting: [
            pool.submit(run, SETTINGS[setting], seed, arguments.out / f"{setting}-{seed}")
            for seed in range(arguments.seeds)
        ]
        for setting in arguments.settings
    }
    for setting in arguments.settings:
        results = [run.result() for run in running[setting]]
        table = summarise(results)
        summary[setting] = {
            "command": " ".join(["lohp", "run", "--seed", "SEED", *SETTINGS[setting]]),
            "environment": results[0]["environment"],
            "num_weights": results[0]["num_weights"],
            "held_out_tasks_per_seed": results[0]["rows"][0]["num_tasks"],
            "summary": table,
            "rows": [row for result in results for row in result["rows"]],
            "honesty": [result["honesty"] for result in results],
        }
        arguments.results.write_text(json.dumps(summary, indent=1) + "\n")
        print(f"\n{setting}: {summary[setting]['command']}")
        for row in table:
            scored = report.with_spread(row)
            print(f"  {row['method']:26s} {scored}   worst task {row['accuracy_min']:.3f}")
    report.write(arguments.results)


if __name__ == "__main__":
    sys.exit(main())
