"""A run's results as one HTML page, which needs no other file and no network.

Numbers come from the files of the run directory and nowhere else: what a file lacks, the page says
it lacks. Pictures are SVG inside the page, drawn without pyplot and its global state.
"""

import base64
import html
import io
import json
import math
import os
import pathlib
import string
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

SCHEMA = 1
"""Version of `results.json` and `figures.json`; the only one that is read."""

_TEACHER_COLOR = "#333333"
_COLORS = {  # Okabe and Ito's palette, which colour-blind readers can tell apart
    "lohp": "#0072b2",
    "lohp_consolidated": "#56b4e9",
    "hypernetwork": "#e69f00",
    "cloning": "#009e73",
    "paper_literal": "#d55e00",
    "lo_di": "#cc79a7",
    "lo_op": "#8b6914",
}
_TASK_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8b6914")
_TEACHER_PATH = {"linewidth": 1.0, "alpha": 0.55}
_GENERATED_PATH = {"linewidth": 1.8, "marker": "o", "markersize": 3}
_LOGIT_TICKS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
_LOGIT_RANGE = (0.001, 0.999)  # the scale has no place for 0 and 1
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "lohp",  # the same numbers give the same bytes
    "text.parse_math": False,  # a "$" in a method's name is a dollar
}


class _Score(NamedTuple):
    """One method on one split, over its seeds; NaN stands for what the rows do not tell.

    `spread` is the standard deviation of `accuracy` over seeds, or the standard error over tasks
    where there is one seed; `spread_of` says which.
    """

    method: str
    split: str
    accuracy: float
    spread: float
    spread_of: str
    worst: float
    num_tasks: float
    gradients: float
    latency: float
    latency_batch: float


class _Check(NamedTuple):
    """One line of the honesty report.

    `keys` maps a key of `results.json` to the words after its number; `passed` takes the numbers in
    this order and is None where nothing is wanted.
    """

    title: str
    meaning: str
    wanted: str
    keys: dict[str, str]
    passed: Callable[..., bool] | None = None


class _Plot(NamedTuple):
    """A picture and its words; `figure` is None if the run directory does not hold its numbers."""

    title: str
    figure: Any
    alt: str
    caption: str


def write_report(directory: str | os.PathLike) -> pathlib.Path:
    """Writes `report.html` from the other files of a run directory; the same files, the same bytes.

    Reads `results.json`; where they exist also `config.json` (else the config in the results),
    `metrics.jsonl` and `figures.json`, without which the page has fewer plots and says so. An old
    report is replaced in a single step, or stays as it is.

    Args:
      directory: what `lohp evaluate` filled.

    Returns: the path of the page.

    Raises:
      FileNotFoundError, if there is no `results.json`.
      ValueError, if a file is of another schema, is not JSON (the line is named) or lacks a key or
        has a value of the wrong kind there (the key is named). NaN and null count as unknown.
      OSError, if the page cannot be written.
    """
    directory = pathlib.Path(directory)
    results = _read_results(directory)
    where = str(directory / "results.json")
    family = str(_field(results, "family", where))
    scores = _scores(_field(results, "rows", where, list), where)
    config_file = directory / "config.json"
    config = _read_object(config_file) if config_file.exists() else results.get("config", {})
    page = _PAGE.substitute(
        family=html.escape(family),
        statement=html.escape(_statement(family, scores)),
        methods=_methods_table(scores),
        honesty=_honesty_table(_section(results, "honesty", where), where),
        plots=_plots(directory, scores),
        config=_pretty(config),
        environment=_pretty(results.get("environment", {})),
    )
    return _write(directory / "report.html", page)


# ---- reading


def _read_results(directory: pathlib.Path) -> dict[str, Any]:
    file = directory / "results.json"
    if not file.exists():
        raise FileNotFoundError(
            f"write_report: no results in {directory}: there is no {file}. Make them with "
            f"`lohp evaluate --out {directory}`."
        )
    return _read_versioned(file)


