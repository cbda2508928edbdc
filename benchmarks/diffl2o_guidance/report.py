"""Tables and picture of the guidance by landscape: `python -m benchmarks.diffl2o_guidance.report`."""

import itertools
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import matplotlib.figure
import numpy as np
import scipy.stats

from benchmarks import pages
from benchmarks.diffl2o_guidance.arms import ARMS, LEAKS, NETWORKS, SAMPLER_STEPS, SAMPLES
from lohp_jax.files import write_atomically

HEAD = (
    '"Success" is the share of held-out problems with a gap under 0.01, the "gap" is the mean of '
    'f - f*, for LASSO over f*; f* is the objective at the label. "K = 1" is the mean over 16 '
    'samples, "K = 16" the best of them. Refined is after 20 steps of damped Newton, for LASSO 10 of '
    "FISTA. Spreads are standard deviations over seeds of training; all seeds and networks share the "
    'problems. "Matched" is a network that was trained with parameters alone and spends as many '
    "gradients as the arm on more starts, for LASSO on more steps."
)
RESULTS = pathlib.Path(__file__).with_name("results.json")
FIXED = [name for name, arm in ARMS.items() if arm.network == "fixed" and not arm.adaptive]
FIXED = [name for name in FIXED if not name.startswith("blind")]
ADAPTIVE = {
    "gated, all parts": ("gated_both",),
    "Wiener, all parts": ("wiener_both",),
    "learned, all parts": ("learned_both",),
    "Wiener, chosen parts": ("wiener_raw", "wiener_smoothed", "wiener_both"),
    "learned, chosen parts": ("learned_raw", "learned_smoothed", "learned_both"),
}
"""Arms among which the best is chosen as that of the fixed ones is."""
STAGES = (("raw", "1"), ("refined", "1"), ("refined", str(SAMPLES)))
SMALLEST = 1e-7
"""Gaps below it, also negative ones, where a sample is better than the label, count as it."""


def rows_of(cells: dict[str, Any], arm: str) -> list[dict[str, Any]]:
    """What an arm did with each seed."""
    found = cells.get(ARMS[arm].network, {}).values()
    return [cell["arms"][arm] for cell in found if arm in cell["arms"]]


def halves(scores: list[dict[str, Any]], metric: str) -> np.ndarray:
    """`[seeds, 2]`, the even and the odd problems; a gap that is not finite is infinite."""
    return np.array([[np.inf if v is None else v for v in score[metric]] for score in scores])


def merit(scores: list[dict[str, Any]], metric: str) -> np.ndarray:
    """`[seeds, 2]`: success, or minus the decimal logarithm of the mean gap; more is better."""
    values = halves(scores, metric)
    return values if metric == "success" else -np.log10(np.maximum(values, SMALLEST))


def against_best(
    cells: dict[str, Any], arms: Iterable[str], stage: str, k: str, metric: str
) -> dict[str, Any]:
    """The best of some arms against the best fixed weights, chosen on one half, measured on the other.

    Returns: the "best" fixed arm on all problems, "difference" and its 95 % "interval", Student's t
      over seeds, which share the choice; positive if the arms are better.
    """
    merits = {
        name: merit([row[stage][k] for row in rows_of(cells, name)], metric)
        for name in (*FIXED, *arms)
    }

    def best(names, half):
        return max(names, key=lambda name: merits[name][:, half].mean())

    seeds = np.mean(
        [
            merits[best(arms, choose)][:, measure] - merits[best(FIXED, choose)][:, measure]
            for choose, measure in ((0, 1), (1, 0))
        ],
        axis=0,
    )
    reach = np.nan
    if len(seeds) > 1:
        reach = scipy.stats.t.ppf(0.975, len(seeds) - 1) * scipy.stats.sem(seeds)
    mean = float(seeds.mean())
    interval = mean - float(reach), mean + float(reach)
    return {"best": best(FIXED, slice(None)), "difference": mean, "interval": interval}


def verdict(comparison: dict[str, Any]) -> str:
    """In one word."""
    low, high = comparison["interval"]
    if np.isnan(low):
        return "(one seed)"
    if low <= 0 <= high:
        return "level"
    return "ahead" if low > 0 else "**behind**"


