"""The plots of a report: matplotlib figures drawn from the numbers in a run directory.

Drawn without pyplot and its global state; matplotlib is imported when the first plot is made.
"""

import collections
import io
import itertools
import math
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from lohp_jax.evaluation.records import array, field, number, section
from lohp_jax.evaluation.standings import (
    ACCURACY,
    Score,
    Standings,
    held_out,
    integer,
    score_text,
    significant,
    spreads,
    teachers,
    value_text,
)
from lohp_jax.files import read_json, read_json_lines

# Okabe and Ito's palette, which colour-blind readers can tell apart
_MAIN_COLOR = "#0072b2"
_GENERATOR_COLORS = ("#56b4e9", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#8b6914")
_TEACHER_COLOR = "#333333"
_OTHER_COLOR = "#7a7a7a"
_TASK_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8b6914")
_TEACHER_PATH = {"linewidth": 1.0, "alpha": 0.55}
_GENERATED_PATH = {"linewidth": 1.8, "marker": "o", "markersize": 3}
_LOGIT_TICKS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
_LOGIT_RANGE = (0.001, 0.999)  # the scale has no place for 0 and 1
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "lohp_jax",  # the same numbers give the same bytes
    "text.parse_math": False,  # a "$" in a method's name is a dollar
}


class Plot(NamedTuple):
    """A picture and its words; `figure` is None if the run directory does not hold its numbers."""

    title: str
    figure: Any
    alt: str
    caption: str


def draw_plots(directory: pathlib.Path, standings: Standings) -> list[tuple[Plot, bytes]]:
    """Every plot with its SVG, in matplotlib's default style whatever the user's own is.

    The SVG is empty where the run directory does not hold the numbers.
    """
    import matplotlib.style  # here, for a light `import lohp_jax`

    file = directory / "figures.json"
    figures = read_json(file) if file.exists() else {}
    projection, cosine, by_step, familiar = (
        section(figures, key, str(file))
        for key in ("projection", "cosine", "score_by_step", "familiarity")
    )
    lines = read_json_lines(directory / "metrics.jsonl")
    lines = [(at, line) for at, line in lines if "stage" not in line]  # what stages took
    colors = colors_of(standings, [str(field(line, "method", where)) for where, line in lines])
    with matplotlib.style.context(["default", STYLE]):
        plots = [
            _plot_scores(standings, colors),
            _plot_trajectories(projection, f"{file}, projection", teachers(standings)),
            _plot_cosine(cosine, f"{file}, cosine", colors),
            _plot_score_by_step(by_step, f"{file}, score_by_step", standings, colors),
            plot_gradients(by_step, f"{file}, score_by_step", standings, colors),
            *plot_trust(familiar, f"{file}, familiarity"),
            _plot_curves(lines, "loss", colors),
            _plot_curves(lines, "progress", colors),
        ]
        return [(plot, to_svg(plot.figure)) for plot in plots]