def _read_versioned(file: pathlib.Path) -> dict[str, Any]:
    content = _read_object(file)
    if content.get("schema") != SCHEMA:
        raise ValueError(
            f"write_report: {file} has schema {content.get('schema')!r}, this version of lohp_jax "
            f"reads schema {SCHEMA} only; use the version that wrote it, or run "
            f"`lohp evaluate --out {file.parent}` again."
        )
    return content


def _read_object(file: pathlib.Path) -> dict[str, Any]:
    return _parse(_read_text(file), file)


def _read_lines(file: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a file of JSON lines, each with "FILE, line N"; none if there is no file."""
    lines = _read_text(file).split("\n") if file.exists() else []
    return [
        (f"{file}, line {number}", _parse(line, file, number))
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _read_text(file: pathlib.Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"write_report: {file} is damaged: byte {error.start} is not UTF-8."
        ) from error


def _parse(text: str, file: pathlib.Path, first_line: int = 1) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(
            f"write_report: {file}, line {line}, column {error.colno} is not JSON: {error.msg}."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"write_report: expected an object in {file}, line {first_line}, "
            f"got {type(content).__name__}."
        )
    return content


def _field(mapping: Any, key: str, where: str, kind: type = object) -> Any:
    if not isinstance(mapping, dict) or key not in mapping:
        raise ValueError(f"write_report: {where} lacks the key {key!r}.")
    if not isinstance(mapping[key], kind):
        raise ValueError(
            f"write_report: expected a {kind.__name__} at {key!r} of {where}, got {mapping[key]!r}."
        )
    return mapping[key]


def _section(mapping: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """The object at `key`; empty if it is absent or null."""
    return {} if mapping.get(key) is None else _field(mapping, key, where, dict)


def _number(mapping: dict[str, Any], key: str, where: str) -> float:
    """The number at `key`; NaN if it is absent, null or not finite."""
    value = mapping.get(key)
    if value is None:
        return math.nan
    if not isinstance(value, int | float):
        raise ValueError(f"write_report: expected a number at {key!r} of {where}, got {value!r}.")
    return float(value) if math.isfinite(value) else math.nan


def _array(mapping: Any, key: str, where: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """The numbers at `key` as float64, null as NaN; None in `shape` stands for any length."""
    value = _field(mapping, key, where)
    try:
        array = np.asarray(value, np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"write_report: {key!r} of {where} is no array: {error}.") from error
    if array.size == 0 and None in shape:
        return np.zeros([length or 0 for length in shape])
    if array.ndim != len(shape) or any(
        wanted not in (None, got) for wanted, got in zip(shape, array.shape, strict=True)
    ):
        raise ValueError(
            f"write_report: expected {key!r} of {where} to have shape {shape}, got {array.shape}."
        )
    return array


# ---- scores and the sentence


def _scores(rows: list[Any], where: str) -> list[_Score]:
    """Rows grouped over seeds, the most accurate first, unknown accuracies last."""
    groups: dict[tuple[str, str], dict[str, tuple[str, dict]]] = {}
    for i, row in enumerate(rows):
        at = f"{where}, rows[{i}]"
        _field(row, "accuracy", at)
        method, split, seed = (str(_field(row, name, at)) for name in ("method", "split", "seed"))
        seeds = groups.setdefault((method, split), {})
        if seed in seeds:
            raise ValueError(
                f"write_report: {at} is a second row of {method}, split {split}, seed {seed}; "
                "expected one."
            )
        seeds[seed] = at, row
    scores = [_score(*group, list(seeds.values())) for group, seeds in groups.items()]
    return sorted(scores, key=lambda score: (math.isnan(score.accuracy), -score.accuracy))


def _score(method: str, split: str, rows: list[tuple[str, dict]]) -> _Score:
    def column(name):
        return np.array([_number(row, name, at) for at, row in rows])

    accuracy, num_tasks = column("accuracy"), column("num_tasks")
    if len(rows) > 1:
        spread, spread_of = accuracy.std(ddof=1), f"std over {len(rows)} seeds"
    else:
        spread = column("accuracy_std")[0] / math.sqrt(num_tasks[0] or math.nan)
        spread_of = f"s.e. over {_integer(num_tasks[0])} tasks"
    return _Score(
        method=method,
        split=split,
        accuracy=float(accuracy.mean()),
        spread=float(spread),
        spread_of=spread_of,
        worst=float(column("accuracy_min").min()),
        num_tasks=float(num_tasks.min()),
        gradients=float(column("gradients").mean()),
        latency=float(column("latency_ms_p50").mean()),
        latency_batch=float(column("latency_ms_p50_batch").mean()),
    )


def _statement(family: str, scores: list[_Score]) -> str:
    """The result in one sentence: `lohp` against the best baseline, with the teacher beside it."""
    known = _held_out(scores)
    ours = next((score for score in known if score.method == "lohp"), None)
    rival = next((score for score in known if _is_baseline(score)), None)
    teacher = next((score for score in known if _is_teacher(score)), None)
    if ours is None:
        sentence = f"There is no accuracy of lohp on {family}"
        if rival is not None:
            sentence += f"; the best baseline, {rival.method}, reaches {_accuracy(rival)}"
    else:
        sentence = (
            f"lohp reaches {_accuracy(ours)} on {_integer(ours.num_tasks)} unseen tasks of "
            f"{family}, {_compare(ours, rival)}"
        )
    if teacher is not None:
        sentence += f"; the best teacher, {teacher.method}, reaches {_accuracy(teacher)}"
    named = [score for score in (ours, rival, teacher) if score is not None]
    return f"{sentence} (±: {_kinds(named)})." if named else f"{sentence}."


def _compare(ours: _Score, rival: _Score | None) -> str:
    """How far `ours` is above or below `rival`; a lead inside the spread is called one."""
    if rival is None:
        return "with no baseline to compare it with"
    difference = ours.accuracy - rival.accuracy
    name = f"the best baseline, {rival.method} at {_accuracy(rival)}"
    if difference == 0:
        return f"level with {name}"
    amount = "less than 0.001" if abs(difference) < 0.0005 else f"{abs(difference):.3f}"
    side = "above" if difference > 0 else "below"
    spread = math.hypot(ours.spread, rival.spread)
    if math.isnan(spread):
        return f"{amount} {side} {name} (spread unknown)"
    reach = "beyond" if abs(difference) > spread else "within"
    return f"{amount} {side} {name}, {reach} the spread of the difference (± {spread:.3f})"


def _kinds(scores: list[_Score]) -> str:
    """What the spreads of `scores` are, in words."""
    return "; ".join(sorted({score.spread_of for score in scores}))


def _held_out(scores: list[_Score]) -> list[_Score]:
    """Those on unseen tasks whose accuracy is known, in the same order."""
    return [s for s in scores if s.split == "held_out" and not math.isnan(s.accuracy)]


def _is_teacher(score: _Score) -> bool:
    return score.method.startswith("teacher_")


def _is_baseline(score: _Score) -> bool:
    return not score.method.startswith(("teacher_", "lohp"))


def _decimal(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.3f}"


def _integer(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:,.0f}"


def _significant(value: float) -> str:
    if math.isnan(value):
        return "n/a"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def _accuracy(score: _Score) -> str:
    if math.isnan(score.accuracy):
        return "n/a"
    return f"{score.accuracy:.3f} ± {_decimal(score.spread)}"


# ---- tables


def _methods_table(scores: list[_Score]) -> str:
    head = (
        "Method",
        "Accuracy",
        "± is",
        "Worst task",
        "Gradients<br>per task",
        "Latency (ms),<br>batch 1",
        "Latency (ms),<br>batched, per network",
    )
    return _table(head, map(_method_cells, scores), css="methods")


def _method_cells(score: _Score) -> list[str]:
    name = html.escape(score.method)
    if score.split != "held_out":
        name += f" <small>(split {html.escape(score.split)})</small>"
    if score.method.startswith("lohp"):
        name = f"<strong>{name}</strong>"
    return [
        name,
        _accuracy(score),
        score.spread_of,
        _decimal(score.worst),
        _integer(score.gradients),
        _significant(score.latency),
        _significant(score.latency_batch),
    ]


_CHECKS = (
    _Check(
        "Shuffled condition",
        "Accuracy when each task gets the weights made from another task's examples. It has to "
        "fall to what always answering with the commonest class gives (the majority): if it stays "
        "higher, the weights do not come from the examples.",
        "at most 0.05 above the majority",
        {"shuffled_accuracy": "", "majority": "majority"},
        lambda shuffled, majority: shuffled <= majority + 0.05,
    ),
    _Check(
        "RMS ratio",
        "How far generated weights lie from the common start, over how far the teacher's lie (root "
        "mean square). Well below 1, the generator shrinks towards an average; above, it "
        "overshoots.",
        "0.8 to 1.2",
        {"rms_ratio": ""},
        lambda ratio: 0.8 <= ratio <= 1.2,
    ),
    _Check(
        "Distance to the nearest training weights",
        "Near 0, the generator copies weights that it was trained on. How far the teacher's own "
        "weights for the same unseen tasks lie from training weights is the size to expect.",
        "no limit",
        {"nearest_training_distance": "generated", "teacher_nearest_training_distance": "teacher"},
    ),
    _Check(
        "Distance to the teacher's weights",
        "Between generated weights and those that the teacher reached on the same unseen task. "
        "Other weights may be as accurate.",
        "no limit",
        {"teacher_distance": ""},
    ),
)


def _honesty_table(honesty: dict[str, Any], where: str) -> str:
    """The checks down, the methods across; further numbers follow without a mark."""
    if not honesty:
        return "<p>Left out: results.json has no honesty report.</p>"
    measured = [_measures(honesty, method, f"{where}, honesty") for method in honesty]
    checked = {key for check in _CHECKS for key in check.keys}
    others = sorted({key for measures in measured for key in measures} - checked)
    checks = (*_CHECKS, *(_Check(_words(key), "", "no limit", {key: ""}) for key in others))
    rows = [_check_cells(check, measured) for check in checks]
    return _table(("Check", *map(html.escape, honesty), "Wanted"), rows, css="honesty")


def _measures(honesty: dict[str, Any], method: str, where: str) -> dict[str, float]:
    """The numbers of one method; what is text or a list is left to results.json."""
    measures = _field(honesty, method, where, dict)
    checked = {key for check in _CHECKS for key in check.keys}
    return {
        key: _number(measures, key, f"{where}[{method!r}]")
        for key, value in measures.items()
        if key in checked or isinstance(value, int | float)
    }


def _check_cells(check: _Check, measured: list[dict[str, float]]) -> list[str]:
    title = f"{check.title}<small>{check.meaning}</small>"
    return [title, *(_verdict(check, measures) for measures in measured), check.wanted]


def _verdict(check: _Check, measures: dict[str, float]) -> str:
    """The numbers and, where something is wanted, a mark."""
    numbers = [measures.get(key, math.nan) for key in check.keys]
    shown = "".join(
        f"<div>{_significant(number)} {words}</div>"
        for number, words in zip(numbers, check.keys.values(), strict=True)
    )
    if check.passed is None:
        return shown
    if any(map(math.isnan, numbers)):
        return f'{shown}<span class="unknown">not measured</span>'
    if check.passed(*numbers):
        return f'{shown}<span class="pass">✓ pass</span>'
    return f'{shown}<span class="fail">✗ fail</span>'


def _words(key: str) -> str:
    return html.escape(key.replace("_", " ").capitalize())


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], *, css: str) -> str:
    """A table from escaped cells; wide ones scroll in a box of their own."""
    header = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "\n".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="{css}">\n'
        f"<thead><tr>{header}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _pretty(value: Any) -> str:
    return html.escape(json.dumps(value, indent=2, ensure_ascii=False))


# ---- plots


def _plots(directory: pathlib.Path, scores: list[_Score]) -> str:
    """All plots as HTML, in matplotlib's default style whatever the user's own is."""
    import matplotlib.style  # here, for a light `import lohp_jax`

    file = directory / "figures.json"
    figures = _read_versioned(file) if file.exists() else {}
    projection, cosine, by_step = (
        _section(figures, key, str(file)) for key in ("projection", "cosine", "accuracy_by_step")
    )
    lines = _read_lines(directory / "metrics.jsonl")
    with matplotlib.style.context(["default", _STYLE]):
        plots = [
            _plot_accuracy(_held_out(scores)),
            _plot_trajectories(projection, f"{file}, projection"),
            _plot_cosine(cosine, f"{file}, cosine"),
            _plot_accuracy_by_step(by_step, f"{file}, accuracy_by_step"),
            _plot_curves(lines, "loss"),
            _plot_curves(lines, "progress"),
        ]
        return "\n".join(map(_plot_html, plots))


def _plot_html(plot: _Plot) -> str:
    title = f"<figure><h3>{html.escape(plot.title)}</h3>"
    if plot.figure is None:
        return f'{title}<p class="absent">Left out: {html.escape(plot.caption)}</p></figure>'
    buffer = io.BytesIO()
    plot.figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return (
        f'{title}<img src="data:image/svg+xml;base64,{data}" alt="{html.escape(plot.alt)}">'
        f"<figcaption>{html.escape(plot.caption)}</figcaption></figure>"
    )


def _axes(height: float = 3.6) -> tuple[Any, Any]:
    """A figure of one plot, `height` in inches; its text stays readable on a phone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, height), layout="constrained")
    return figure, figure.add_subplot()


