"""The tables of README.md: `python -m benchmarks.omniglot.report [--results FILE]`."""

import json
import math
import pathlib
from typing import Any

from benchmarks import pages
from benchmarks.lohp.report import share
from benchmarks.partitions.report import name_of

RESULTS = pathlib.Path(__file__).with_name("results.json")
TABLES = {"five": "5way_1shot", "twenty": "20way_1shot"}
HEAD = ("method", "accuracy", "worst task", "gradients", "seeds")


def table(content: dict[str, Any]) -> str:
    """All rows, best first."""
    lines = [HEAD, ["---"] * len(HEAD), *(cells(row, content) for row in content["summary"])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(summary: dict[str, Any], content: dict[str, Any]) -> list[str]:
    """One line: the mean over all tasks of all seeds, with its 95 % interval."""
    method = summary["method"]
    rows = [r for r in content["rows"] if r["method"] == method and r["split"] == "held_out"]
    variance = sum(row["accuracy_std"] ** 2 / row["num_tasks"] for row in rows) / len(rows) ** 2
    return [
        name_of(method),
        f"{share(summary['accuracy'])} ± {share(1.96 * math.sqrt(variance))}",
        share(summary["accuracy_min"]),
        f"{summary['gradients']:.0f}",
        str(summary["num_seeds"]),
    ]


def write(path: pathlib.Path) -> None:
    """Puts the tables into the page."""
    results = json.loads(path.read_text())
    have = {name: setting for name, setting in TABLES.items() if setting in results}
    pages.fill_readme(path, {name: table(results[setting]) for name, setting in have.items()})


if __name__ == "__main__":
    pages.report(__doc__, RESULTS, write)
