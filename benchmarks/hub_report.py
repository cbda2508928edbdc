"""Tables and plots of benchmarks/results/hub.json: `python benchmarks/hub_report.py`.

Writes benchmarks/results/hub.md and its pictures. The cost of a run is its objective, or one minus its
accuracy; a failed run (not finite, or worse than its start) costs what its start does. Interquartile
means come with 95 % bootstrap intervals over seeds. "Cost in equal time" is that of an arm once the run
of the tuned hand-designed arm is over; all arms of a task ran on one core of their own.
"""

import argparse
import json
import pathlib
import sys
from typing import Any, NamedTuple

import hub_tasks
import matplotlib.figure
import numpy as np
import scipy.stats

from lohp_jax.files import write_atomically

RESULTS = pathlib.Path(__file__).parent / "results"
TOLERANCE = 1.02
NUM_RESAMPLES = 2000


class Cell(NamedTuple):
    """An arm on a task.

    Attributes:
      costs: `[seeds]` at the end.
      curves: `[seeds, records + 1]`.
      failed: `[seeds]` bool.
      accuracy: whether the task is judged by accuracy.
      mean: interquartile mean of the costs.
      interval: its 95 % bootstrap interval.
      clock: seconds of a run beside those of the tuned hand-designed arm.
      clock_mean: interquartile mean of the costs once that arm's time is up.
      row: what the benchmark wrote.
    """

    costs: np.ndarray
    curves: np.ndarray
    failed: np.ndarray
    accuracy: bool
    mean: float
    interval: tuple[float, float]
    clock: float
    clock_mean: float
    row: dict[str, Any]