def _legend(figure: Any) -> None:
    """Above the axes, where it hides nothing."""
    figure.legend(loc="outside upper left", ncols=3, columnspacing=1.2)


def _plot_accuracy(scores: list[_Score]) -> _Plot:
    title = "Accuracy of all methods"
    if not scores:
        return _Plot(title, None, "", "results.json has no accuracy on unseen tasks.")
    figure, axes = _axes(height=1.1 + 0.3 * len(scores))
    for i, score in enumerate(scores):
        axes.errorbar(
            np.clip(score.accuracy, *_LOGIT_RANGE),
            i,
            xerr=np.nan_to_num(score.spread),
            fmt="o",
            markersize=4,
            capsize=4,
            color=_color(score.method),
        )
    axes.set_yticks(range(len(scores)), [s.method for s in scores])
    for label, score in zip(axes.get_yticklabels(), scores, strict=True):
        label.set_fontweight("bold" if score.method.startswith("lohp") else "normal")
    axes.set_ylim(len(scores) - 0.5, -0.5)
    values = axes.secondary_yaxis("right")
    values.set_yticks(range(len(scores)), [f"{s.accuracy:.3f}" for s in scores])
    values.tick_params(length=0)
    values.spines["right"].set_visible(False)
    teacher = next(filter(_is_teacher, scores), None)
    if teacher is not None:
        axes.axvline(teacher.accuracy, color=_TEACHER_COLOR, linestyle="--", linewidth=1)
    _set_logit_scale(axes, scores)
    axes.set_xlabel("accuracy on unseen tasks (logit scale)")
    line = "" if teacher is None else f" The dashed line is the best teacher, {teacher.method}."
    return _Plot(
        title,
        figure,
        "Accuracy, best first: " + "; ".join(f"{s.method} {_accuracy(s)}" for s in scores) + ".",
        f"Mean over unseen tasks. Error bars: {_kinds(scores)}.{line}",
    )