def to_svg(figure: Any) -> bytes:
    """The picture; nothing for None."""
    if figure is None:
        return b""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def make_axes(height: float = 3.6) -> tuple[Any, Any]:
    """A figure of one plot, `height` in inches; its text stays readable on a phone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, height), layout="constrained")
    return figure, figure.add_subplot()


def _legend(figure: Any) -> None:
    """Above the axes, where it hides nothing."""
    figure.legend(loc="outside upper left", ncols=3, columnspacing=1.2)


def colors_of(standings: Standings, trained: list[str]) -> dict[str, str]:
    """A colour for every method: its own for those that are trained, a grey for the others."""
    known = {score.method: score.kind for score in standings.scores}
    generators = [method for method, kind in known.items() if kind == "generator"]
    generators += [method for method in trained if method not in known]
    own = sorted({*generators} - {standings.main})
    colors = dict(zip(own, itertools.cycle(_GENERATOR_COLORS), strict=False))
    colors |= dict.fromkeys(teachers(standings), _TEACHER_COLOR) | {standings.main: _MAIN_COLOR}
    return collections.defaultdict(lambda: _OTHER_COLOR, colors)


def _plot_scores(standings: Standings, colors: dict[str, str]) -> Plot:
    measure, scores = standings.measure, held_out(standings)
    title = f"{measure.name.capitalize()} of all methods"
    if not scores:
        return Plot(title, None, "", f"results.json has no {measure.name} on unseen tasks.")
    figure, axes = make_axes(height=1.1 + 0.3 * len(scores))
    bounds = _LOGIT_RANGE if measure is ACCURACY else (-np.inf, np.inf)
    for i, score in enumerate(scores):
        axes.errorbar(
            np.clip(score.value, *bounds),
            i,
            xerr=np.nan_to_num(score.spread),
            fmt="o",
            markersize=4,
            capsize=4,
            color=colors[score.method],
        )
    axes.set_yticks(range(len(scores)), [s.method for s in scores])
    for label, score in zip(axes.get_yticklabels(), scores, strict=True):
        label.set_fontweight("bold" if score.method == standings.main else "normal")
    axes.set_ylim(len(scores) - 0.5, -0.5)
    values = axes.secondary_yaxis("right")
    values.set_yticks(range(len(scores)), [measure.write(s.value, s.spread)[0] for s in scores])
    values.tick_params(length=0)
    values.spines["right"].set_visible(False)
    teacher = next((score for score in scores if score.kind == "teacher"), None)
    if teacher is not None:
        axes.axvline(teacher.value, color=_TEACHER_COLOR, linestyle="--", linewidth=1)
    axes.set_xlabel(f"{measure.name} on unseen tasks ({_set_scale(axes, standings)} scale)")
    line = "" if teacher is None else f" The dashed line is the best teacher, {teacher.method}."
    return Plot(
        title,
        figure,
        f"{measure.name.capitalize()}, best first: "
        + "; ".join(f"{s.method} {score_text(s, measure)}" for s in scores)
        + ".",
        f"Mean over unseen tasks. Error bars: {spreads(scores)}.{line}",
    )


def _set_scale(axes: Any, standings: Standings) -> str:
    """Scales the x axis as the scores need it; returns the name of the scale."""
    scores = held_out(standings)
    if standings.measure is ACCURACY:
        _set_logit_scale(axes, scores)
        return "logit"
    values, spread = (
        np.array([getattr(score, name) for score in scores]) for name in ("value", "spread")
    )
    return _set_log_scale(axes, "x", values, spread)


def _set_logit_scale(axes: Any, scores: list[Score]) -> None:
    """Stretches the x axis towards 1, where good methods lie close together."""
    from matplotlib.ticker import MaxNLocator
    from scipy.special import expit, logit

    ends = [s.value + side * np.nan_to_num(s.spread) for s in scores for side in (-1, 1)]
    low, high = logit(np.clip([min(ends), max(ends)], *_LOGIT_RANGE))
    margin = 0.05 * (high - low) + 0.05
    left, right = expit([low - margin, high + margin])
    ticks = _LOGIT_TICKS if high - low > 2 else MaxNLocator(5).tick_values(left, right)
    ticks = [tick for tick in ticks if left < tick < right]
    axes.set_xscale("logit", nonpositive="clip")
    axes.set_xlim(left, right)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)


def _set_log_scale(axes: Any, name: str, values: np.ndarray, spread: np.ndarray) -> str:
    """Stretches the axis `name` towards 0 if all finite values are positive, else leaves it linear.

    It is as wide as the values with their spread, but no bar that reaches 0 makes it endless.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator

    spread = np.nan_to_num(spread)[np.isfinite(values)]
    values = values[np.isfinite(values)]
    if not len(values) or values.min() <= 0:
        return "linear"
    low, high = np.maximum(values - spread, values / 3).min(), (values + spread).max()
    decades = np.log10(high / low)
    margin = 10 ** (0.05 * decades + 0.02)
    left, right = low / margin, high * margin
    subs = (1.0, 2.0, 5.0) if decades < 2 else (1.0,)
    locator = MaxNLocator(5) if decades < 0.7 else LogLocator(subs=subs, numticks=6)
    ticks = [tick for tick in locator.tick_values(left, right) if left < tick < right]
    axes.set(**{f"{name}scale": "log", f"{name}lim": (left, right)})
    axis = getattr(axes, f"{name}axis")
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)
    return "log"


