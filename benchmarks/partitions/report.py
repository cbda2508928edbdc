"""The tables of README.md: `python -m benchmarks.partitions.report [--results FILE]`."""

import json
import pathlib
from typing import Any

from benchmarks import pages
from benchmarks.lohp.report import NAMES, share, with_spread

RESULTS = pathlib.Path(__file__).with_name("results.json")
TABLES = {"hundred": "100_images"}
_LOOP = "lohp_feedback"
_ADAMS = {"same_support_adam": "Adam", "same_support_adamw": "AdamW"}
_NAMES = NAMES | {
    _LOOP: "**Lo-Hp with feedback**",
    "prototypes": "prototypes of the support (Snell et al., 2017)",
}
HEAD = ("method", "accuracy", "worst task", "gradients", "seeds")


def table(loops: dict[str, Any]) -> str:
    """All rows of the open loops, and of the closed ones the loop and Adam with as many gradients."""
    found = []
    for loop, content in loops.items():
        for row in content["summary"]:
            if loop == "open" or row["method"] == _LOOP or _spends(row["method"]):
                found.append((row["accuracy"], _cells(row)))
    found.sort(key=lambda item: -item[0])
    lines = [HEAD, ["---"] * len(HEAD), *(cells for _, cells in found)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(summary: dict[str, Any]) -> list[str]:
    return [
        name_of(summary["method"]),
        with_spread(summary),
        share(summary["accuracy_min"]),
        f"{summary['gradients']:.0f}",
        str(summary["num_seeds"]),
    ]


def name_of(method: str) -> str:
    """What a table calls a method."""
    if _spends(method):
        adam, _, number = method.rpartition("_")
        return f"{_ADAMS[adam]} on the support, {number} steps"
    return _NAMES[method]


def _spends(method: str) -> bool:
    """Whether this is Adam, or AdamW, with a given number of gradients."""
    return method.rpartition("_")[0] in _ADAMS


def write(path: pathlib.Path) -> None:
    """Puts the tables into the page."""
    results = json.loads(path.read_text())
    have = {name: setting for name, setting in TABLES.items() if setting in results}
    pages.fill_readme(path, {name: table(results[setting]) for name, setting in have.items()})


if __name__ == "__main__":
    pages.report(__doc__, RESULTS, write)