def _set_logit_scale(axes: Any, scores: list[_Score]) -> None:
    """Stretches the axis towards 1, where good methods lie close together."""
    from matplotlib.ticker import MaxNLocator
    from scipy.special import expit, logit

    ends = [s.accuracy + side * np.nan_to_num(s.spread) for s in scores for side in (-1, 1)]
    low, high = logit(np.clip([min(ends), max(ends)], *_LOGIT_RANGE))
    margin = 0.05 * (high - low) + 0.05
    left, right = expit([low - margin, high + margin])
    ticks = _LOGIT_TICKS if high - low > 2 else MaxNLocator(5).tick_values(left, right)
    ticks = [tick for tick in ticks if left < tick < right]
    axes.set_xscale("logit", nonpositive="clip")
    axes.set_xlim(left, right)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)


def _plot_trajectories(projection: dict[str, Any], where: str) -> _Plot:
    title = "Trajectories in two principal components"
    if not projection:
        return _Plot(title, None, "", _absent("projections of trajectories"))
    explained = _array(projection, "explained", where, (2,))
    paths = list(_paths(_field(projection, "paths", where, list), where))
    tasks = sorted({task for _, task, _ in paths})
    figure, axes = _axes(height=4.4)
    for generated in (False, True):  # generated paths lie over the others
        style = _GENERATED_PATH if generated else _TEACHER_PATH
        for method, task, points in paths:
            if method.startswith("lohp") == generated:
                color = _TASK_COLORS[tasks.index(task) % len(_TASK_COLORS)]
                axes.plot(*points.T, color=color, **style)
                axes.plot(*points[-1:].T, color=color, marker="o" if generated else "x", zorder=4)
        names = sorted({m for m, _, _ in paths if m.startswith("lohp") == generated})
        if names:
            axes.plot([], [], color=_TEACHER_COLOR, label=", ".join(names), **style)
    axes.set_xlabel(f"component 1 ({explained[0]:.0%} of the variance)")
    axes.set_ylabel(f"component 2 ({explained[1]:.0%})")
    axes.set_aspect("equal", adjustable="datalim")
    _legend(figure)
    return _Plot(
        title,
        figure,
        f"Paths of weights of {len(tasks)} unseen tasks in the plane of two principal components, "
        f"which hold {explained.sum():.0%} of the variance.",
        "One colour per unseen task. Thin with a cross: the optimizer's path and its end; thick "
        "with a dot: the generated path and its end.",
    )


