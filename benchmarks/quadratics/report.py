"""The table and picture of README.md: `python -m benchmarks.quadratics.report [--results FILE]`."""

import json
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import pages
from lohp_jax.evaluation import plots
from lohp_jax.files import write_atomically

RESULTS = pathlib.Path(__file__).with_name("results.json")
NAMES = {
    "lohp": "**Lo-Hp, well-posed**",
    "paper_literal": "Lo-Hp as published",
    "cloning": "cloning: likelihood of the trajectories",
}
COLORS = {"lohp": "#0072b2", "paper_literal": "#d55e00", "cloning": "#7a7a7a"}
HEAD = (
    "objective",
    "k",
    "steps",
    "end-point error",
    "path error",
    "ELBO - log Z",
    "EUBO - log Z",
    "rate",
    "seeds",
)
NUM_STEPS = 24
CURVES = {
    "end_error": "end-point error",
    "path_error": "path error",
    "gap": "EUBO - ELBO, nats a weight",
}


def chosen(rows: list[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Rows of each objective and k at the rate of the least end-point error on training tasks.

    A rate at which a seed diverged is not picked while there is another.
    """
    groups: dict[tuple[str, int], dict[float, list[dict[str, Any]]]] = {}
    for row in rows:
        rates = groups.setdefault((row["method"], row["compression"]), {})
        rates.setdefault(row["rate"], []).append(row)

    def error(rows):
        if any("diverged" in row for row in rows):
            return float("inf")
        return statistics.mean(row["curve"][-1]["train"]["end_error"] for row in rows)

    return {place: min(rates.values(), key=error) for place, rates in groups.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """What each objective reached on unseen tasks, mean and standard deviation over seeds."""
    lines = ["| " + " | ".join(HEAD) + " |", "| --- " * len(HEAD) + "|"]
    order = list(NAMES)
    for (method, k), found in sorted(
        chosen(rows).items(), key=lambda item: (item[0][1], order.index(item[0][0]))
    ):
        cells = [NAMES[method], str(k), str(NUM_STEPS // k)]
        diverged = sum("diverged" in row for row in found)
        if diverged:
            cells += [f"diverged under {diverged} of {len(found)} seeds", "", "", ""]
        else:
            ends = [row["curve"][-1]["held_out"] for row in found]
            cells += [
                spread([end[name] for end in ends])
                for name in ("end_error", "path_error", "elbo", "eubo")
            ]
        cells += [f"{found[0]['rate']:g}", str(len(found))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean ± standard deviation, two digits."""
    mean = f"{statistics.mean(values):.2g}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.1g}"


def draw(rows: list[dict[str, Any]]) -> bytes:
    """Errors and the gap between the bounds of log Z against updates, one column for each k, as SVG."""
    import matplotlib.figure
    import matplotlib.style

    with matplotlib.style.context(["default", plots.STYLE]):
        groups = chosen(rows)
        columns = sorted({k for _, k in groups})
        figure = matplotlib.figure.Figure(figsize=(3.2 * len(columns), 7.2), layout="constrained")
        axes = figure.subplots(len(CURVES), len(columns), sharex=True, sharey="row", squeeze=False)
        for (method, k), found in groups.items():
            for row, name in enumerate(CURVES):
                _draw_curve(axes[row, columns.index(k)], found, method, _READ[name])
        for row, label in enumerate(CURVES.values()):
            axes[row, 0].set(yscale="log", ylabel=label)
            axes[row, 0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes[row, 0].yaxis.set_minor_formatter(lambda value, _: "")
        for column, k in enumerate(columns):
            axes[0, column].set_title(f"k = {k}, {NUM_STEPS // k} steps")
            axes[-1, column].set_xlabel("updates")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(NAMES))
        return plots.to_svg(figure)


_READ: dict[str, Callable[[dict[str, float]], float]] = {
    "end_error": lambda errors: errors["end_error"],
    "path_error": lambda errors: errors["path_error"],
    "gap": lambda errors: errors["eubo"] - errors["elbo"],
}


def _draw_curve(axes: Any, rows: list[dict[str, Any]], method: str, read: Callable) -> None:
    """The mean over seeds, as far as all of them came, and their range."""
    shortest = min((row["curve"] for row in rows), key=len)
    if not shortest:
        return
    updates = [point["updates"] for point in shortest]
    values = np.array(
        [[read(point["held_out"]) for point in row["curve"][: len(updates)]] for row in rows]
    )
    name = NAMES[method].strip("*")
    axes.plot(updates, values.mean(axis=0), color=COLORS[method], label=name)
    axes.fill_between(updates, values.min(0), values.max(0), color=COLORS[method], alpha=0.2, lw=0)


def write(results: pathlib.Path) -> None:
    """Fills the table of the page beside `results` and draws the picture."""
    rows = json.loads(results.read_text())["rows"]
    pages.fill_readme(results, {"quadratics": table(rows)})
    write_atomically(pages.beside(results, "curves.svg"), draw(rows))


if __name__ == "__main__":
    pages.report(__doc__, RESULTS, write)
