"""Tables and plots of HUB and its rivals: `python -m benchmarks.hub.report [--merge FILE ...]`.

Writes tables.md and its pictures beside results.json, and the tables of README.md.
"""

import json
import pathlib
from typing import Any

import matplotlib.figure
import numpy as np

from benchmarks import pages
from benchmarks.hub import equation_6_report
from benchmarks.hub import tasks as hub_tasks
from benchmarks.hub.standings import (
    Cell,
    iqm,
    keeps_up,
    read_cells,
    stand,
    tells_apart,
)
from lohp_jax.files import write_atomically

RESULTS = pathlib.Path(__file__).with_name("results.json")
HEAD = (
    "The cost of a run is its objective, or one minus its accuracy; one that ends with anything not "
    "finite, or above its start, costs what its start does and has failed. So has one that goes less "
    "than half of the way, in logarithms, from its start to the cost of the tuned hand-designed arm. "
    "Costs are interquartile means over seeds, with nominal 95 % bootstrap intervals, which are too "
    'narrow for five seeds. "Times the hand-designed" is the time for each gradient, measured in turn '
    'with that arm; "hand-designed in the same time" is what that arm reaches in as much time, run '
    "longer at the rate that was best for the shorter run. `constant_best` tunes its weight; its rate "
    "is the middle one of those that the others try. Rates that were equally good in tuning are marked "
    '"tie".'
)
NAMES = {
    "hand": "hand-designed alone, tuned",
    "hand_long": "hand-designed with four times the gradients",
    "hand_cosine": "hand-designed, its rate falling along a cosine",
    "hand_default": "hand-designed at a rate of .001",
    "adamw": "AdamW",
    "prodigy": "Prodigy",
    "alone": "learned alone",
    "hub_vanilla": "HUB, vanilla, by tensor",
    "hub_invert": "HUB, inverted, by tensor",
    "hub_vanilla_layer": "HUB as published, vanilla, by layer",
    "hub_invert_layer": "HUB as published, inverted, by layer",
    "hub_trust": "HUB, trust region",
    "hub_trust_untuned": "HUB, trust region, not tuned",
    "constant_half": "half of each",
    "lgl2o_race": "LGL2O, a race at half as many steps",
    "lgl2o_candidate": "LGL2O, every step of the two tried",
}
RULES = {"small": "ships", "celo": "Celo"}
LIQUID, VOLUMES = ("ltc_sine_8", "ltc_sine_16"), ("siren", "siren_brain")


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


def over_tasks(cells: dict[str, dict[str, Cell]]) -> str:
    """The arms that most tasks have, with each learned optimizer; those of one task stay out."""
    lines = [
        "| arm | learned | tasks | cost over tuned hand-designed | 95 % interval | worst task "
        "| keeps up on | failed |",
        "|---|---|---:|---:|---|---:|---:|---:|",
    ]
    published = ("hub_invert_layer", "hub_vanilla_layer")
    shown = ("hub_trust", "hub_invert", "constant_half", "hub_vanilla", "lgl2o_race", "alone")
    for rule, name in RULES.items():
        have = {t: r for t, r in cells.items() if f"{rule}/alone" in r and tells_apart(r, rule)}
        for arm in (*(f"{rule}/{arm}" for arm in (*published, *shown)), "hand", "prodigy"):
            tasks = {task: row for task, row in have.items() if arm in row}
            if len(tasks) < 2:
                continue
            it = stand(tasks, arm, f"{rule}/alone")
            low, high = it.interval
            lines.append(
                f"| {NAMES[arm.rpartition('/')[2]]} | {name} | {it.tasks} | {it.ratio:.2f} "
                f"| {low:.2f} to {high:.2f} | {it.worst:.3g} | {it.within} | {it.failed} of {it.runs} |"
            )
    return "\n".join(lines)


def beside_each_other(cells: dict[str, dict[str, Cell]], tasks: tuple[str, ...]) -> str:
    """Costs of the arms with a name on some tasks, the best on the first of them first."""
    tasks = tuple(task for task in tasks if task in cells)
    arms = {arm: None for task in tasks for arm in cells[task]}
    shown = {a: NAMES[a.rpartition("/")[2]] for a in arms if a.rpartition("/")[2] in NAMES}
    lines = [
        "| arm | learned | " + " | ".join(f"`{task}`" for task in tasks) + " | failed |",
        "|---|---" + "|---:" * (len(tasks) + 1) + "|",
    ]

    def cost(arm):
        return [cells[task][arm].mean if arm in cells[task] else np.inf for task in tasks]

    for arm, name in sorted(shown.items(), key=lambda pair: cost(pair[0])):
        found = [cells[task].get(arm) for task in tasks]
        rule = RULES.get(arm.rpartition("/")[0], "")
        columns = ["" if cell is None else f"{cell.mean:.3g}" for cell in found]
        failed = sum(int(cell.failed.sum()) for cell in found if cell)
        runs = sum(len(cell.failed) for cell in found if cell)
        lines.append(f"| {name} | {rule} | {' | '.join(columns)} | {failed} of {runs} |")
    return "\n".join(lines)


def summary(cells: dict[str, dict[str, Cell]]) -> dict[str, str]:
    """Tables of README.md by name."""
    return {
        "over tasks": over_tasks(cells),
        "liquid": beside_each_other(cells, LIQUID),
        "volumes": beside_each_other(cells, VOLUMES),
    }


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


def read_equation_6(path: pathlib.Path) -> dict[str, Any] | None:
    """What `benchmarks.hub.equation_6` has left beside the results."""
    found = pages.beside(path, "equation_6.json")
    return json.loads(found.read_text()) if found.exists() else None


def write(path: pathlib.Path) -> None:
    """Writes the pages and the pictures."""
    results = json.loads(path.read_text())
    results = {task: found for task, found in results.items() if "hand" in found["arms"]}
    cells = read_cells(results)
    landscape = read_equation_6(path)
    more = equation_6_report.summary(landscape) if landscape else {}
    pages.fill_readme(path, summary(cells) | more)
    parts = ["# HUB and its rivals", HEAD]
    for rule in sorted({arm.split("/")[0] for row in cells.values() for arm in row if "/" in arm}):
        picture = pages.beside(path, f"{rule}.png")
        drawn = {task: row for task, row in cells.items() if f"{rule}/alone" in row}
        draw_curves(drawn, rule).savefig(picture, dpi=110)
        parts += [f"## With `{rule}` as the learned optimizer", *overall(cells, rule)]
        parts += [f"![Median cost over gradients with {rule}]({picture.name})"]
    parts += ["## Task by task"]
    for task, row in cells.items():
        parts += task_section(task, results[task], row)
    if landscape:
        picture = pages.beside(path, "equation_6.png")
        equation_6_report.draw(landscape).savefig(picture, dpi=110)
        parts += equation_6_report.section(landscape)
    write_atomically(pages.beside(path, "tables.md"), ("\n\n".join(parts) + "\n").encode())


if __name__ == "__main__":
    pages.report(__doc__, RESULTS, write, merge)
