"""The tables of README.md, from its results: `python -m benchmarks.domains.report [--results FILE]`."""

import collections
import json
import pathlib
from typing import Any

import numpy as np

from benchmarks import pages
from benchmarks.lohp.report import share

RESULTS = pathlib.Path(__file__).with_name("results.json")
NAMES = {
    "teacher_adam": "teacher, Adam on all training images of the new angle",
    "erm": "ERM, one linear classifier for all angles",
    "lohp": "**Lo-Hp**",
    "lohp_feedback": "**Lo-Hp, closed loop**",
    "same_support_adam": "Adam on the support, tuned",
    "ridge": "ridge regression to the teacher's weights",
    "nearest_task": "nearest training task",
    "pooled_logistic_regression": "logistic regression",
    "pooled_nearest_image": "nearest image",
}


def table(rows: list[dict[str, Any]]) -> str:
    """Accuracy of each method on each angle that was held out, and the mean of several, best first.

    A cell is the mean over seeds; gradients are those spent on a new task.
    """
    rows = [row for row in rows if row.get("split", "held_out") == "held_out"]
    angles = sorted({row["held_out"] for row in rows}, key=float)
    scores = collections.defaultdict(list)
    for row in rows:
        scores[row["method"], row["held_out"]].append(row["accuracy"])
    gradients = collections.defaultdict(list)
    for row in rows:
        gradients[row["method"]].append(row.get("gradients", 0))
    means = {m: [float(np.mean(scores[m, angle])) for angle in angles] for m in gradients}
    mean = ["mean"] if len(angles) > 1 else []
    head = ["method", *(f"{angle}°" for angle in angles), *mean, "gradients"]
    lines = [head, ["---"] * len(head)]
    for method, cells in sorted(means.items(), key=lambda item: -np.mean(item[1])):
        spent = f"{np.mean(gradients[method]):.0f}"
        average = [share(np.mean(cells))] if mean else []
        lines.append([_name(method), *map(share, cells), *average, spent])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _name(method: str) -> str:
    adam, _, number = method.rpartition("_")
    if adam == "same_support_adam":
        return f"Adam on the support, {number} steps"
    return NAMES[method]


def write(path: pathlib.Path) -> None:
    """Puts the tables into the page."""
    results = json.loads(path.read_text())
    parts = {"digits": results["rows"], "pooled": results["pooled"]}
    pages.fill_readme(path, {name: table(rows) for name, rows in parts.items()})


if __name__ == "__main__":
    pages.report(__doc__, RESULTS, write)
