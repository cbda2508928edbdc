"""The table of README.md, from its results: `python -m benchmarks.size.report [--results FILE]`."""

import json
import pathlib
import statistics
from typing import Any

from benchmarks import pages
from benchmarks.lohp.report import share

RESULTS = pathlib.Path(__file__).with_name("results.json")
QUALITY = pathlib.Path(__file__).with_name("quality.json")
OTHERS = {
    "teacher": "*the teacher itself*",
    "adam_5": "*Adam on the support*",
    "adam_100": "*Adam on the support*",
}
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


def quality_table(rows: list[dict[str, Any]], part: str) -> str:
    """Accuracy by what the network sees at once, mean and spread over seeds, beside the teacher."""
    groups: dict[tuple[str, int | None, int | None], list[dict[str, Any]]] = {}
    for row in rows:
        if row["part"] == part:
            look = row["method"], row["window"], row["batch_size"]
            groups.setdefault(look, []).append(row)
    if not groups:
        return "Not measured yet."
    head = (
        "the policy sees",
        "trajectories an update",
        "gradients",
        "accuracy",
        "worst task",
        "seeds",
        "seconds",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for (method, window, batch_size), found in sorted(
        groups.items(), key=lambda item: -_mean(item[1])
    ):
        name = OTHERS.get(method)
        if name is None:
            name = f"windows of {window} tokens" if window else "all tokens at once"
        if method == "lohp_feedback":
            name += ", and the gradient"
        scored = [_spread(found), share(min(row["accuracy_min"] for row in found)), str(len(found))]
        seconds = [row["seconds"] for row in found if row["seconds"] is not None]
        took = f"{statistics.mean(seconds):.0f}" if seconds else ""
        spent = str(found[0]["gradients"])
        lines.append(f"| {' | '.join([name, str(batch_size or ''), spent, *scored, took])} |")
    return "\n".join(lines)


def _mean(rows: list[dict[str, Any]]) -> float:
    return statistics.mean(row["accuracy"] for row in rows)


def _spread(rows: list[dict[str, Any]]) -> str:
    if len(rows) == 1:
        return share(_mean(rows))
    return f"{share(_mean(rows))} ± {share(statistics.stdev(row['accuracy'] for row in rows))}"


def _memory(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['peak_bytes'] / 2**20:,.0f} MiB"


def write(results: pathlib.Path) -> None:
    """Fills the tables of the page beside `results`."""
    rows = json.loads(results.read_text())["rows"]
    parts = {"windows": table(rows, whole=False), "whole": table(rows, whole=True)}
    quality = results.with_name(QUALITY.name)
    measured = json.loads(quality.read_text())["rows"] if quality.exists() else []
    parts |= {part: quality_table(measured, part) for part in ("perceptron", "convolution")}
    pages.fill_readme(results, parts)


if __name__ == "__main__":
    pages.report(__doc__, RESULTS, write)
