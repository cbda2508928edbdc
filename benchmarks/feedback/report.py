"""The tables and pictures of README.md: `python -m benchmarks.feedback.report [--results FILE]`."""

import json
import pathlib
from typing import Any

from benchmarks import pages
from benchmarks.lohp.report import share, with_spread
from lohp_jax.evaluation import plots
from lohp_jax.evaluation.standings import standings
from lohp_jax.files import write_atomically

RESULTS = pathlib.Path(__file__).with_name("results.json")
TABLES = {
    "new-classes": "new_classes",
    "seen-classes": "seen_classes",
    "partitions": "partitions",
}
LOOPS = {
    "gradient": "**closed loop: sees loss and gradient**",
    "loss": "closed loop: sees the loss alone",
    "likelihood": "closed loop with gradient, trained by cloning",
    "task_loss": "closed loop with gradient, trained on the task loss",
}
NAMES = {
    "lohp": "open loop: Lo-Hp without feedback",
    "teacher_adam": "teacher, Adam on all training images",
    "same_support_adam": "Adam on the support, tuned",
    "ridge": "ridge regression to the teacher's weights",
    "nearest_task": "nearest training task",
}


HEAD = (
    "method",
    "accuracy",
    "worst task",
    "gradients",
    "forward passes",
    "trust",
    "training tasks",
    "seeds",
)


def table(variants: dict[str, Any]) -> str:
    """The closed loops beside the open one, Adam at several numbers of gradients, and the teacher.

    A mean over seeds has its standard deviation beside it.
    """
    found = []
    for variant, content in variants.items():
        trained = {row["method"]: with_spread(row) for row in content["summary"]["train"]}
        for row in content["summary"]["held_out"]:
            loop = row["method"] == "lohp_feedback"
            name = (
                LOOPS[variant] if loop else _name(row["method"]) if variant == "gradient" else None
            )
            if name is not None:
                cells = _cells(name, row, means(content, row), trained.get(row["method"], ""))
                found.append((row["accuracy"], cells))
    found.sort(key=lambda item: -item[0])
    lines = [HEAD, ["---"] * len(HEAD), *(cells for _, cells in found)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(name: str, row: dict[str, Any], told: dict[str, float], trained: str) -> list[str]:
    spent = [f"{row['gradients']:.0f}", f"{told['forward_passes']:.0f}"]
    trust = share(told["trust"]) if "trust" in told else ""
    scored = [with_spread(row), share(row["accuracy_min"])]
    return [name, *scored, *spent, trust, trained, str(row["num_seeds"])]


def means(content: dict[str, Any], summary: dict[str, Any]) -> dict[str, float]:
    """Means over the seeds of what else the rows of a method on unseen tasks tell."""
    rows = [
        row
        for row in content["rows"]
        if row["method"] == summary["method"] and row["split"] == "held_out"
    ]
    names = [name for name in ("forward_passes", "trust", "fallbacks") if name in rows[0]]
    return {name: sum(row[name] for row in rows) / len(rows) for name in names}


def _name(method: str) -> str | None:
    """What the table calls a row beside the closed loops; None for one that it leaves out."""
    adam, _, number = method.rpartition("_")
    if adam == "same_support_adam":
        return f"Adam on the support, {number} steps"
    return NAMES.get(method)


def draw(results: pathlib.Path, setting: str, content: dict[str, Any]) -> None:
    """Writes the pictures of a setting: accuracy by gradients, and trust by distance."""
    import matplotlib.style

    rows = {"family": setting, "measure": "accuracy", "main": "lohp_feedback", "imitated": None}
    compared = standings(rows | {"rows": content["rows"]}, str(results))
    figures = content["figures_of_seed_0"]
    with matplotlib.style.context(["default", plots.STYLE]):
        spent = plots.plot_gradients(
            figures["score_by_step"], setting, compared, plots.colors_of(compared, [])
        )
        (trust,) = plots.plot_trust(figures["familiarity"], setting)
        for name, plot in (("gradients", spent), ("trust", trust)):
            path = pages.beside(results, f"{name}_{setting}.svg")
            write_atomically(path, plots.to_svg(plot.figure))


def write(path: pathlib.Path) -> None:
    """Puts the tables into the page and draws its pictures."""
    results = json.loads(path.read_text())
    have = {name: setting for name, setting in TABLES.items() if setting in results}
    pages.fill_readme(path, {name: table(results[setting]) for name, setting in have.items()})
    for setting in have.values():
        if "gradient" in results[setting]:
            draw(path, setting, results[setting]["gradient"])


if __name__ == "__main__":
    pages.report(__doc__, RESULTS, write)
