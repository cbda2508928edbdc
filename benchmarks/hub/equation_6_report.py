"""The tables and the picture of equation 6, of equation_6.json; `benchmarks.hub.report` calls it."""

from collections.abc import Callable
from typing import Any

import matplotlib.axes
import matplotlib.figure
import numpy as np

from lohp_jax.workloads.oscillating import oscillation

ARMS = {
    "hand": "Adam",
    "alone": "learned alone, which has no rate",
    "lgl2o_race": "LGL2O, a race",
    "lgl2o_candidate": "LGL2O, every step of the two tried",
    "hub_vanilla": "HUB as published, vanilla",
    "hub_invert": "HUB as published, inverted",
    "hub_trust": "HUB, trust region",
}
RULES = {"small": "ships", "celo": "Celo"}
COLORS = ("#333333", "#d55e00", "#009e73", "#8c564b", "#56b4e9", "#cc79a7", "#0072b2")
SHOWN = {"wide": "0.001", "narrow": "1e-05"}
"""Rates of the curves in the picture."""
TENFOLD = 10.0
_BACKGROUND = 400


def by_arm(arms: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows of a table: name of the arm and of the learned optimizer, and what was found by rate."""
    names = {tuple(["", *arm.split("/")][-2:]): found for arm, found in arms.items()}
    return {
        (ARMS[arm], RULES.get(rule, rule)): names[rule, arm]
        for arm in ARMS
        for rule in ("", *RULES)
        if (rule, arm) in names
    }


def median(values: list[float | None]) -> float:
    """Of the seeds; what was not finite is the largest."""
    return float(np.median([np.inf if value is None else value for value in values]))


def early(found: dict[str, Any]) -> str:
    """The loss after 1,500 steps."""
    return f"{median(found['after']['1500']):.3g}"


def late(found: dict[str, Any]) -> str:
    """The largest loss after step 7,500, and how many runs rise tenfold above their least before."""
    pairs = zip(found["most"], found["least"], strict=True)
    risen = sum(most is None or most > TENFOLD * least for most, least in pairs)
    return f"{median(found['most']):.3g} ({risen})"


def end(found: dict[str, Any]) -> str:
    """The loss after the last step."""
    return f"{median(found['after']['15000']):.3g}"


def table(results: dict[str, Any], start: str, cell: Callable[[dict[str, Any]], str]) -> str:
    """One number of every arm, by rate of the hand-designed one."""
    arms = results["starts"][start]
    rates = list(arms["hand"])
    header = ["arm", "learned", *(f"at a rate of {rate}" for rate in rates)]
    lines = [f"| {' | '.join(header)} |", "|---|---" + "|---:" * len(rates) + "|"]
    for (arm, rule), found in by_arm(arms).items():
        cells = [cell(found.get(rate, next(iter(found.values())))) for rate in rates]
        lines.append(f"| {' | '.join([arm, rule, *cells])} |")
    return "\n".join(lines)


def summary(results: dict[str, Any]) -> dict[str, str]:
    """Tables of README.md by name, those of the wide start."""
    return {"early": table(results, "wide", early), "late": table(results, "wide", late)}


def section(results: dict[str, Any]) -> list[str]:
    """What tables.md has: the narrow start, and where runs from both end."""
    return [
        "## Equation 6",
        "Medians over ten starts, by rate of the hand-designed arm. From narrow starts, the loss after "
        "1,500 steps:",
        table(results, "narrow", early),
        "The largest loss after step 7,500, and in brackets how many of ten runs rise tenfold above "
        "their least before:",
        table(results, "narrow", late),
        "The loss after 15,000 steps, from narrow starts:",
        table(results, "narrow", end),
        "And from wide ones:",
        table(results, "wide", end),
    ]


def draw(results: dict[str, Any]) -> matplotlib.figure.Figure:
    """By learned optimizer: paths in two dimensions, and the curves of both starts."""
    rules = [rule for rule in RULES if rule in results["settings"]["theta"]]
    figure = matplotlib.figure.Figure(figsize=(13, 4.2 * len(rules)), layout="constrained")
    axes = figure.subplots(len(rules), 3, squeeze=False)
    for row, rule in zip(axes, rules, strict=True):
        draw_paths(row[0], results["path"], rule)
        row[0].set(
            title=f"2 dimensions, rate 0.001, learned: {RULES[rule]}",
            xlabel="$x_1$",
            ylabel="$x_2$",
        )
        for axis, start in zip(row[1:], ("wide", "narrow"), strict=True):
            draw_curves(axis, results["starts"][start], rule, SHOWN[start])
            axis.axvline(7500, color="#999999", linestyle=":", linewidth=1)
            title = f"{start} start, rate {SHOWN[start]}, learned: {RULES[rule]}"
            axis.set(title=title, yscale="log", xlabel="steps", ylabel="median loss")
            axis.grid(color="#e4e4e4")
    lines = {line.get_label(): line for line in axes[0, 1].lines if line.get_label()[0] != "_"}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def shown_arms(found: dict[str, Any], rule: str) -> list[tuple[str, str, Any]]:
    """Label, colour and what was found, of the arms with a learned optimizer and of Adam."""
    names = {"hand": "hand"} | {arm: f"{rule}/{arm}" for arm in ARMS if arm != "hand"}
    return [(ARMS[arm], color, found[names[arm]]) for arm, color in zip(ARMS, COLORS, strict=True)]


def draw_curves(axis: matplotlib.axes.Axes, arms: dict[str, Any], rule: str, rate: str) -> None:
    """The median loss over steps."""
    for label, color, found in shown_arms(arms, rule):
        row = found.get(rate, next(iter(found.values())))
        curve = np.array(row["curve"], float)
        axis.plot(
            100 * np.arange(1, len(curve) + 1), curve, color=color, label=label, linewidth=1.2
        )


def draw_paths(axis: matplotlib.axes.Axes, paths: dict[str, Any], rule: str) -> None:
    """Paths over the function, darker where it is lower."""
    side = np.linspace(-1, 1, _BACKGROUND)
    s = np.abs(side)[None] + np.abs(side)[:, None]
    height = np.log10(np.maximum(oscillation(s.astype(np.float32)), 1e-4))
    axis.contourf(side, side, height, levels=20, cmap="Greys_r", alpha=0.5)
    for label, color, path in shown_arms(paths, rule):
        x = np.array(path, float)
        axis.plot(x[:, 0], x[:, 1], color=color, label=label, linewidth=1.1)
        axis.plot(*x[-1], "o", color=color, markersize=6, markeredgecolor="white")
    axis.plot(*np.array(next(iter(paths.values())), float)[0], "*", color="black", markersize=11)
    ticks = (-1, -0.5, 0, 0.5, 1)
    axis.set(xlim=(-1, 1), ylim=(-1, 1), xticks=ticks, yticks=ticks)
