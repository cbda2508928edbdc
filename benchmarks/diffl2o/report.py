"""Tables and a picture: `python -m benchmarks.diffl2o.report [--merge FILE ...]`.

Writes tables.md and results.png beside results.json, and the tables of README.md. Figures
are means over seeds, ± their standard deviation; classic solvers that draw nothing have one.
"""

import json
import pathlib
from typing import Any

import matplotlib.figure
import numpy as np

from benchmarks import pages
from lohp_jax.files import write_atomically

RESULTS = pathlib.Path(__file__).with_name("results.json")
SHOWN = {
    "lasso": ("fista_restart", "coordinate_descent", "lista", "regression_unrolled", "diffusion"),
    "wells": (
        "multistart_newton",
        "centre_newton",
        "centre_newton_more",
        "cma",
        "regression_newton",
    ),
}
_GUIDED = ("diffusion_parameters", "diffusion_gradient", "diffusion_smoothed", "diffusion_both")


def spread(values: list[float | None], digits: int = 2) -> str:
    """Mean ± standard deviation, "not finite" where one is None."""
    if None in values:
        return "not finite"
    mean = f"{np.mean(values):.{digits}g}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.1g}"


def table(methods: dict[str, Any], about: dict[str, Any]) -> list[str]:
    """Rows of one set: a method and a budget each."""
    relative = about["gap"] == "relative"
    budget = "pairs" if relative else "K"
    lines = [
        f"| method | {budget} | mean gap | median gap | solved | gradients | networks "
        "| set-up | µs an instance | seconds of training |",
        "|---|---:|---:|---:|---:|---:|---:|---|---:|---:|",
    ]
    for method, budgets in methods.items():
        for size, seeds in budgets.items():
            rows = [row for row in seeds.values() if "failed" not in row]
            name, failed = method, len(seeds) - len(rows)
            if failed:
                name += f" ({failed} of {len(seeds)} trainings failed)"
            if not rows:
                lines.append(f"| {name} | {size} | | | | | | | | |")
                continue
            columns = {key: [row[key] for row in rows] for key in rows[0] if key != "set_up"}
            cells = (
                spread(columns["gap_mean"]),
                f"{np.mean(columns['gap_median']):.2g}",
                spread(columns["success"], 3),
                f"{np.mean(columns['gradient_calls']):.0f}",
                f"{np.mean(columns['network_calls']):.0f}",
                rows[0]["set_up"],
                f"{1e6 * np.min(columns['seconds_per_instance']):.0f}",
                f"{np.median(columns['training_seconds']):.0f}"
                if "training_seconds" in columns
                else "",
            )
            lines.append(f"| {name} | {size} | {' | '.join(cells)} |")
    return lines


def page(results: dict[str, Any]) -> str:
    """All tables, as Markdown."""
    lines = [
        "# Diff-L2O",
        "",
        "Made by `python -m benchmarks.diffl2o.run --oracles FILE`; `README.md` says what the methods "
        "are. Gaps of LASSO are relative, others absolute; solved is the share of gaps under "
        "0.01. Mean over seeds ± standard deviation. Set-up, once for each problem, is not among the "
        "calls: the largest eigenvalue of A^T A, which FISTA and LISTA take from a library and the "
        "denoiser from a power iteration. Times are of all instances in one vmapped call on one core, "
        "the least over seeds: they were taken hours apart, so that only large ratios mean something.",
        "",
    ]
    for name, methods in results["cells"].items():
        about = results["sets"][name]
        seeds = max(len(seeds) for budgets in methods.values() for seeds in budgets.values())
        optima = "proven" if about["certain"] else "the best known"
        lines += [
            f"## {name}",
            "",
            f"{about['num_instances']} instances, optima {optima}; {seeds} seeds; learned methods "
            f"trained on `{about['trained_on']}`.",
            "",
            *table(methods, about),
            "",
        ]
    if "throughput" in results:
        lines += _throughput(results["throughput"])
    return "\n".join(lines)