def _plot_trajectories(projection: dict[str, Any], where: str, taught: set[str]) -> Plot:
    title = "Trajectories in two principal components"
    if not projection:
        return Plot(title, None, "", _absent("projections of trajectories"))
    explained = array(projection, "explained", where, (2,))
    paths = list(_paths(field(projection, "paths", where, list), where))
    tasks = sorted({task for _, task, _ in paths})
    figure, axes = make_axes(height=4.4)
    for generated in (False, True):  # generated paths lie over the others
        style = _GENERATED_PATH if generated else _TEACHER_PATH
        for method, task, points in paths:
            if (method not in taught) == generated:
                color = _TASK_COLORS[tasks.index(task) % len(_TASK_COLORS)]
                axes.plot(*points.T, color=color, **style)
                axes.plot(*points[-1:].T, color=color, marker="o" if generated else "x", zorder=4)
        names = sorted({m for m, _, _ in paths if (m not in taught) == generated})
        if names:
            axes.plot([], [], color=_TEACHER_COLOR, label=", ".join(names), **style)
    axes.set_xlabel(f"component 1 ({explained[0]:.0%} of the variance)")
    axes.set_ylabel(f"component 2 ({explained[1]:.0%})")
    axes.set_aspect("equal", adjustable="datalim")
    _legend(figure)
    return Plot(
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
        points = array(path, "points", at, (None, 2))
        if len(points):
            yield str(field(path, "method", at)), str(field(path, "task", at)), points


def _plot_cosine(cosine: dict[str, Any], where: str, colors: dict[str, str]) -> Plot:
    title = "Cosine of generated to offline steps"
    values = {m: array(cosine, m, where, (None,)) for m in cosine}
    values = {m: v[np.isfinite(v)] for m, v in values.items() if np.isfinite(v).any()}
    if not values:
        return Plot(title, None, "", _absent("cosines"))
    figure, axes = make_axes()
    for method, value in values.items():
        axes.hist(
            np.clip(value, -1, 1),  # float32 rounds above 1
            bins=np.linspace(-1, 1, 41),
            weights=np.full(len(value), 1 / len(value)),
            color=colors[method],
            alpha=0.6,
            label=f"{method}, mean {value.mean():.2f}",
        )
    axes.set_xlabel("cosine")
    axes.set_ylabel("share of steps")
    _legend(figure)
    means = "; ".join(f"{m} has a mean of {v.mean():.2f}" for m, v in values.items())
    return Plot(
        title,
        figure,
        f"Histogram of cosines from -1 to 1: {means}.",
        "1: the generated step points where the optimizer went; 0: the two are unrelated.",
    )


def _plot_score_by_step(
    curves: dict[str, Any], where: str, standings: Standings, colors: dict[str, str]
) -> Plot:
    measure = standings.measure
    title = f"{measure.name.capitalize()} by step"
    if not curves:
        return Plot(title, None, "", _absent("scores by step"))
    figure, axes = make_axes()
    bounds = (0, 1) if measure is ACCURACY else (-np.inf, np.inf)
    ends, drawn = [], []
    for method, curve in curves.items():
        at = f"{where}[{method!r}]"
        step = array(curve, "step", at, (None,))
        mean, std = (array(curve, name, at, step.shape) for name in ("mean", "std"))
        marker = None if method in teachers(standings) else "o"
        axes.plot(step, mean, color=colors[method], marker=marker, markersize=4, label=method)
        band = np.clip([mean - std, mean + std], *bounds)
        axes.fill_between(step, *band, color=colors[method], alpha=0.15, lw=0)
        ends += [f"{method} ends at {value_text(mean[-1], measure)}"] if len(mean) else []
        drawn.append((mean, std))
    label = f"{measure.name} on unseen tasks"
    if measure is not ACCURACY:
        label += f" ({_set_log_scale(axes, 'y', *np.concatenate(drawn, axis=1))} scale)"
    axes.set_xlabel("optimizer steps, or what generated steps stand for")
    axes.set_ylabel(label)
    _legend(figure)
    return Plot(
        title,
        figure,
        f"{measure.name.capitalize()} against optimizer steps: {'; '.join(ends)}.",
        "Mean over unseen tasks; the band is one standard deviation. A generated step counts as "
        "the optimizer steps that it stands for.",
    )


def plot_gradients(
    curves: dict[str, Any], where: str, standings: Standings, colors: dict[str, str]
) -> Plot:
    """Break-even: what a gradient on a new task buys, for generators and for optimizers."""
    measure = standings.measure
    title = f"{measure.name.capitalize()} by gradients spent"
    scores = [s for s in held_out(standings) if not math.isnan(s.gradients)]
    if not scores:
        return Plot(title, None, "", f"results.json has no {measure.name} with its gradients.")
    figure, axes = make_axes(height=4.2)
    lines = _lines_by_gradients(scores, curves, where)
    for name, points in lines.items():
        dotted = name not in curves
        style = {"linestyle": ":" if dotted else "-", "color": colors[name]}
        axes.plot(*points.T, marker=".", label=name, **style)
    alone = [s for s in scores if not any(s.method == n or _is_among(s, n) for n in lines)]
    for score in alone:
        marker = "x" if score.kind == "teacher" else "o"
        axes.plot(score.gradients, score.value, marker, color=colors[score.method])
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=-0.1)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("gradients spent on a new task")
    label = f"{measure.name} on unseen tasks"
    if measure is not ACCURACY:
        values = np.array([s.value for s in scores])
        label += f" ({_set_log_scale(axes, 'y', values, np.zeros(len(values)))} scale)"
    axes.set_ylabel(label)
    _name_points(axes, alone)
    if lines:
        _legend(figure)
    told = "; ".join(
        f"{s.method} {value_text(s.value, measure)} after {integer(s.gradients)}" for s in scores
    )
    return Plot(
        title,
        figure,
        f"{measure.name.capitalize()} and gradients spent: {told}.",
        "A dot is a method, a cross a teacher, which sees more than the others. A full line follows a "
        "walk that spends a gradient at each of its steps, a dotted one an optimizer on what generators "
        "see, tuned for each number of steps.",
    )


