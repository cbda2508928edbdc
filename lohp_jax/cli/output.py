"""Everything that the command line prints: progress on standard error, results on standard output."""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import rich.box
import rich.console
import rich.progress
import rich.table

errors = rich.console.Console(stderr=True)


def print_values(values: dict[str, Any], as_json: bool) -> None:
    """Values by their names, a line each, or as JSON."""
    if as_json:
        print(json.dumps(values))
        return
    for name, value in values.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        print(f"{name}: {text}")


def print_results(results: dict[str, Any], as_json: bool) -> None:
    """The rows of a run of Lo-Hp, the best first, or all as JSON."""
    if as_json:
        print(json.dumps(results))
        return
    measure = results["measure"]
    sign, worst = (-1, "min") if measure == "accuracy" else (1, "max")
    title = f"{results['family']}, {results['rows'][0]['num_tasks']} held-out tasks"
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD)
    for column in ("method", measure, "worst task", "gradients", "ms each"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    digits = ".3f" if measure == "accuracy" else ".3g"
    unseen = [row for row in results["rows"] if row["split"] == "held_out"]
    for row in sorted(unseen, key=lambda row: sign * row[measure]):
        table.add_row(
            row["method"],
            f"{row[measure]:{digits}} ± {row[f'{measure}_std'] / row['num_tasks'] ** 0.5:{digits}}",
            f"{row[f'{measure}_{worst}']:{digits}}",
            str(row["gradients"]),
            f"{row['latency_ms_p50']:.2f}",
        )
    rich.console.Console().print(table)
    main = results["main"]
    if main in results["break_even"]:
        print(f"break-even of {main}: {results['break_even'][main]['words']}")
        print(f"honesty of {main}: {results['honesty'][main]['verdict']['words']}")


def print_solutions(results: dict[str, Any]) -> None:
    """The rows of a run of Diff-L2O."""
    columns = {
        "gap_mean": "mean gap",
        "gap_median": "median gap",
        "success": "success",
        "gradient_calls": "gradients",
        "milliseconds": "ms",
    }
    gap = {"relative": "(f - f*) / f*", "absolute": "f - f*"}[results["gap"]]
    title = f"{results['family']}, gaps are {gap}"
    table = rich.table.Table("method", *columns.values(), title=title, box=rich.box.SIMPLE)
    for row in results["rows"]:
        cells = (row[name] for name in columns)
        table.add_row(row["method"], *("-" if cell is None else f"{cell:.3g}" for cell in cells))
    rich.console.Console().print(table)
    for note in _notes(results):
        print(note)


def _notes(results: dict[str, Any]) -> list[str]:
    """What gaps are worth where f* is not certified, or a method lies below the reference."""
    notes, count = [], results["rows"][0]["num_problems"]
    if results["certified"] < count and results["gap"] == "relative":
        notes.append(
            f"not certified: f* of {count - results['certified']} of {count} problems; their gaps "
            "count from the dual value, and are upper bounds."
        )
    elif results["certified"] < count:
        notes.append(
            f"not certified: f* of {count - results['certified']} of {count} problems; their gaps "
            "count from the best value of the label solver, and can be below 0."
        )
    below = [row["method"] for row in results["rows"] if row["below_reference"] > 0]
    if below:
        notes.append(f"below the label solver's value on some problems: {', '.join(below)}.")
    return notes


def print_standings(learned: dict[str, Any], adam: dict[str, Any]) -> None:
    """The table of `standings`."""
    rich.console.Console().print(standings(learned, adam))


def standings(learned: dict[str, Any], adam: dict[str, Any]) -> rich.table.Table:
    """Scores of the learned optimizer, each beside that of Adam at the best of its learning rates."""
    title = "the learned optimizer / Adam at the best of five learning rates"
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD)
    table.add_column("family", no_wrap=True)
    for score in ("mean loss", "final loss", "query loss", "accuracy"):
        table.add_column(score, justify="right", no_wrap=True)
    for family, reached in learned.items():
        pairs = [
            f"{reached[name]:{digits}} / {adam[family][name]:{digits}}"
            for name, digits in (
                *(("mean_loss", ".2g"), ("final_loss", ".2g"), ("query_loss", ".2g")),
                ("accuracy", ".3f"),
            )
        ]
        table.add_row(family, *pairs)
    return table


@contextlib.contextmanager
def progress(
    description: str, total: int | None, text: str, completed: int = 0
) -> Iterator[Callable[..., None]]:
    """A line on standard error: what is done, the rate, the time left, and a text that changes."""
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=None, table_column=rich.table.Column(ratio=1)),
        rich.progress.MofNCompleteColumn(),
        _Rate(),
        rich.progress.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        rich.progress.TextColumn("{task.fields[text]}", markup=False),
    )
    with _Progress(*columns, console=errors, expand=True) as shown:
        task = shown.add_task(description, total=total, text=text, completed=completed)
        yield functools.partial(shown.update, task)


class _Progress(rich.progress.Progress):
    """Progress with what the field `below` of a task holds shown below."""

    def get_renderables(self) -> Iterator[rich.console.RenderableType]:
        """The lines of the tasks, then what is below."""
        yield from super().get_renderables()
        yield from (task.fields["below"] for task in self.tasks if "below" in task.fields)


class _Rate(rich.progress.ProgressColumn):
    """Units per second."""

    def render(self, task: rich.progress.Task) -> str:
        """The rate, or nothing before the first is known."""
        speed = task.finished_speed or task.speed
        return f"{speed:.1f}/s" if speed else ""
