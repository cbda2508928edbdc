"""The table of README.md, from its results: `python -m benchmarks.sine.report [--results FILE]`."""

import json
import pathlib
from typing import Any

import numpy as np

from benchmarks import pages

RESULTS = pathlib.Path(__file__).with_name("results.json")
NAMES = {
    "constant": "the mean of the task, whatever the input",
    "ridge_random_features": "ridge on random Fourier features",
    "same_support_adam": "Adam on the points",
    "same_support_adam_best": "Adam on the points, best number of steps",
    "maml": "MAML",
    "hypernetwork": "hypernetwork, trained on the task loss",
    "hypernetwork_long": "hypernetwork, with four times the tasks and updates",
    "hypernetwork_regression": "hypernetwork, regression to the teacher's weights",
    "teacher": "teacher, Adam on a hundred points",
    "lohp": "**Lo-Hp**",
    "lohp_consolidated": "**Lo-Hp, consolidated with the task loss**",
    "lohp_feedback_5": "**Lo-Hp with feedback**",
    "lohp_feedback_10": "**Lo-Hp with feedback**",
    "lohp_feedback_task_loss_5": "**Lo-Hp with feedback, trained on the task loss**",
    "lohp_feedback_task_loss_10": "**Lo-Hp with feedback, trained on the task loss**",
}


def table(rows: list[dict[str, Any]]) -> str:
    """Methods by gradients, mean and spread over seeds for each number of points, best first."""
    shots = sorted({row["shots"] for row in rows})
    groups: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in rows:
        best = row["method"].endswith("_best")
        gradients = "tuned" if best else f"{row['gradients']:.0f}"
        group = groups.setdefault((row["method"], gradients), {})
        group.setdefault(row["shots"], []).append(row["objective"])
    lines = ["| method | gradients | " + " | ".join(f"K = {k}" for k in shots) + " |"]
    lines.append("|---" * (len(shots) + 2) + "|")
    last = shots[-1]
    for (method, gradients), by_shots in sorted(
        groups.items(), key=lambda item: np.mean(item[1].get(last, [np.inf]))
    ):
        cells = [_cell(by_shots.get(k)) for k in shots]
        lines.append("| " + " | ".join([NAMES[method], gradients, *cells]) + " |")
    return "\n".join(lines)


def _cell(values: list[float] | None) -> str:
    if values is None:
        return ""
    if len(values) == 1:
        return f"{values[0]:.3g}"
    return f"{np.mean(values):.3g} ± {np.std(values, ddof=1):.1g}"


def write(results: pathlib.Path) -> None:
    """Fills the table of the page beside `results`."""
    pages.fill_readme(results, {"sine": table(json.loads(results.read_text())["rows"])})


if __name__ == "__main__":
    pages.report(__doc__, RESULTS, write)
