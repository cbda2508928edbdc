"""Compares Lo-Hp with its rivals on the two-class partitions of MNIST.

Runs `lohp run` for each setting, loop and seed, each in a process of its own, and gathers the rows:

    python -m benchmarks.partitions.run --data-dir DIRECTORY [--settings NAME ...] [--seeds 5] [--jobs 1]

DIRECTORY holds MNIST as TensorFlow Datasets prepares it. A finished run is not repeated. Writes
results.json and the tables of README.md.
"""

import argparse
import concurrent.futures
import itertools
import json
import pathlib
import sys

from benchmarks.lohp.run import gathered, run
from benchmarks.partitions import report
from benchmarks.partitions.report import RESULTS
from lohp_jax.files import write_atomically

TASKS = [
    *("--family", "digits_partitions", "--tasks.data", "tfds:mnist", "--tasks.image-size", "14"),
    *("--tasks.batch-size", "256", "--balance.on-policy", "0", "--evaluation.num-tasks", "128"),
]
SETTINGS: dict[str, list[str]] = {
    "100_images": [*TASKS, "--tasks.shots", "50"],
    "10_images": [*TASKS, "--tasks.shots", "5"],
}
LOOPS: dict[str, list[str]] = {
    "open": ["--methods", "lohp", "--prepare.record-every", "60"],
    "closed": [
        *("--methods", "lohp_feedback", "--prepare.record-every", "24"),
        *("--training.compression", "24", "--training.updates", "1500"),
    ],
}
"""The second spends gradients; beside it stands Adam with as many."""


def main() -> None:
    """Runs what is missing and writes the summary."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", required=True, help="of TensorFlow Datasets")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=list(LOOPS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/partitions"))
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    pool = concurrent.futures.ThreadPoolExecutor(options.jobs)
    running = {}
    for setting, loop in itertools.product(options.settings, options.loops):
        arguments = [*SETTINGS[setting], "--tasks.data-dir", options.data_dir, *LOOPS[loop]]
        running[setting, loop] = [
            pool.submit(run, arguments, seed, options.out / f"{setting}-{loop}-{seed}")
            for seed in range(options.seeds)
        ]
    for (setting, loop), runs in running.items():
        keep(options.results, setting, loop, [one.result() for one in runs])
    report.write(options.results)


def keep(path: pathlib.Path, setting: str, loop: str, results: list[dict]) -> None:
    """Writes what the runs of one setting and loop found in place of what was there."""
    there = json.loads(path.read_text()) if path.exists() else {}
    command = ["lohp", "run", "--seed", "SEED", *SETTINGS[setting], *LOOPS[loop]]
    there.setdefault(setting, {})[loop] = gathered(command, results)
    write_atomically(path, (json.dumps(there, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
