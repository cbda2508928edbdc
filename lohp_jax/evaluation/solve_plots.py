"""The plots of a run of Diff-L2O, as SVG files beside its results."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.diffusion.guidance import gradients_at
from lohp_jax.diffusion.schedule import Schedule, alpha_sigma
from lohp_jax.evaluation.plots import STYLE, make_axes, to_svg
from lohp_jax.files import write_atomically
from lohp_jax.solvers.trace import objective_of
from lohp_jax.types import Generator, ProblemFamily, PyTree

_OURS, _RIVAL, _BASELINE = "#0072b2", "#e69f00", "#333333"
_FLOOR = 1e-8  # of a gap that is drawn
_SAMPLES = 5000
_PATHS = 8
_PROBES = 16


def draw_solve_plots(
    directory: pathlib.Path,
    family: ProblemFamily,
    generator: Generator,
    problems: PyTree,
    curves: dict[str, Any],
    key: jax.Array,
    *,
    gap: str,
) -> list[pathlib.Path]:
    """Writes convergence.svg and guidance.svg and, in two dimensions, distribution.svg and paths.svg.

    Args:
      directory: of the run.
      family: the problems.
      generator: of solutions.
      problems: with a leading axis.
      curves: of `convergence`.
      key: of the samples.
      gap: what gaps are, "relative" or "absolute".

    Returns: the files.

    Raises: OSError if the disk is full.
    """
    import matplotlib.style  # here, for a light `import lohp_jax`

    first = jax.tree.map(lambda leaf: leaf[0], problems)
    size = jax.eval_shape(family.start, first).size
    drawings: dict[str, Callable[[], Any]] = {
        "convergence": functools.partial(draw_convergence, curves, gap),
        "guidance": functools.partial(
            draw_guidance, family, generator.config.schedule, problems, key
        ),
    }
    if size == 2:
        drawings["distribution"] = functools.partial(draw_distribution, family, generator, key)
        drawings["paths"] = functools.partial(draw_paths, family, generator, first, key)
    files = []
    for name, draw in drawings.items():
        with matplotlib.style.context(["default", STYLE]):
            content = to_svg(draw())
        files.append(directory / f"{name}.svg")
        write_atomically(files[-1], content)
    return files


def draw_convergence(curves: dict[str, Any], gap: str) -> Any:
    """Gaps against gradients and against time, with and without the proposals.

    Args:
      curves: method -> `{"gaps": [M, steps + 1], "calls": [steps + 1], "milliseconds": [steps + 1]}`.
      gap: what gaps are.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, along, label in zip(
        axes, ("calls", "milliseconds"), ("gradients", "milliseconds of a problem"), strict=True
    ):
        for (name, curve), color in zip(curves.items(), (_OURS, _RIVAL, _BASELINE), strict=True):
            gaps = np.maximum(curve["gaps"], _FLOOR)
            with np.errstate(invalid="ignore"):  # between infinities
                low, middle, high = np.quantile(gaps, [0.25, 0.5, 0.75], axis=0)
            cost = curve[along]  # a logarithm has no place for 0
            positive = cost[cost > 0]
            cost = np.maximum(cost, positive.min() / 2 if positive.size else 1.0)
            axis.plot(cost, middle, color=color, label=name, marker=".", markersize=4)
            axis.fill_between(cost, low, high, color=color, alpha=0.15, linewidth=0)
        axis.set(xscale="log", yscale="log", xlabel=label)
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_formatter("{x:g}")
    axes[0].set_ylabel(f"{gap} gap, median and quartiles")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure


def draw_guidance(
    family: ProblemFamily, schedule: Schedule, problems: PyTree, key: jax.Array
) -> Any:
    """The Wiener weight SNR / (1 + SNR) of the gradients by noise level: what the landscape allows."""
    levels = jnp.linspace(schedule.log_snr_max, schedule.log_snr_min, 25)
    some = jax.tree.map(lambda leaf: leaf[:64], problems)
    keys = jax.random.split(key, len(jax.tree.leaves(some)[0]))

    def weights(problem, solution, key, level):
        centre, scale = family.frame(problem)
        solution = (solution - centre) / scale
        noise_key, probe_key = jax.random.split(key)
        alpha, sigma = alpha_sigma(level)
        z = alpha * solution + sigma * jax.random.normal(noise_key, solution.shape)
        found = gradients_at(
            lambda y: family.objective(centre + scale * y, problem),
            z,
            level,
            probe_key,
            parts=("gradient", "smoothed_gradient"),
            probes=_PROBES,
        )
        return jax.tree.map(jax.nn.sigmoid, found.log_snr)

    @jax.jit
    def over(some, keys, levels):
        solutions = jax.vmap(family.solve)(some, keys)
        at = functools.partial(jax.vmap(weights, (0, 0, 0, None)), some, solutions, keys)
        return jax.lax.map(at, levels)  # one after the other, for the memory

    found = over(some, keys, levels)
    figure, axes = make_axes()
    for (part, values), color in zip(sorted(found.items()), (_BASELINE, _OURS), strict=True):
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75], axis=1)
        axes.plot(levels, middle, color=color, label=part.replace("_", " "))
        axes.fill_between(levels, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel="log SNR of the noise level", ylabel="weight SNR / (1 + SNR)", ylim=(0, 1.02))
    axes.invert_xaxis()
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def draw_distribution(family: ProblemFamily, generator: Generator, key: jax.Array) -> Any:
    """Solutions of 5,000 held-out problems in their frames, and one sample for each."""
    from matplotlib.figure import Figure

    def pair(key):
        problem_key, solve_key, sample_key = jax.random.split(key, 3)
        problem = family.sample(problem_key, "held_out")
        centre, scale = family.frame(problem)
        sampled = generator.apply(generator.params, problem, sample_key, temperature=1.0)
        return (family.solve(problem, solve_key) - centre) / scale, (sampled - centre) / scale

    keys = jax.random.split(key, _SAMPLES)
    points = jax.jit(lambda keys: jax.lax.map(pair, keys, batch_size=250))(keys)
    limit = float(np.nanquantile(np.abs(points[0]), 0.995))
    figure = Figure(figsize=(8.6, 4.0), layout="constrained")
    for axis, found, title in zip(
        figure.subplots(1, 2, sharex=True, sharey=True),
        points,
        ("solutions", "samples"),
        strict=True,
    ):
        extent = (-limit, limit, -limit, limit)
        axis.hexbin(*np.asarray(found).T, gridsize=45, extent=extent, bins="log", cmap="Blues")
        axis.set(title=title, aspect="equal", xlabel="first coordinate of the frame")
        axis.grid(False)
    figure.axes[0].set_ylabel("second coordinate")
    return figure


def draw_paths(family: ProblemFamily, generator: Generator, problem: PyTree, key: jax.Array) -> Any:
    """The denoiser's guesses on the way of a few samples, over the landscape of one problem."""
    paths = jax.jit(
        jax.vmap(lambda key: generator.path(generator.params, problem, key, temperature=1.0))
    )(jax.random.split(key, _PATHS))
    solution = np.asarray(family.solve(problem, key))
    seen = np.concatenate([np.asarray(paths).reshape(-1, 2), solution[None]])
    low, high = seen.min(0), seen.max(0)
    low, high = low - 0.1 * (high - low) - 1e-3, high + 0.1 * (high - low) + 1e-3
    grid = np.stack(np.meshgrid(*np.linspace(low, high, 200).T), axis=-1)
    values = jax.jit(jax.vmap(objective_of(family, problem)))(
        jnp.asarray(grid.reshape(-1, 2), jnp.float32)
    )
    figure, axes = make_axes(4.4)
    heights = np.log1p(np.asarray(values).reshape(200, 200) - float(np.min(values)))
    axes.contourf(grid[..., 0], grid[..., 1], heights, levels=20, cmap="Greys", alpha=0.6)
    for path in np.asarray(paths):
        axes.plot(*path.T, color=_OURS, linewidth=1.0, marker=".", markersize=4)
        axes.plot(*path[-1], color=_OURS, marker="o", markersize=5)
    axes.plot(*solution, color="#d55e00", marker="*", markersize=13, linestyle="", label="solution")
    axes.set(xlabel="first coordinate of x", ylabel="second coordinate")
    axes.grid(False)
    figure.legend(loc="outside upper left")
    return figure