def iqm(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Mean of the middle half."""
    return scipy.stats.trim_mean(values, 0.25, axis=axis)


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the interquartile mean over the first axis."""
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    found = scipy.stats.bootstrap(
        (values,), iqm, n_resamples=NUM_RESAMPLES, method="percentile", rng=0, vectorized=True
    )
    return tuple(map(float, found.confidence_interval))


def read_cell(row: dict[str, Any], metric: str, hand: dict[str, Any]) -> Cell:
    """Statistics of an arm beside the tuned hand-designed one."""
    scores = np.array(row["scores"], float)  # None becomes nan
    curves = hub_tasks.cost_of(metric)(scores)
    start = curves[:, :1]
    failed = ~np.isfinite(curves[:, -1]) | (curves[:, -1] > start[:, 0])
    curves = np.where(np.isfinite(curves), curves, start)
    costs = np.where(failed, start[:, 0], curves[:, -1])
    clock = row["seconds"] / hand["seconds"]
    records = curves.shape[1] - 1
    affordable = min(records, int(records / clock))
    on_time = np.minimum(curves[:, affordable], start[:, 0])
    return Cell(
        costs,
        curves,
        failed,
        metric == "accuracy",
        float(iqm(costs)),
        bootstrap(costs),
        clock,
        float(iqm(on_time)),
        row,
    )


def read_cells(results: dict[str, Any]) -> dict[str, dict[str, Cell]]:
    """Cells by task and arm."""
    return {
        task: {
            arm: read_cell(row, found["metric"], found["arms"]["hand"])
            for arm, row in found["arms"].items()
        }
        for task, found in results.items()
        if "hand" in found["arms"]
    }


def task_table(cells: dict[str, Cell], paper: dict[str, float]) -> str:
    """One task, best arm first."""
    lines = [
        "| arm | cost, interquartile mean | 95 % interval | failed | tuned to | time of a run | "
        "cost in equal time |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, cell in sorted(cells.items(), key=lambda pair: pair[1].mean):
        low, high = cell.interval
        tuned = f"{cell.row['scalar']:g}" if len(cell.row["trials"]) > 1 else "nothing"
        lines.append(
            f"| {arm} | {cell.mean:.3g} | {low:.3g} to {high:.3g} | "
            f"{cell.failed.sum()} of {len(cell.failed)} | {tuned} | {cell.clock:.1f}x | "
            f"{cell.clock_mean:.3g} |"
        )
    if paper:
        numbers = ", ".join(
            f"{arm} {value:g}".replace("nan", "failed") for arm, value in paper.items()
        )
        lines += ["", f"The paper, one run each: {numbers}."]
    return "\n".join(lines)


class Standing(NamedTuple):
    """An arm over all its tasks; ratios are of its cost to that of the tuned hand-designed arm.

    Attributes:
      ratio: geometric mean over tasks of the ratio of interquartile means.
      interval: its 95 % bootstrap interval over seeds, the same for both arms, for each task apart.
      worst: the largest ratio of a task.
      within: tasks on which the arm is within `TOLERANCE` of the better of its two arms.
      tasks: all of them.
      failed: failed runs.
      runs: all of them.
      clock: geometric mean of the time of a run.
    """

    ratio: float
    interval: tuple[float, float]
    worst: float
    within: int
    tasks: int
    failed: int
    runs: int
    clock: float


def stand(tasks: dict[str, dict[str, Cell]], arm: str, learned: str) -> Standing:
    """Puts an arm beside the tuned hand-designed one and the learned one on tasks that have all."""
    pairs = [(row[arm], row["hand"]) for row in tasks.values()]
    logs = np.array([_log_ratio(cell.costs, hand.costs) for cell, hand in pairs])
    rng = np.random.default_rng(0)

    def resampled(cell, hand):
        seeds = rng.integers(len(cell.costs), size=(len(cell.costs), NUM_RESAMPLES))
        return _log_ratio(cell.costs[seeds], hand.costs[seeds])

    means = np.mean([resampled(*pair) for pair in pairs], axis=0)
    return Standing(
        ratio=float(np.exp(logs.mean())),
        interval=tuple(np.exp(np.quantile(means, [0.025, 0.975])).tolist()),
        worst=float(np.exp(logs.max())),
        within=sum(keeps_up(row, arm, learned) for row in tasks.values()),
        tasks=len(tasks),
        failed=sum(int(cell.failed.sum()) for cell, _ in pairs),
        runs=sum(len(cell.failed) for cell, _ in pairs),
        clock=float(np.exp(np.mean([np.log(cell.clock) for cell, _ in pairs]))),
    )


def keeps_up(row: dict[str, Cell], arm: str, learned: str) -> bool:
    """Whether an arm is at most 2 % worse than the better one of "hand" and the learned optimizer.

    2 % of the objective, or of the accuracy, whichever the task is judged by.
    """
    own, best = row[arm].mean, min(row["hand"].mean, row[learned].mean)
    if row[arm].accuracy:
        return 1 - own >= (1 - best) / TOLERANCE
    return own <= TOLERANCE * best


def _log_ratio(costs: np.ndarray, others: np.ndarray) -> np.ndarray:
    floor = 1e-12  # an accuracy of 1 costs nothing
    return np.log(np.maximum(iqm(costs), floor)) - np.log(np.maximum(iqm(others), floor))


def overall_table(cells: dict[str, dict[str, Cell]], rule: str) -> str:
    """Every arm with one learned optimizer over all tasks that have been run with it."""
    learned = f"{rule}/alone"
    tasks = {task: row for task, row in cells.items() if learned in row}
    arms = {
        arm for row in tasks.values() for arm in row if "/" not in arm or arm.split("/")[0] == rule
    }
    standings = {
        arm: stand({task: row for task, row in tasks.items() if arm in row}, arm, learned)
        for arm in arms
    }
    lines = [
        "| arm | cost over tuned hand-designed, geometric mean over tasks | 95 % interval | "
        "worst task | tasks within 2 % of the better arm | failed runs | time of a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, it in sorted(standings.items(), key=lambda pair: pair[1].ratio):
        lines.append(
            f"| {arm} | {it.ratio:.2f} | {it.interval[0]:.2f} to {it.interval[1]:.2f} | "
            f"{it.worst:.3g} | {it.within} of {it.tasks} | {it.failed} of {it.runs} | "
            f"{it.clock:.1f}x |"
        )
    return "\n".join(lines)


def losses_of_trust(cells: dict[str, dict[str, Cell]], rule: str) -> str:
    """Where the trust region is worse than the better of its arms by more than the tolerance."""
    arm, learned = f"{rule}/hub_trust", f"{rule}/alone"
    found = [
        f"{task} ({row[arm].mean:.3g}; hand-designed {row['hand'].mean:.3g}, learned "
        f"{row[learned].mean:.3g})"
        for task, row in cells.items()
        if arm in row and learned in row and not keeps_up(row, arm, learned)
    ]
    return f"`{arm}` is more than 2 % worse than the better arm on: {', '.join(found) or 'none'}."


def draw_curves(cells: dict[str, dict[str, Cell]], rule: str) -> matplotlib.figure.Figure:
    """Median cost over gradients, one panel for each task."""
    shown = {
        "hand": ("hand-designed, tuned", "#333333"),
        f"{rule}/alone": ("learned alone", "#d55e00"),
        f"{rule}/hub_vanilla": ("HUB vanilla", "#56b4e9"),
        f"{rule}/hub_invert": ("HUB invert", "#cc79a7"),
        f"{rule}/hub_trust": ("HUB trust", "#0072b2"),
        f"{rule}/lgl2o_race": ("LGL2O race", "#009e73"),
        f"{rule}/graft": ("graft", "#e69f00"),
    }
    columns = 3
    rows = -(-len(cells) // columns)
    figure = matplotlib.figure.Figure(figsize=(4 * columns, 2.9 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for axis, (task, row) in zip(axes, cells.items(), strict=False):
        for arm, (label, color) in shown.items():
            if arm not in row:
                continue
            low, middle, high = np.quantile(row[arm].curves, [0.25, 0.5, 0.75], axis=0)
            gradients = np.linspace(0, row["hand"].row["steps"], len(middle))
            axis.plot(gradients, middle, color=color, label=label, linewidth=1.4)
            axis.fill_between(gradients, low, high, color=color, alpha=0.12, linewidth=0)
        start = np.median(row["hand"].curves[:, 0])
        axis.set(title=task, yscale="log", xlabel="gradients", ylabel="cost")
        axis.set_ylim(top=3 * start)
        axis.grid(color="#e4e4e4")
    for axis in axes[len(cells) :]:
        axis.axis("off")
    lines = {line.get_label(): line for axis in axes for line in axis.lines}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def main() -> None:
    """Writes the page and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS / "hub.json")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text())
    cells = read_cells(results)
    rules = sorted({arm.split("/")[0] for row in cells.values() for arm in row if "/" in arm})
    parts = ["# HUB and its rivals", __doc__.partition("pictures. ")[2].replace("\n", " ").strip()]
    for rule in rules:
        picture = arguments.results.with_name(f"hub_{rule}.png")
        draw_curves(cells, rule).savefig(picture, dpi=110)
        parts += [f"## With `{rule}` as the learned optimizer", overall_table(cells, rule)]
        parts += [losses_of_trust(cells, rule)]
        parts += [f"![Median cost over gradients with {rule}]({picture.name})"]
    parts += ["## Task by task"]
    for task, row in cells.items():
        parts += [
            f"### {task}",
            hub_tasks.ABOUT[task],
            task_table(row, hub_tasks.PAPER.get(task, {})),
        ]
    write_atomically(arguments.results.with_suffix(".md"), ("\n\n".join(parts) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