def _name_points(axes: Any, scores: list[Score]) -> None:
    """Methods beside their points, one above the other where points are close."""
    placed, points_per_pixel = [], 72 / axes.figure.dpi
    for score in sorted(scores, key=lambda s: s.value):
        at = score.gradients, score.value
        x, y = points_per_pixel * axes.transData.transform(at)
        above = [4, *(y_placed + 9 - y for x_placed, y_placed in placed if abs(x - x_placed) < 70)]
        placed.append((x, y + max(above)))
        place = {"xytext": (4, max(above)), "textcoords": "offset points", "fontsize": 7}
        axes.annotate(score.method, at, **place)


def _lines_by_gradients(
    scores: list[Score], curves: dict[str, Any], where: str
) -> dict[str, np.ndarray]:
    """`[S, 2]` gradients and score: of walks that spend some, of optimizers at several numbers."""
    lines = {}
    for name, curve in curves.items():
        at = f"{where}[{name!r}]"
        if any(s.method == name and s.gradients > 0 and s.kind != "teacher" for s in scores):
            gradients = array(curve, "gradients", at, (None,))
            lines[name] = np.stack([gradients, array(curve, "mean", at, gradients.shape)], axis=1)
    for score in scores:
        several = [s for s in scores if _is_among(s, score.method)]
        if score.kind == "baseline" and several:
            points = sorted((s.gradients, s.value) for s in (score, *several))
            lines[score.method] = np.array(points)
    return lines


