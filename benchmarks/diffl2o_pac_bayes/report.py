"""Tables and a picture of the PAC-Bayes study: `python -m benchmarks.diffl2o_pac_bayes.report`."""

import functools
import json
import math
import pathlib

import matplotlib.figure
import numpy as np

from benchmarks import pages
from benchmarks.diffl2o_pac_bayes.bounds import granulated_tau, partial_tau, seed_interval, tau
from lohp_jax.files import write_atomically

RESULTS = pathlib.Path(__file__).with_name("results.json")
OUTCOMES = {
    "held_out": "held-out loss of the solver",
    "gap": "held-out minus training loss of the solver",
    "gibbs_held_out": "held-out loss of the posterior",
}
PREDICTORS = {
    "bound": "PAC-Bayes-kl bound",
    "slack": "bound minus the posterior's loss on n instances",
    "kl_over_n": "KL / n",
    "test_set_bound": "test-set bound of the prior's network, same n instances",
    "validation": "loss of the prior's network on them",
    "one_over_m": "1 / m",
    "train": "training loss of the solver",
    "weight_norm": "norm of the solver's weights",
    "distance": "their distance from the start",
}
GIVEN = {"one_over_m": "given m", "train": "given training loss", "validation": "given validation"}
Grid = dict[str, np.ndarray]


def read_grid(cells: dict, axes: dict[str, list], seeds: int) -> Grid | None:
    """Every quantity as `[*axes, seeds]`, with those that follow from them; None if runs are missing."""
    shape = (*(len(values) for values in axes.values()), seeds)
    rows = [row for cell in cells.values() for row in cell["rows"]]
    if len(rows) != math.prod(shape):
        return None
    grid = {name: np.full(shape, np.nan) for name in rows[0] if name not in (*axes, "seed")}
    for row in rows:
        place = [min(range(len(v)), key=lambda i: abs(v[i] - row[k])) for k, v in axes.items()]
        for name, values in grid.items():
            values[(*place, row["seed"])] = row[name]
    m = np.reshape(axes["m"], (-1, *[1] * (len(shape) - 1)))
    grid["gap"] = grid["held_out"] - grid["train"]
    grid["slack"] = grid["bound"] - grid["gibbs"]
    grid["kl_over_n"] = grid["divergence"] / grid["n"]
    grid["one_over_m"] = np.broadcast_to(1.0 / m, shape)
    return grid


def known_mean(values: np.ndarray) -> float:
    """Mean of what is not NaN."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def tau_at_fixed_m(x: np.ndarray, y: np.ndarray) -> float:
    """Mean over m, the first axis, of tau over everything else."""
    return float(np.mean([tau(*pair) for pair in zip(x, y, strict=True)]))


def correlations(grid: Grid, predictor: str, outcome: str) -> dict[str, tuple[float, float, float]]:
    """Each coefficient with its interval over seeds."""
    x, y = grid[predictor], grid[outcome]
    num_axes = x.ndim - 1
    by_seed = [granulated_tau(x[..., s], y[..., s], num_axes) for s in range(x.shape[-1])]
    by_seed = np.transpose(by_seed)  # [axes, seeds]
    found = {
        "tau": (tau, x, y),
        "granulated": (known_mean, by_seed),
        "along m": (known_mean, by_seed[:1]),
        "along others": (known_mean, by_seed[1:]),
        "at fixed m": (tau_at_fixed_m, x, y),
    }
    for given, name in GIVEN.items():
        if given != predictor:
            found[name] = (partial_tau, x, y, grid[given])
    return {
        name: (statistic(*arrays), *seed_interval(statistic, *arrays))
        for name, (statistic, *arrays) in found.items()
    }


def summary(grid: Grid, settings: dict) -> str:
    """By m: losses and bounds, how often bounds hold, and what noise on copies changes."""
    axes, budget, delta = (settings[k] for k in ("axes", "budget", "delta"))
    names = ("train", "held_out", "gap", "gibbs", "gibbs_held_out", "bound", "test_set_bound")
    header = ["m", "copies", *names, "holds", "noisy copies"]
    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    holds = grid["gibbs_held_out"] <= grid["bound"]
    for i, m in enumerate(axes["m"]):
        means = [f"{grid[name][i].mean():.3f}" for name in names]
        noisy = grid["held_out"][i][..., 1, :] - grid["held_out"][i][..., 0, :]
        change = _cell((noisy.mean(), *seed_interval(lambda v: float(v.mean()), noisy)), 4)
        lines.append(
            " | ".join([str(m), str(budget // m), *means, f"{holds[i].mean():.3f}", change])
        )
    margin = (grid["bound"] - grid["gibbs_held_out"]).min()
    test_holds = (grid["prior_held_out"] <= grid["test_set_bound"]).mean()
    return "\n".join(f"| {line} |" for line in lines) + (
        f"\n\nThe bound holds in {holds.mean():.4f} of {holds.size} runs (wanted: {1 - delta:g}), the "
        f"least margin is {margin:.4f}; the test-set bound holds in {test_holds:.4f}. "
        f"{(grid['bound'] > 0.99).mean():.3f} of the bounds are above 0.99. The mean KL is "
        f"{grid['divergence'].mean():.3g}, and the last layer's training changes the held-out loss by "
        f"{(grid['posterior_held_out'] - grid['prior_held_out']).mean():.4f}."
    )


def correlation_table(grid: Grid, outcome: str) -> str:
    """All predictors of one outcome."""
    rows = {name: correlations(grid, name, outcome) for name in PREDICTORS}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [" | ".join(["predictor", *columns]), " | ".join(["---"] * (1 + len(columns)))]
    for name, row in rows.items():
        cells = [_cell(row[c]) if c in row else "" for c in columns]
        lines.append(" | ".join([PREDICTORS[name], *cells]))
    return "\n".join(f"| {line} |" for line in lines)


def _cell(values: tuple[float, float, float], digits: int = 2) -> str:
    if math.isnan(values[0]):
        return ""
    value, low, high = (f"{v:.{digits}f}" for v in values)
    return f"{value} [{low}, {high}]"


def short_summary(grids: dict[str, Grid], axes: dict[str, list]) -> str:
    """By m and family: mean losses of the solver, and the bounds of the posterior's."""
    names = {
        "train": "training",
        "held_out": "held-out",
        "bound": "bound",
        "test_set_bound": "test-set bound",
    }
    header = ["m", *(f"{family}: {name}" for family in grids for name in names.values())]
    lines = ["| " + " | ".join(header) + " |", "|---:" * len(header) + "|"]
    for i, m in enumerate(axes["m"]):
        means = [f"{grid[name][i].mean():.3f}" for grid in grids.values() for name in names]
        lines.append("| " + " | ".join([str(m), *means]) + " |")
    return "\n".join(lines)