def _paths(paths: Any, where: str) -> Iterator[tuple[str, str, np.ndarray]]:
    """Method, task and points `[N, 2]` of each path that has any."""
    for i, path in enumerate(paths):
        at = f"{where}, paths[{i}]"
        points = _array(path, "points", at, (None, 2))
        if len(points):
            yield str(_field(path, "method", at)), str(_field(path, "task", at)), points


def _plot_cosine(cosine: dict[str, Any], where: str) -> _Plot:
    title = "Cosine of generated to offline steps"
    values = {m: _array(cosine, m, where, (None,)) for m in cosine}
    values = {m: v[np.isfinite(v)] for m, v in values.items() if np.isfinite(v).any()}
    if not values:
        return _Plot(title, None, "", _absent("cosines"))
    figure, axes = _axes()
    for method, value in values.items():
        axes.hist(
            np.clip(value, -1, 1),  # float32 rounds above 1
            bins=np.linspace(-1, 1, 41),
            weights=np.full(len(value), 1 / len(value)),
            color=_color(method),
            alpha=0.6,
            label=f"{method}, mean {value.mean():.2f}",
        )
    axes.set_xlabel("cosine")
    axes.set_ylabel("share of steps")
    _legend(figure)
    means = "; ".join(f"{m} has a mean of {v.mean():.2f}" for m, v in values.items())
    return _Plot(
        title,
        figure,
        f"Histogram of cosines from -1 to 1: {means}.",
        "1: the generated step points where the optimizer went; 0: the two are unrelated.",
    )


