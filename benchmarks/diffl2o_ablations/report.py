"""Tables of the ablations of Diff-L2O: `python -m benchmarks.diffl2o_ablations.report`."""

import json
import pathlib
from typing import Any

import numpy as np

from benchmarks import pages
from lohp_jax.files import write_atomically

RESULTS = pathlib.Path(__file__).with_name("results.json")
MANY = 16
"""Samples of which the best counts, where there are many minima."""
SHOWN = ("ddim 1", "ddim 5", "ddim 10", "ddim 100", "ancestral 10", "dpmpp_2m 10", "heun 10")
"""Samplers of the short table."""


def table(results: dict[str, Any]) -> str:
    """Markdown, mean ± standard deviation over seeds."""
    lines = [
        "# Ablations of Diff-L2O",
        "",
        "Made by `python -m benchmarks.diffl2o_ablations.run --oracles FILE`; `README.md` says what the "
        "columns are.",
        "",
    ]
    for name, axes in results["cells"].items():
        lines += [f"## {name}", "", _HEAD]
        for axis, rows in axes.items():
            for value, row in rows.items():
                shown = " | ".join(_spread(row[column]) for column in _COLUMNS)
                lines.append(f"| {axis} | {value} | {row['gradient_calls']} | {shown} |")
        lines.append("")
    return "\n".join(lines)


_COLUMNS = ("raw_gap", "refined_gap", "refined_success", "best_gap", "best_success")
_HEAD = (
    "| axis | value | gradients of a sample | gap, raw | gap, refined | success, refined "
    f"| gap, best of {MANY} | success, best of {MANY} |\n|---|---|---:|---:|---:|---:|---:|---:|"
)


def _spread(values: list[float | None]) -> str:
    if None in values:
        return "failed"
    return f"{np.mean(values):.3g} ± {np.std(values, ddof=min(1, len(values) - 1)):.1g}"


def short_table(cells: dict[str, Any]) -> str:
    """Every axis on both sets; of the samplers a few."""
    lasso, wells = cells["lasso25x50_fixedA_0.1"], cells["rastrigin_n2"]
    lines = [
        f"| axis | value | LASSO, gap | Rastrigin, solved | the same, best of {MANY} |",
        "|---|---|---:|---:|---:|",
    ]
    for axis, rows in wells.items():
        for value, row in rows.items():
            if axis == "sampler" and value not in SHOWN:
                continue
            beside = lasso.get(axis, {}).get(value)
            gap = _spread(beside["refined_gap"]) if beside else ""
            solved = [_spread(row[name]) for name in ("refined_success", "best_success")]
            lines.append(f"| {axis} | {value} | {gap} | {' | '.join(solved)} |")
    return "\n".join(lines)


def dimension_table(axes: dict[str, Any]) -> str:
    """Ackley's function: solved by the best of many, by a network and without one."""
    lines = [f"| n | diffusion, best of {MANY} | without a network |", "|---:|---:|---:|"]
    for value, row in axes["dimension"].items():
        without = axes["without a network"].get(value)
        columns = [_spread(it["best_success"]) if it else "" for it in (row, without)]
        lines.append(f"| {value} | {' | '.join(columns)} |")
    return "\n".join(lines)


def write(path: pathlib.Path) -> None:
    """Writes the pages."""
    results = json.loads(path.read_text())
    cells = results["cells"]
    if {"lasso25x50_fixedA_0.1", "rastrigin_n2", "ackley_dimension"} <= cells.keys():
        parts = {
            "axes": short_table(cells),
            "dimension": dimension_table(cells["ackley_dimension"]),
        }
        pages.fill_readme(path, parts)
    write_atomically(pages.beside(path, "tables.md"), table(results).encode())


if __name__ == "__main__":
    pages.report(__doc__, RESULTS, write)