def short_correlations(grids: dict[str, Grid]) -> str:
    """Kendall's tau of predictors with the generalisation gap of the solver."""
    columns = {"tau": tau, "at fixed m": tau_at_fixed_m}
    header = ["predictor", *(f"{family}: {column}" for family in grids for column in columns)]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, title in PREDICTORS.items():
        found = [
            (statistic(*pair), *seed_interval(statistic, *pair))
            for pair in ((grid[name], grid["gap"]) for grid in grids.values())
            for statistic in columns.values()
        ]
        lines.append("| " + " | ".join([title, *(_cell(values) for values in found)]) + " |")
    return "\n".join(lines)


def draw(grids: dict[str, Grid], axes: dict[str, list]) -> matplotlib.figure.Figure:
    """Losses and bounds by m, then every run: bound and held-out loss, slack and gap."""
    size = (12, 3.5 * len(grids))
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(grids), 3, squeeze=False)
    for (name, grid), (curves, risk, gap) in zip(grids.items(), panels, strict=True):
        for quantity in ("train", "held_out", "gibbs_held_out", "test_set_bound", "bound"):
            values = grid[quantity].reshape(len(axes["m"]), -1)
            curves.plot(
                axes["m"], values.mean(axis=1), marker=".", label=quantity.replace("_", " ")
            )
        curves.set_xscale("log", base=2)
        curves.set(xlabel="m, distinct instances", ylabel="mean loss", title=name)
        curves.set_ylim(0, 1.3)  # room for the legend
        curves.legend(fontsize="small", loc="upper right")
        for panel, x, y in ((risk, "bound", "held_out"), (gap, "slack", "gap")):
            for m, each_x, each_y in zip(axes["m"], grid[x], grid[y], strict=True):
                panel.plot(each_x.ravel(), each_y.ravel(), ".", markersize=3, label=f"m = {m}")
            panel.set(xlabel=PREDICTORS[x], ylabel=OUTCOMES[y])
        gap.legend(fontsize="x-small")
    return figure


def report(results: dict) -> tuple[str, dict[str, Grid]]:
    """The page, and the grids of all families that are complete."""
    settings = results["settings"]
    axes, seeds = settings["axes"], settings["effort"]["seeds"]
    read = functools.partial(read_grid, axes=axes, seeds=seeds)
    grids = {name: read(cells) for name, cells in results["cells"].items()}
    text = [
        "# Does a PAC-Bayes bound predict how Diff-L2O generalises?\n",
        "Written by `python -m benchmarks.diffl2o_pac_bayes.run`. Each run trains on m distinct "
        f"instances with {settings['budget']} / m copies; means are over {seeds} seeds and all "
        "settings. Intervals are 95 %, by a jackknife over seeds. `holds`: share of runs whose "
        "held-out loss of the posterior is below its bound. `noisy copies`: what noise on copies adds "
        "to the held-out loss of the solver, against exact copies. Along an axis: mean tau with all "
        "else fixed; granulated: the mean over axes.\n",
    ]
    for name, grid in grids.items():
        text.append(f"## {name}\n")
        if grid is None:
            text.append("Not all runs are there.\n")
            continue
        text.append(summary(grid, settings) + "\n")
        for outcome, title in OUTCOMES.items():
            text.append(f"Kendall's tau with the {title}:\n\n{correlation_table(grid, outcome)}\n")
    return "\n".join(text), {name: grid for name, grid in grids.items() if grid is not None}


def write(path: pathlib.Path) -> None:
    """Writes the pages and the picture beside the results."""
    results = json.loads(path.read_text())
    text, grids = report(results)
    write_atomically(pages.beside(path, "tables.md"), text.encode())
    if grids:
        axes = results["settings"]["axes"]
        parts = {"losses": short_summary(grids, axes), "tau": short_correlations(grids)}
        pages.fill_readme(path, parts)
        draw(grids, axes).savefig(pages.beside(path, "results.png"), dpi=110)


if __name__ == "__main__":
    pages.report(__doc__, RESULTS, write)
