"""Costs of HUB and its rivals, and how an arm stands over many tasks.

A run that ends with anything not finite, or above its start, costs what its start does and has failed.
So has one that goes less than half of the way, in logarithms, from its start to the cost of the tuned
hand-designed arm. Costs are interquartile means over seeds.
"""

from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from benchmarks.hub import tasks as hub_tasks

TOLERANCE = 1.02
POINTS = 0.005
"""Of accuracy, that count as no difference."""
NUM_RESAMPLES = 2000


class Cell(NamedTuple):
    """An arm on a task.

    Attributes:
      costs: `[seeds]` at the end.
      curves: `[seeds, records + 1]`.
      failed: `[seeds]` bool.
      floor: costs below it are not told apart.
      slack: difference of costs that is none.
      mean: interquartile mean of the costs.
      interval: its 95 % bootstrap interval.
      clock: time of a gradient over that of the hand-designed arm, nan where it has not been measured.
      row: what the benchmark wrote.
    """

    costs: np.ndarray
    curves: np.ndarray
    failed: np.ndarray
    floor: float
    slack: float
    mean: float
    interval: tuple[float, float]
    clock: float
    row: dict[str, Any]


def iqm(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Mean of the middle half."""
    return scipy.stats.trim_mean(values, 0.25, axis=axis)


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the interquartile mean over the first axis."""
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    found = scipy.stats.bootstrap(
        (values,), iqm, n_resamples=NUM_RESAMPLES, method="percentile", rng=0, vectorized=True
    )
    return tuple(map(float, found.confidence_interval))


def read_costs(row: dict[str, Any], metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Costs along the runs, `[seeds, records + 1]`, those that count at the end, and which are lost."""
    curves = hub_tasks.cost_of(metric)(np.array(row["scores"], float))  # None becomes nan
    loss = np.array(row["final"]["loss"], float)
    start = curves[:, :1]
    curves = np.where(np.isfinite(curves), curves, start)
    lost = ~np.isfinite(loss) | (curves[:, -1] > start[:, 0])
    return curves, np.where(lost, start[:, 0], curves[:, -1]), lost


def read_cells(results: dict[str, Any]) -> dict[str, dict[str, Cell]]:
    """Cells by task and arm."""
    cells = {}
    for task, found in results.items():
        accuracy = found["metric"] == "accuracy"
        read = {arm: read_costs(row, found["metric"]) for arm, row in found["arms"].items()}
        hand = iqm(read["hand"][1])
        cells[task] = {}
        for arm, row in found["arms"].items():
            curves, costs, lost = read[arm]
            cells[task][arm] = Cell(
                costs=costs,
                curves=curves,
                failed=lost | (costs > np.sqrt(curves[:, 0] * hand)),
                floor=0.5 / found["num_query"] if accuracy else 1e-12,
                slack=POINTS if accuracy else 0.0,
                mean=float(iqm(costs)),
                interval=bootstrap(costs),
                clock=row.get("times_hand", np.nan),
                row=row,
            )
    return cells


class Standing(NamedTuple):
    """An arm over all its tasks; ratios are of its cost to that of the tuned hand-designed arm.

    Attributes:
      ratio: geometric mean over tasks of the ratio of interquartile means.
      interval: its 95 % bootstrap interval over seeds, the same for both arms, for each task apart.
      worst: the largest ratio of a task.
      within: tasks on which the arm keeps up with the better of its two arms.
      tasks: all of them.
      failed: failed runs.
      runs: all of them.
    """

    ratio: float
    interval: tuple[float, float]
    worst: float
    within: int
    tasks: int
    failed: int
    runs: int


def stand(tasks: dict[str, dict[str, Cell]], arm: str, learned: str) -> Standing:
    """Puts an arm beside the tuned hand-designed one and the learned one on tasks that have all."""
    pairs = [(row[arm], row["hand"]) for row in tasks.values()]
    every = np.array([log_ratio(cell, hand) for cell, hand in pairs])
    rng = np.random.default_rng(0)
    means = np.mean(
        [
            log_ratio(
                *pair, rng.integers(len(pair[0].costs), size=(len(pair[0].costs), NUM_RESAMPLES))
            )
            for pair in pairs
        ],
        axis=0,
    )
    return Standing(
        ratio=float(np.exp(every.mean())),
        interval=tuple(np.exp(np.quantile(means, [0.025, 0.975])).tolist()),
        worst=float(np.exp(every.max())),
        within=sum(keeps_up(row, arm, learned) for row in tasks.values()),
        tasks=len(tasks),
        failed=sum(int(cell.failed.sum()) for cell, _ in pairs),
        runs=sum(len(cell.failed) for cell, _ in pairs),
    )


def log_ratio(cell: Cell, other: Cell, seeds: Any = slice(None)) -> np.ndarray:
    """Of interquartile means over the seeds given."""
    costs = [np.maximum(iqm(c.costs[seeds]), c.floor) for c in (cell, other)]
    return np.log(costs[0] / costs[1])


def keeps_up(row: dict[str, Cell], arm: str, learned: str) -> bool:
    """Whether an arm is at most 2 %, or half a point of accuracy, worse than the better of its two."""
    best = min(row["hand"].mean, row[learned].mean)
    return row[arm].mean <= TOLERANCE * best + row[arm].slack


def tells_apart(row: dict[str, Cell], rule: str) -> bool:
    """Whether the hand-designed arm learns, and any two arms with a rule differ by the tolerance."""
    means = [cell.mean for arm, cell in row.items() if arm.split("/")[0] in ("hand", rule)]
    learns = row["hand"].failed.mean() < 0.5
    return learns and max(means) > TOLERANCE * min(means) + row["hand"].slack