def _plot_accuracy_by_step(curves: dict[str, Any], where: str) -> _Plot:
    title = "Accuracy by step"
    if not curves:
        return _Plot(title, None, "", _absent("accuracies by step"))
    figure, axes = _axes()
    ends = []
    for method, curve in curves.items():
        at = f"{where}[{method!r}]"
        step = _array(curve, "step", at, (None,))
        mean, std = (_array(curve, name, at, step.shape) for name in ("mean", "std"))
        marker = "o" if method.startswith("lohp") else None
        axes.plot(step, mean, color=_color(method), marker=marker, markersize=4, label=method)
        axes.fill_between(step, mean - std, mean + std, color=_color(method), alpha=0.15, lw=0)
        ends += [f"{method} ends at {_decimal(mean[-1])}"] if len(mean) else []
    axes.set_xlabel("optimizer steps, or what generated steps stand for")
    axes.set_ylabel("accuracy on unseen tasks")
    _legend(figure)
    return _Plot(
        title,
        figure,
        f"Accuracy against optimizer steps: {'; '.join(ends)}.",
        "Mean over unseen tasks; the band is one standard deviation. A generated step counts as "
        "the optimizer steps that it stands for.",
    )


_CURVE_CAPTIONS = {
    "loss": "Methods minimise different losses: compare shapes, not heights.",
    "progress": "Distance gone by generated weights over that of the optimizer; 1 is wanted, and "
    "near 0 the generator stands still.",
}