def _is_among(score: Score, name: str) -> bool:
    """Whether a score is of the baseline `name` at another number of steps, as `name_STEPS`."""
    prefix, _, steps = score.method.rpartition("_")
    return score.kind == "baseline" and prefix == name and steps.isdigit()


def plot_trust(familiar: dict[str, Any], where: str) -> list[Plot]:
    """How far generators trust what they learned, by how far a task is from what they learned on."""
    plots = []
    for method, splits in familiar.items():
        figure, axes = make_axes()
        means = []
        for split, words, color in (
            ("train", "tasks of the training split", _GENERATOR_COLORS[0]),
            ("held_out", "unseen tasks", _GENERATOR_COLORS[3]),
        ):
            at = f"{where}[{method!r}][{split!r}]"
            points = field(splits, split, f"{where}[{method!r}]", dict)
            distance = array(points, "distance", at, (None,))
            shown = "trust" if "trust" in points else "familiarity"
            trust = array(points, shown, at, distance.shape)
            axes.plot(distance, trust, "o", markersize=3, alpha=0.5, color=color, label=words)
            means.append(f"{trust.mean():.2f} on {words}")
        axes.set_xlabel("distance to the nearest training task (root mean square)")
        axes.set_ylabel(f"{shown} in the condition" if shown == "trust" else shown)
        axes.set_ylim(-0.05, 1.05)
        _legend(figure)
        plots.append(
            Plot(
                f"Trust of {method} in the condition",
                figure,
                f"Trust against distance, on average {' and '.join(means)}.",
                "1: the walk follows what the condition says beside the rule for every weight; 0: the "
                "rule alone. Tasks are compared by the summaries of their examples.",
            )
        )
    return plots


_CURVE_CAPTIONS = {
    "loss": "Methods minimise different losses: compare shapes, not heights.",
    "progress": "Distance gone by generated weights over that of the optimizer; 1 is wanted, and "
    "near 0 the generator stands still.",
}


def _plot_curves(
    lines: list[tuple[str, dict[str, Any]]], name: str, colors: dict[str, str]
) -> Plot:
    title = f"Training: {name}"
    curves = _curves(lines, name)
    if not curves:
        return Plot(title, None, "", f"metrics.jsonl has no {name}.")
    figure, axes = make_axes()
    for method, (step, value) in curves.items():
        axes.plot(step, value, color=colors[method], label=method)
    if name == "progress":
        axes.axhline(1, color=_TEACHER_COLOR, linestyle="--", linewidth=1)
        axes.set_ylim(bottom=0)
    values = np.concatenate([value for _, value in curves.values()])
    if name == "loss" and values.max() > 10 * np.abs(values).min():
        signed = values.min() <= 0  # as a likelihood may be
        axes.set_yscale("symlog" if signed else "log")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("updates")
    axes.set_ylabel(name)
    _legend(figure)
    ends = "; ".join(f"{m} ends at {significant(value[-1])}" for m, (_, value) in curves.items())
    return Plot(title, figure, f"{name.capitalize()} by update: {ends}.", _CURVE_CAPTIONS[name])


def _curves(lines: list[tuple[str, dict[str, Any]]], name: str) -> dict[str, np.ndarray]:
    """Steps and values, `[2, N]`, of each method that has any finite value, by step."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for where, line in lines:
        method, value = str(field(line, "method", where)), number(line, name, where)
        field(line, "step", where)
        if math.isfinite(value):
            curves.setdefault(method, []).append((number(line, "step", where), value))
    return {method: np.array(sorted(points)).T for method, points in curves.items()}


def _absent(what: str) -> str:
    return f"figures.json is not there or has no {what}."
