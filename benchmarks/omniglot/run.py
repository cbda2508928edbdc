"""Few-shot classification of Omniglot: generated heads beside their rivals over the same backbone.

Runs `lohp run` for each setting and seed, each in a process of its own, and gathers the rows:

    python -m benchmarks.omniglot.run [--settings NAME ...] [--seeds 5]

with `$TFDS_DATA_DIR` where TensorFlow Datasets prepared Omniglot. The backbone is trained once. A
finished run is not repeated. Writes results.json and the table of README.md.
"""

import argparse
import json
import pathlib
import sys

from benchmarks.lohp.run import gathered, run
from benchmarks.omniglot import report
from benchmarks.omniglot.report import RESULTS
from lohp_jax.files import write_atomically

FAMILIES = pathlib.Path(__file__).with_name("families.py")
SETTINGS = ("5way_1shot", "20way_1shot")
ARGUMENTS = [
    *("--methods", "lohp", "lohp_feedback", "hypernetwork", "hypernetwork_regression"),
    *("--prepare.optimizers", "adam:0.03", "--prepare.num-steps", "50"),
    *("--prepare.num-tasks", "1000", "--prepare.record-every", "10"),
    *("--training.compression", "10", "--training.updates", "1000"),
    *("--training.batch-size", "16", "--balance.on-policy", "0", "--evaluation.num-tasks", "600"),
    *("--evaluation.rivals", "prototypes", "--evaluation.rival-updates", "1"),
]
"""Over the features of the backbone prototypes have nothing to train."""


def main() -> None:
    """Runs what is missing and writes the summary."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/omniglot"))
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    for setting in options.settings:
        arguments = ["--family", f"{FAMILIES}:heads_{setting}", *ARGUMENTS]
        found = [
            run(arguments, seed, options.out / f"{setting}-{seed}") for seed in range(options.seeds)
        ]
        keep(options.results, setting, found)
    report.write(options.results)


def keep(path: pathlib.Path, setting: str, results: list[dict]) -> None:
    """Writes what the runs of one setting found in place of what was there."""
    there = json.loads(path.read_text()) if path.exists() else {}
    family = f"benchmarks/omniglot/families.py:heads_{setting}"
    command = ["lohp", "run", "--seed", "SEED", "--family", family, *ARGUMENTS]
    there[setting] = gathered(command, results)
    write_atomically(path, (json.dumps(there, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