def _throughput(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## Throughput",
        "",
        "LASSO 25x50, each A its own, to a mean gap of 1e-3, one core; times scikit-learn's loop, the "
        "median of rounds and their range.",
        "",
        "| solver | instances | effort | gap | instances a second | times scikit-learn |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        low, high = row["range"]
        lines.append(
            f"| {row['solver']} | {row['num_instances']} | {row['effort']:.3g} | {row['gap_mean']:.2g} "
            f"| {row['instances_per_second']:.0f} | {row['times_scikit_learn']:.3g} "
            f"({low:.3g} to {high:.3g}) |"
        )
    return [*lines, ""]


STARTS = {
    "diffusion_smoothed": "diffusion, guided by a smoothed gradient",
    "diffusion_gradient": "diffusion, guided by the gradient",
    "diffusion_parameters": "diffusion, guided by the parameters of the problem",
    "diffusion_both": "diffusion, by parameters and smoothed gradient",
    "regression_newton": "regression on the parameters, then normal starts",
    "centre_newton": "bottom of the bowl, then normal starts around it; no network",
    "centre_newton_more": "the same with as many gradients as smoothed guidance: 2 and 149 starts",
    "frame_newton": "normal starts around it alone",
    "multistart_newton": "starts as the family draws them",
    "cma": "CMA-ES instead of Newton's method: one run, and up to nine restarts",
}
SOLVERS = {
    "lista": "LISTA with momentum, ten layers",
    "regression_unrolled": "unrolled network, eight rounds, a regression; FISTA",
    "diffusion": "diffusion by a network of half as many, evaluated twice; FISTA",
    "coordinate_descent": "coordinate descent, ten sweeps",
    "fista": "FISTA",
    "l2o_pa": "L2O-PA",
    "l2o_dm": "L2O-DM",
    "rnnprop": "RNNprop",
    "adam": "Adam, tuned",
}


def starts_table(methods: dict[str, Any]) -> str:
    """Share of problems solved from one proposal and from 64."""
    lines = ["| starts | K = 1 | K = 64 | gradients, K = 64 |", "|---|---|---|---:|"]
    for method, name in STARTS.items():
        rows = [list(methods[method][size].values()) for size in ("1", "64")]
        solved = [spread([row["success"] for row in seeds], 3) for seeds in rows]
        calls = np.mean([row["gradient_calls"] for row in rows[1]])
        lines.append(f"| {name} | {' | '.join(solved)} | {f'{calls:.0f}' if calls else ''} |")
    return "\n".join(lines)


def solvers_table(cells: dict[str, Any], sets: dict[str, Any]) -> str:
    """Mean relative gap of every set of LASSO after ten pairs of products."""
    names = [name for name in cells if sets[name]["gap"] == "relative"]
    lines = ["| solver | " + " | ".join(f"`{name}`" for name in names) + " |"]
    lines += ["|---" * (len(names) + 1) + "|"]
    for method, label in SOLVERS.items():
        columns = [label]
        for name in names:
            seeds = cells[name].get(method, {}).get("10", {}).values()
            rows = [row["gap_mean"] for row in seeds if "failed" not in row]
            same = rows and np.ptp(rows) < 1e-9 * max(rows)  # of a method that draws nothing
            columns.append(spread(rows[:1] if same else rows) if rows else "")
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> matplotlib.figure.Figure:
    """Gap by pairs of products for sets of LASSO; share of problems solved by K for the others."""
    names = list(results["cells"])
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = matplotlib.figure.Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
    for place, name in enumerate(names):
        axis = figure.add_subplot(rows, columns, place + 1)
        relative = results["sets"][name]["gap"] == "relative"
        kind, key = ("lasso", "gap_mean") if relative else ("wells", "success")
        shown = SHOWN[kind] + (() if relative else _GUIDED)
        for method in (m for m in shown if m in results["cells"][name]):
            budgets = results["cells"][name][method]
            sizes = [int(size) for size in budgets]
            values = [
                np.mean(
                    [row[key] for row in seeds.values() if row.get(key) is not None] or [np.nan]
                )
                for seeds in budgets.values()
            ]
            style = "--" if method.startswith("diffusion") else "-"
            color = f"C{shown.index(method)}"
            axis.plot(sizes, values, style, color=color, marker="o", markersize=3, label=method)
        axis.set_xscale("log")
        if relative:
            axis.set_yscale("log")
            axis.set_ylim(1e-8, 10)  # beyond its top a method has diverged
        else:
            axis.set_xlim(right=5e3)  # room for the legend
        axis.set(
            title=name,
            xlabel="pairs of products" if relative else "proposals K",
            ylabel="mean relative gap" if relative else "solved",
        )
        axis.legend(fontsize=7)
    return figure


def merge(results: dict[str, Any], more: dict[str, Any]) -> None:
    """Takes the cells of another file into `results`; its own win."""
    if more["quick"]:
        raise SystemExit("--merge: expected results of full runs, got one of --quick.")
    results.setdefault("sets", {}).update(more["sets"])
    for name, methods in more["cells"].items():
        for method, budgets in methods.items():
            for size, seeds in budgets.items():
                here = results.setdefault("cells", {}).setdefault(name, {})
                here.setdefault(method, {}).setdefault(size, {}).update(seeds)
    results |= {key: more[key] for key in ("quick", "environment", "throughput") if key in more}


def write(path: pathlib.Path) -> None:
    """Writes the pages and the picture."""
    results = json.loads(path.read_text())
    cells, sets = results["cells"], results["sets"]
    if "rastrigin_n2" in cells and "throughput" in results:
        parts = {
            "starts": starts_table(cells["rastrigin_n2"]),
            "solvers": solvers_table(cells, sets),
            "throughput": "\n".join(_throughput(results["throughput"])[4:]),
        }
        pages.fill_readme(path, parts)
    write_atomically(pages.beside(path, "tables.md"), page(results).encode())
    draw(results).savefig(pages.beside(path, "results.png"), dpi=110)


if __name__ == "__main__":
    pages.report(__doc__, RESULTS, write, merge)
