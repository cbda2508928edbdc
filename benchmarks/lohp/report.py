"""The tables of README.md, from its results: `python -m benchmarks.lohp.report [--results FILE]`."""

import json
import pathlib
from typing import Any

from benchmarks import pages

RESULTS = pathlib.Path(__file__).with_name("results.json")
TABLES = {
    "five-way": {"5way_10shot": "ten images", "5way_1shot": "one image"},
    "partitions": {"partitions": "fifty images"},
    "harder": {
        "5way_support_teacher": "teachers see the ten images",
        "5way_new_classes": "new classes",
    },
}
"""Settings beside each other in a table, with what a column is called."""
NAMES = {
    "teacher_adam": "teacher, Adam on all training images",
    "teacher_sgd": "teacher, SGD",
    "teacher_sam": "teacher, SAM",
    "hypernetwork": "hypernetwork, trained on the task loss",
    "hypernetwork_regression": "hypernetwork, regression to the teacher's weights",
    "lohp": "**Lo-Hp**",
    "lohp_consolidated": "**Lo-Hp, consolidated with the task loss**",
    "cloning": "cloning of the teacher's steps",
    "ridge": "ridge regression to the teacher's weights",
    "same_support_adam": "Adam on the support, tuned",
    "same_support_adamw": "AdamW on the support, tuned",
    "ridge_probe": "ridge regression to the support's labels",
    "mean_weights": "mean of the training tasks' weights",
    "nearest_task": "nearest training task",
    "paper_literal": "Lo-Hp's published objective, literally",
}
_OTHERS = {"teacher_adam": "teacher, Adam"}
"""Names in the table where teachers may see less."""


def share(value: float) -> str:
    """Three digits, without the zero before the point."""
    return f"{value:.3f}".removeprefix("0")


def with_spread(row: dict[str, Any]) -> str:
    """Mean accuracy over seeds, with its standard deviation where there are several."""
    spread = row["accuracy_std_over_seeds"]
    return share(row["accuracy"]) + ("" if spread is None else f" ± {share(spread)}")


def table(results: dict[str, Any], settings: dict[str, str]) -> str:
    """Methods that all settings have, in the order of the first."""
    summaries = [{row["method"]: row for row in results[s]["summary"]} for s in settings]
    header = ["method", *(c for title in settings.values() for c in (title, "worst task"))]
    lines = ["| " + " | ".join([*header, "gradients"]) + " |", "|---" * (len(header) + 1) + "|"]
    names = NAMES if "5way_support_teacher" not in settings else NAMES | _OTHERS
    for method in summaries[0]:
        rows = [summary[method] for summary in summaries if method in summary]
        if len(rows) < len(summaries):
            continue
        cells = [names[method]]
        for row in rows:
            cells += [with_spread(row), share(row["accuracy_min"])]
        counts = dict.fromkeys(f"{row['gradients']:.0f}" for row in rows)
        lines.append("| " + " | ".join([*cells, ", ".join(counts)]) + " |")
    return "\n".join(lines)


def write(path: pathlib.Path) -> None:
    """Puts the tables into the page."""
    results = json.loads(path.read_text())
    have = {name: it for name, it in TABLES.items() if it.keys() <= results.keys()}
    pages.fill_readme(path, {name: table(results, settings) for name, settings in have.items()})


if __name__ == "__main__":
    pages.report(__doc__, RESULTS, write)