def _plot_curves(lines: list[tuple[str, dict[str, Any]]], name: str) -> _Plot:
    title = f"Training: {name}"
    curves = _curves(lines, name)
    if not curves:
        return _Plot(title, None, "", f"metrics.jsonl has no {name}.")
    figure, axes = _axes()
    for method, (step, value) in curves.items():
        axes.plot(step, value, color=_color(method), label=method)
    if name == "progress":
        axes.axhline(1, color=_TEACHER_COLOR, linestyle="--", linewidth=1)
        axes.set_ylim(bottom=0)
    values = np.concatenate([value for _, value in curves.values()])
    if name == "loss" and values.min() > 0 and values.max() > 10 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("updates")
    axes.set_ylabel(name)
    _legend(figure)
    ends = "; ".join(f"{m} ends at {_significant(value[-1])}" for m, (_, value) in curves.items())
    return _Plot(title, figure, f"{name.capitalize()} by update: {ends}.", _CURVE_CAPTIONS[name])


def _curves(lines: list[tuple[str, dict[str, Any]]], name: str) -> dict[str, np.ndarray]:
    """Steps and values, `[2, N]`, of each method that has any finite value, by step."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for where, line in lines:
        method, value = str(_field(line, "method", where)), _number(line, name, where)
        _field(line, "step", where)
        if math.isfinite(value):
            curves.setdefault(method, []).append((_number(line, "step", where), value))
    return {method: np.array(sorted(points)).T for method, points in curves.items()}


def _absent(what: str) -> str:
    return f"figures.json is not there or has no {what}."


def _color(method: str) -> str:
    return _COLORS.get(method, _TEACHER_COLOR if method.startswith("teacher_") else "#7a7a7a")


# ---- the page


def _write(file: pathlib.Path, page: str) -> pathlib.Path:
    """Puts a new page in the place of the old one in a single step."""
    with tempfile.TemporaryDirectory(prefix=".lohp-tmp-", dir=file.parent) as temporary:
        partial = pathlib.Path(temporary) / file.name
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(page)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    return file


_PAGE = string.Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>lohp_jax on $family</title>
<style>
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: #fff; color: #1a1a1a;
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0 0 .3rem; }
.statement { border-left: 4px solid #0072b2; background: #f2f7fb; padding: .7rem 1rem;
  font-size: 1.1rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0;
  font-size: 14px; line-height: 22px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 11px; text-align: left; vertical-align: top;
  border-bottom: 1px solid #ddd; }
thead th { border-bottom: 2px solid #888; vertical-align: bottom; }
tbody th { font-weight: normal; }
.methods td:nth-child(n + 4), .methods th:nth-child(n + 4) { text-align: right; }
.methods td, .methods th, .honesty td div { white-space: nowrap; }
.methods th:first-child { position: sticky; left: 0; background: #fff; }
.honesty tbody th { font-weight: 600; min-width: 11rem; }
.honesty small { display: block; font-weight: normal; line-height: 18px;
  max-width: 38rem; color: #444; }
.pass { color: #0b6b3a; font-weight: 600; }
.fail { color: #a31515; font-weight: 600; }
.unknown, .absent, figcaption { color: #555; font-size: .9rem; }
.plots { display: grid; gap: 1.5rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }
figure { margin: 0; min-width: 0; }
img { display: block; width: 100%; height: auto; }
summary { cursor: pointer; font-weight: 600; margin-top: 2rem; }
pre { overflow-x: auto; background: #f6f6f6; padding: .8rem; font-size: .85rem; }
</style>
</head>
<body>
<h1>Generated weights on $family</h1>
<p class="statement">$statement</p>
<h2>Methods</h2>
$methods
<h2>Honesty</h2>
$honesty
<h2>Plots</h2>
<div class="plots">
$plots
</div>
<details>
<summary>Config and environment</summary>
<h3>Config</h3>
<pre>$config</pre>
<h3>Environment</h3>
<pre>$environment</pre>
</details>
</body>
</html>
""")
