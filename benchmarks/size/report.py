"""The table of README.md, from its results: `python -m benchmarks.size.report [--results FILE]`."""

import json
import pathlib
from typing import Any

from benchmarks import pages

RESULTS = pathlib.Path(__file__).with_name("results.json")
HEAD = (
    "weights",
    "preparation",
    "training",
    "ms an update",
    "generation",
    "seconds a network",
    "µs a weight",
)


def table(rows: list[dict[str, Any]], *, whole: bool) -> str:
    """Sizes by peak memory and time of each stage; of windows, or of networks seen whole."""
    groups: dict[int, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if (row["window"] is None) == whole:
            groups.setdefault(row["num_weights"], {})[row["stage"]] = row
    if not groups:
        return "Not measured yet."
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    for weights, stages in sorted(groups.items()):
        update = stages.get("train", {}).get("seconds")
        seconds = stages.get("generate", {}).get("seconds")
        cells = [
            f"{weights:,}",
            _memory(stages.get("prepare")),
            _memory(stages.get("train")),
            "" if update is None else f"{1e3 * update:.0f}",
            _memory(stages.get("generate")),
            "" if seconds is None else f"{seconds:.3g}",
            "" if seconds is None else f"{1e6 * seconds / weights:.2g}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _memory(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['peak_bytes'] / 2**20:,.0f} MiB"


def write(results: pathlib.Path) -> None:
    """Fills the tables of the page beside `results`."""
    rows = json.loads(results.read_text())["rows"]
    parts = {"windows": table(rows, whole=False), "whole": table(rows, whole=True)}
    pages.fill_readme(results, parts)


if __name__ == "__main__":
    pages.report(__doc__, RESULTS, write)