def comparison_table(sets: dict[str, Any], metric: str) -> str:
    """Adaptive arms against the best fixed one, set by set and stage by stage."""
    header = ["set", "samples", "best fixed", *ADAPTIVE]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for (name, cells), (stage, k) in itertools.product(sets.items(), STAGES):
        found = [against_best(cells, arms, stage, k, metric) for arms in ADAPTIVE.values()]
        columns = [name, f"{stage}, K = {k}", found[0]["best"]]
        for it in found:
            low, high = it["interval"]
            columns.append(f"{it['difference']:+.3f} ({low:+.3f} to {high:+.3f}) {verdict(it)}")
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def _mean_and_spread(values: np.ndarray) -> str:
    spread = f" ± {values.std(ddof=1):.2g}" if len(values) > 1 else ""
    return f"{values.mean():.3g}{spread}"


def _success(scores: list[dict[str, Any]]) -> str:
    values = halves(scores, "success").mean(axis=1)
    spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{spread}"


def set_table(cells: dict[str, Any]) -> str:
    """All arms of a set."""
    header = ["arm", "gradients of a sample", "raw gap, K = 1"]
    for k in ("1", str(SAMPLES)):
        header += [
            f"success, K = {k}",
            f"matched, K = {k}",
            f"gap, K = {k}",
            f"matched gap, K = {k}",
        ]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    control = [cell["matched"] for cell in cells.get("alone", {}).values()]
    for name in ARMS:
        rows = rows_of(cells, name)
        if not rows:
            continue
        sampling, refining = rows[0]["sampling_calls"], rows[0]["refine_calls"]
        raw = halves([row["raw"]["1"] for row in rows], "gap").mean(axis=1)
        columns = [name, f"{sampling} + {refining}", _mean_and_spread(raw)]
        for k in ("1", str(SAMPLES)):
            own = [row["refined"][k] for row in rows]
            matched = [seed[str(sampling)][k] for seed in control] if sampling else []
            columns += [_success(own), _success(matched) if matched else "-"]
            gaps = [halves(scores, "gap").mean(axis=1) for scores in (own, matched) if scores]
            columns += [_mean_and_spread(gap) for gap in gaps] + ["-"] * (2 - len(gaps))
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def short_comparison(sets: dict[str, Any]) -> str:
    """Solved after refinement by what guides, and the same gradients spent on more samples."""
    lines = [
        "| set | samples | parameters alone | the same, as many gradients | parameters and smoothed "
        "gradient | Wiener weights over best fixed | learned over best fixed |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, cells), (stage, k) in itertools.product(sets.items(), STAGES[1:]):
        guided = rows_of(cells, "smoothed_1")
        calls = str(guided[0]["sampling_calls"])
        columns = [
            _success([row["refined"][k] for row in rows_of(cells, "parameters_alone")]),
            _success([cell["matched"][calls][k] for cell in cells["alone"].values()]),
            _success([row["refined"][k] for row in guided]),
        ]
        for arms in (ADAPTIVE["Wiener, all parts"], ADAPTIVE["learned, all parts"]):
            it = against_best(cells, arms, stage, k, "success")
            columns.append(f"{it['difference']:+.3f} {verdict(it)}")
        lines.append(
            f"| {name} | {'one' if k == '1' else f'best of {k}'} | {' | '.join(columns)} |"
        )
    return "\n".join(lines)


def short_snr_table(snr: dict[str, Any]) -> str:
    """Median weights of the smoothed gradient, and what four pairs of probes miss at log SNR 0."""
    lines = [
        "| set | log SNR 8 | 4 | 0 | -4 | -8 | error of 4 pairs at 0 |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in snr.items():
        it = found["smoothed_gradient"]
        places = [found["levels"].index(level) for level in (8, 4, 0, -4, -8)]
        medians = [f"{it['weight']['median'][place]:.2f}" for place in places]
        lines.append(f"| {name} | {' | '.join(medians)} | {it['error'][places[2]]:.2f} |")
    return "\n".join(lines)


def draw_weights(snr: dict[str, Any]) -> matplotlib.figure.Figure:
    """Wiener weights by noise level: median, quartiles, and the error of the few probes of a gate."""
    figure = matplotlib.figure.Figure(figsize=(12, 2.9 * -(-len(snr) // 4)), layout="constrained")
    axes = np.ravel(figure.subplots(-(-len(snr) // 4), 4, squeeze=False, sharey=True))
    for axis, (name, found) in zip(axes, snr.items(), strict=False):
        for part, color in (("gradient", "#333333"), ("smoothed_gradient", "#0072b2")):
            weight = found[part]["weight"]
            label = part.replace("_", " ")
            axis.plot(found["levels"], weight["median"], color=color, label=f"{label}, median")
            axis.plot(found["levels"], weight["mean"], color=color, linestyle=":", label="mean")
            axis.fill_between(
                found["levels"], weight["q25"], weight["q75"], color=color, alpha=0.15, linewidth=0
            )
            axis.plot(
                found["levels"],
                found[part]["error"],
                color=color,
                linestyle="--",
                linewidth=0.8,
                label="error of 4 pairs of probes",
            )
        axis.set(title=name, xlabel="log SNR of the noise level", ylim=(0, 1.02))
        axis.invert_xaxis()
        axis.grid(color="#e4e4e4")
    axes[0].set_ylabel("weight SNR / (1 + SNR)")
    for axis in axes[len(snr) :]:
        axis.axis("off")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def snr_table(snr: dict[str, Any]) -> str:
    """Mean weights and errors at a few levels."""
    header = ["set", "gradient", "weight at log SNR 8", "4", "0", "-4", "-8", "error there"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, found in snr.items():
        chosen = [i for i, level in enumerate(found["levels"]) if level in (8, 4, 0, -4, -8)]
        for part in ("gradient", "smoothed_gradient"):
            weight, error = found[part]["weight"], found[part]["error"]
            shown = [
                f"{weight['median'][i]:.2f} ({weight['q25'][i]:.2f} to {weight['q75'][i]:.2f})"
                for i in chosen
            ]
            errors = ", ".join(f"{error[i]:.2f}" for i in chosen)
            lines.append(f"| {' | '.join([name, part.replace('_', ' '), *shown, errors])} |")
    return "\n".join(lines)


def complete(cells: dict[str, Any]) -> dict[str, Any]:
    """The seeds of a set that all networks have; nothing without any."""
    seeds = set.intersection(*(set(cells.get(network, {})) for network in NETWORKS))
    kept = {n: {s: cell for s, cell in found.items() if s in seeds} for n, found in cells.items()}
    return kept if seeds else {}


def write(path: pathlib.Path) -> None:
    """Writes the page and its picture beside the results."""
    results = json.loads(path.read_text())
    sets = {name: complete(cells) for name, cells in results["cells"].items() if name not in LEAKS}
    sets = {name: cells for name, cells in sets.items() if cells}
    picture = pages.beside(path, "snr.png")
    if results["snr"]:
        draw_weights(results["snr"]).savefig(picture, dpi=100)
    if sets and results["snr"]:
        parts = {"success": short_comparison(sets), "weights": short_snr_table(results["snr"])}
        pages.fill_readme(path, parts)
    parts = [
        "# Guidance of Diff-L2O by landscape",
        HEAD,
        f"Sampler: {results['sampler']}, {SAMPLER_STEPS} steps.",
        "## Do adaptive weights reach the best fixed ones?",
        f"Fixed: {', '.join(FIXED)}. The best is chosen on half of the problems and measured on the "
        "other half, and the reverse, and so are parts where they are chosen. A difference is the mean "
        "over seeds with a 95 % interval.",
        "Success, difference in shares:",
        comparison_table(sets, "success"),
        "Mean gap, decades (0.3 is half of the gap):",
        comparison_table(sets, "gap"),
        "## How far gradients can be trusted",
        "The weight SNR / (1 + SNR) at noisy solutions, median and quartiles over problems, of 256 "
        "pairs of probes; errors are root mean squares of what 4 pairs give.",
        f"![Wiener weights by noise level]({picture.name})",
        snr_table(results["snr"]),
        "## Set by set",
    ]
    for name, cells in results["cells"].items():
        seeds = ", ".join(f"{network} {len(found)}" for network, found in cells.items())
        parts += [f"### {name}", f"Seeds: {seeds}.", set_table(cells)]
    write_atomically(pages.beside(path, "tables.md"), ("\n\n".join(parts) + "\n").encode())


if __name__ == "__main__":
    pages.report(__doc__, RESULTS, write)
