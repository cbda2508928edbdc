"""Tables and plots of HUB and its rivals: `python -m benchmarks.hub.report [--merge FILE ...]`.

Writes tables.md and its pictures beside results.json.

The cost of a run is its objective, or one minus its accuracy; one that ends with anything not finite,
or above its start, costs what its start does and has failed. So has one that goes less than half of the
way, in logarithms, from its start to the cost of the tuned hand-designed arm. Costs are interquartile means over seeds, with nominal 95 % bootstrap intervals,
which are too narrow for five seeds. "Times the hand-designed" is the time for each gradient, measured in
turn with that arm; "hand-designed in the same time" is what that arm reaches in as much time, run longer
at the rate that was best for the shorter run. `constant_best` tunes its weight; its rate is the middle
one of those that the others try. Rates that were equally good in tuning are marked "tie".
"""

import argparse
import json
import pathlib
import sys
from typing import Any, NamedTuple

import matplotlib.figure
import numpy as np
import scipy.stats

from benchmarks.hub import tasks as hub_tasks
from benchmarks.pages import beside
from lohp_jax.files import write_atomically

RESULTS = pathlib.Path(__file__).with_name("results.json")
TOLERANCE = 1.02
POINTS = 0.005
"""Of accuracy, that count as no difference."""
NUM_RESAMPLES = 2000


class Cell(NamedTuple):
    """An arm on a task.

    Attributes:
      costs: `[seeds]` at the end.
      curves: `[seeds, records + 1]`.
      failed: `[seeds]` bool.
      floor: costs below it are not told apart.
      slack: difference of costs that is none.
      mean: interquartile mean of the costs.
      interval: its 95 % bootstrap interval.
      clock: time of a gradient over that of the hand-designed arm, nan where it has not been measured.
      row: what the benchmark wrote.
    """

    costs: np.ndarray
    curves: np.ndarray
    failed: np.ndarray
    floor: float
    slack: float
    mean: float
    interval: tuple[float, float]
    clock: float
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


def read_costs(row: dict[str, Any], metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Costs along the runs, `[seeds, records + 1]`, those that count at the end, and which are lost."""
    curves = hub_tasks.cost_of(metric)(np.array(row["scores"], float))  # None becomes nan
    loss = np.array(row["final"]["loss"], float)
    start = curves[:, :1]
    curves = np.where(np.isfinite(curves), curves, start)
    lost = ~np.isfinite(loss) | (curves[:, -1] > start[:, 0])
    return curves, np.where(lost, start[:, 0], curves[:, -1]), lost


def read_cells(results: dict[str, Any]) -> dict[str, dict[str, Cell]]:
    """Cells by task and arm."""
    cells = {}
    for task, found in results.items():
        accuracy = found["metric"] == "accuracy"
        read = {arm: read_costs(row, found["metric"]) for arm, row in found["arms"].items()}
        hand = iqm(read["hand"][1])
        cells[task] = {}
        for arm, row in found["arms"].items():
            curves, costs, lost = read[arm]
            cells[task][arm] = Cell(
                costs=costs,
                curves=curves,
                failed=lost | (costs > np.sqrt(curves[:, 0] * hand)),
                floor=0.5 / found["num_query"] if accuracy else 1e-12,
                slack=POINTS if accuracy else 0.0,
                mean=float(iqm(costs)),
                interval=bootstrap(costs),
                clock=row.get("times_hand", np.nan),
                row=row,
            )
    return cells


def in_the_same_time(cells: dict[str, Cell], arm: str) -> str:
    """Cost of the hand-designed arm once it has had the time of an arm."""
    clock = cells[arm].clock
    if np.isnan(clock) or "hand_long" not in cells:
        return "-"
    curves = cells["hand_long"].curves
    records = curves.shape[1] - 1
    steps = [cells[name].row["settings"]["num_steps"] for name in ("hand", "hand_long")]
    length = steps[1] // steps[0]
    reached = min(records, round(records * clock / length))
    longer = f" ({length}x)" if clock > length else ""
    return f"{iqm(curves[:, reached]):.3g}{longer}"


def how_tuned(row: dict[str, Any]) -> str:
    """Whether the scalar of an arm was one of several as good, or at the edge of what was tried."""
    costs = [np.mean(values) for values in row["trials"].values()]
    if np.sum(np.array(costs) <= min(costs)) > 1:
        return " (tie)"
    tried = row["settings"]["scalars"]
    return " (edge)" if row["scalar"] in (min(tried), max(tried)) else ""


def task_table(found: dict[str, Any], cells: dict[str, Cell]) -> str:
    """One task, best arm first."""
    names = [k for k in cells["hand"].row["final"] if k not in (found["metric"], "loss")]
    header = ["arm", "cost", "95 % interval", "worst seed", "failed", "tuned to"]
    header += ["times the hand-designed", "hand-designed in the same time", *names]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for arm, cell in sorted(cells.items(), key=lambda pair: pair[1].mean):
        low, high = cell.interval
        tried = cell.row["settings"]["scalars"]
        columns = [
            arm,
            f"{cell.mean:.3g}",
            f"{low:.3g} to {high:.3g}",
            f"{cell.costs.max():.3g}",
            f"{cell.failed.sum()} of {len(cell.failed)}",
            f"{cell.row['scalar']:g}{how_tuned(cell.row)}" if len(tried) > 1 else "nothing",
            "-" if np.isnan(cell.clock) else f"{cell.clock:.1f}",
            in_the_same_time(cells, arm),
        ]
        more = [np.array(cell.row["final"][name], float) for name in names]
        columns += [f"{iqm(values):.3g}" for values in more]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


class Standing(NamedTuple):
    """An arm over all its tasks; ratios are of its cost to that of the tuned hand-designed arm.

    Attributes:
      ratio: geometric mean over tasks of the ratio of interquartile means.
      interval: its 95 % bootstrap interval over seeds, the same for both arms, for each task apart.
      worst: the largest ratio of a task.
      within: tasks on which the arm keeps up with the better of its two arms.
      tasks: all of them.
      failed: failed runs.
      runs: all of them.
    """

    ratio: float
    interval: tuple[float, float]
    worst: float
    within: int
    tasks: int
    failed: int
    runs: int


def stand(tasks: dict[str, dict[str, Cell]], arm: str, learned: str) -> Standing:
    """Puts an arm beside the tuned hand-designed one and the learned one on tasks that have all."""
    pairs = [(row[arm], row["hand"]) for row in tasks.values()]
    every = np.array([log_ratio(cell, hand) for cell, hand in pairs])
    rng = np.random.default_rng(0)
    means = np.mean(
        [
            log_ratio(
                *pair, rng.integers(len(pair[0].costs), size=(len(pair[0].costs), NUM_RESAMPLES))
            )
            for pair in pairs
        ],
        axis=0,
    )
    return Standing(
        ratio=float(np.exp(every.mean())),
        interval=tuple(np.exp(np.quantile(means, [0.025, 0.975])).tolist()),
        worst=float(np.exp(every.max())),
        within=sum(keeps_up(row, arm, learned) for row in tasks.values()),
        tasks=len(tasks),
        failed=sum(int(cell.failed.sum()) for cell, _ in pairs),
        runs=sum(len(cell.failed) for cell, _ in pairs),
    )


def log_ratio(cell: Cell, other: Cell, seeds: Any = slice(None)) -> np.ndarray:
    """Of interquartile means over the seeds given."""
    costs = [np.maximum(iqm(c.costs[seeds]), c.floor) for c in (cell, other)]
    return np.log(costs[0] / costs[1])


def keeps_up(row: dict[str, Cell], arm: str, learned: str) -> bool:
    """Whether an arm is at most 2 %, or half a point of accuracy, worse than the better of its two."""
    best = min(row["hand"].mean, row[learned].mean)
    return row[arm].mean <= TOLERANCE * best + row[arm].slack


def tells_apart(row: dict[str, Cell], rule: str) -> bool:
    """Whether the hand-designed arm learns, and any two arms with a rule differ by the tolerance."""
    means = [cell.mean for arm, cell in row.items() if arm.split("/")[0] in ("hand", rule)]
    learns = row["hand"].failed.mean() < 0.5
    return learns and max(means) > TOLERANCE * min(means) + row["hand"].slack


def overall(cells: dict[str, dict[str, Cell]], rule: str) -> list[str]:
    """Every arm with one learned optimizer over the tasks that have been run with it."""
    learned, trust, invert = (f"{rule}/{arm}" for arm in ("alone", "hub_trust", "hub_invert"))
    have = {task: row for task, row in cells.items() if learned in row}
    tasks = {task: row for task, row in have.items() if tells_apart(row, rule)}
    arms = {a for row in tasks.values() for a in row if "/" not in a or a.split("/")[0] == rule}
    lines = [
        "| arm | tasks | cost over tuned hand-designed, geometric mean over tasks | 95 % interval | "
        "`hub_invert`, `hub_trust` on the same tasks | worst task | keeps up with the better arm | "
        "failed runs |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def standing(arm, *others):
        """Of the first on the tasks of all."""
        return stand({t: r for t, r in tasks.items() if r.keys() >= {arm, *others}}, arm, learned)

    standings = {arm: standing(arm) for arm in arms - {"hand_long"}}
    for arm, it in sorted(standings.items(), key=lambda pair: (-pair[1].tasks, pair[1].ratio)):
        same = [standing(other, arm) for other in (invert, trust)]
        beside = ", ".join(f"{x.ratio:.2f}" if x.tasks == it.tasks else "-" for x in same)
        lines.append(
            f"| {arm} | {it.tasks} | {it.ratio:.2f} | {it.interval[0]:.2f} to {it.interval[1]:.2f} | "
            f"{beside} | {it.worst:.3g} | {it.within} | {it.failed} of {it.runs} |"
        )
    behind = [
        f"{task} ({row[trust].mean:.3g}; hand-designed {row['hand'].mean:.3g}, learned "
        f"{row[learned].mean:.3g})"
        for task, row in tasks.items()
        if trust in row and not keeps_up(row, trust, learned)
    ]
    silent = ", ".join(task for task in have if task not in tasks) or "none"
    return [
        f"Tasks: {', '.join(tasks)}. Left out, as all arms agree or the hand-designed one does not "
        f"learn: {silent}. To keep up is to be at most 2 %, or half a point of accuracy, worse than the "
        "better one of the tuned hand-designed and the learned arm.",
        "\n".join(lines),
        f"`{trust}` does not keep up on: {', '.join(behind) or 'none'}.",
    ]


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
            gradients = np.linspace(0, row["hand"].row["settings"]["num_steps"], len(middle))
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


def task_section(task: str, found: dict[str, Any], cells: dict[str, Cell]) -> list[str]:
    """A heading, the table, and what to compare it with."""
    parts = [f"### {task}", hub_tasks.ABOUT[task], task_table(found, cells)]
    if found["trivial"]:
        means = {name: np.mean(values) for name, values in found["trivial"].items()}
        parts += [f"Without a network: {', '.join(f'{k} {v:.3g}' for k, v in means.items())}."]
    if paper := hub_tasks.PAPER.get(task):
        numbers = ", ".join(
            f"{arm} {value:g}".replace("nan", "failed") for arm, value in paper.items()
        )
        parts += [f"The paper ({hub_tasks.PAPER_NOTE[task]}): {numbers}."]
    return parts


def merge(results: dict[str, Any], more: dict[str, Any]) -> None:
    """Adds tasks and arms, in the order of the tasks."""
    for task, found in more.items():
        arms = results.get(task, {"arms": {}})["arms"] | found["arms"]
        results[task] = found | {"arms": arms}
    ordered = {task: results[task] for task in hub_tasks.TASKS if task in results}
    results.clear()
    results.update(ordered)


def main() -> None:
    """Writes the page and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument(
        "--merge", type=pathlib.Path, nargs="*", default=[], help="files to be taken into --results"
    )
    arguments = parser.parse_args()
    path = arguments.results
    results = json.loads(path.read_text()) if path.exists() or not arguments.merge else {}
    for other in arguments.merge:
        merge(results, json.loads(other.read_text()))
    if arguments.merge:
        write_atomically(path, (json.dumps(results) + "\n").encode())
    results = {task: found for task, found in results.items() if "hand" in found["arms"]}
    cells = read_cells(results)
    parts = [
        "# HUB and its rivals",
        __doc__.partition("results.json.")[2].replace("\n", " ").strip(),
    ]
    for rule in sorted({arm.split("/")[0] for row in cells.values() for arm in row if "/" in arm}):
        picture = beside(path, f"{rule}.png")
        drawn = {task: row for task, row in cells.items() if f"{rule}/alone" in row}
        draw_curves(drawn, rule).savefig(picture, dpi=110)
        parts += [f"## With `{rule}` as the learned optimizer", *overall(cells, rule)]
        parts += [f"![Median cost over gradients with {rule}]({picture.name})"]
    parts += ["## Task by task"]
    for task, row in cells.items():
        parts += task_section(task, results[task], row)
    write_atomically(beside(path, "tables.md"), ("\n\n".join(parts) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
