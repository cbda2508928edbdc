"""Rows of a comparison as standings: one line per method, and the whole in one sentence."""

import math
from typing import Any, NamedTuple

import numpy as np

from lohp_jax.evaluation.records import field, number


class Score(NamedTuple):
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


def standings(rows: list[Any], where: str) -> list[Score]:
    """Rows grouped over seeds, the most accurate first, unknown accuracies last."""
    groups: dict[tuple[str, str], dict[str, tuple[str, dict]]] = {}
    for i, row in enumerate(rows):
        at = f"{where}, rows[{i}]"
        field(row, "accuracy", at)
        method, split, seed = (str(field(row, name, at)) for name in ("method", "split", "seed"))
        seeds = groups.setdefault((method, split), {})
        if seed in seeds:
            raise ValueError(
                f"write_report: {at} is a second row of {method}, split {split}, seed {seed}; "
                "expected one."
            )
        seeds[seed] = at, row
    scores = [_score(*group, list(seeds.values())) for group, seeds in groups.items()]
    return sorted(scores, key=lambda score: (math.isnan(score.accuracy), -score.accuracy))


def _score(method: str, split: str, rows: list[tuple[str, dict]]) -> Score:
    def column(name):
        return np.array([number(row, name, at) for at, row in rows])

    accuracy, num_tasks = column("accuracy"), column("num_tasks")
    if len(rows) > 1:
        spread, spread_of = accuracy.std(ddof=1), f"std over {len(rows)} seeds"
    else:
        spread = column("accuracy_std")[0] / math.sqrt(num_tasks[0] or math.nan)
        spread_of = f"s.e. over {integer(num_tasks[0])} tasks"
    return Score(
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


def statement(family: str, scores: list[Score]) -> str:
    """The result in one sentence: `lohp` against the best baseline, with the teacher beside it."""
    known = held_out(scores)
    ours = next((score for score in known if score.method == "lohp"), None)
    rival = next((score for score in known if _is_baseline(score)), None)
    teacher = next((score for score in known if is_teacher(score)), None)
    if ours is None:
        sentence = f"There is no accuracy of lohp on {family}"
        if rival is not None:
            sentence += f"; the best baseline, {rival.method}, reaches {accuracy_text(rival)}"
    else:
        sentence = (
            f"lohp reaches {accuracy_text(ours)} on {integer(ours.num_tasks)} unseen tasks of "
            f"{family}, {_compare(ours, rival)}"
        )
    if teacher is not None:
        sentence += f"; the best teacher, {teacher.method}, reaches {accuracy_text(teacher)}"
    named = [score for score in (ours, rival, teacher) if score is not None]
    return f"{sentence} (±: {kinds(named)})." if named else f"{sentence}."


def _compare(ours: Score, rival: Score | None) -> str:
    """How far `ours` is above or below `rival`; a lead inside the spread is called one."""
    if rival is None:
        return "with no baseline to compare it with"
    difference = ours.accuracy - rival.accuracy
    name = f"the best baseline, {rival.method} at {accuracy_text(rival)}"
    if difference == 0:
        return f"level with {name}"
    amount = "less than 0.001" if abs(difference) < 0.0005 else f"{abs(difference):.3f}"
    side = "above" if difference > 0 else "below"
    spread = math.hypot(ours.spread, rival.spread)
    if math.isnan(spread):
        return f"{amount} {side} {name} (spread unknown)"
    reach = "beyond" if abs(difference) > spread else "within"
    return f"{amount} {side} {name}, {reach} the spread of the difference (± {spread:.3f})"


def kinds(scores: list[Score]) -> str:
    """What the spreads of `scores` are, in words."""
    return "; ".join(sorted({score.spread_of for score in scores}))


def held_out(scores: list[Score]) -> list[Score]:
    """Those on unseen tasks whose accuracy is known, in the same order."""
    return [s for s in scores if s.split == "held_out" and not math.isnan(s.accuracy)]


def is_teacher(score: Score) -> bool:
    """Whether a row is that of a teacher."""
    return score.method.startswith("teacher_")


def _is_baseline(score: Score) -> bool:
    return not score.method.startswith(("teacher_", "lohp"))


def decimal(value: float) -> str:
    """Three decimals."""
    return "n/a" if math.isnan(value) else f"{value:.3f}"


def integer(value: float) -> str:
    """No decimals."""
    return "n/a" if math.isnan(value) else f"{value:,.0f}"


def significant(value: float) -> str:
    """Three significant digits, at most."""
    if math.isnan(value):
        return "n/a"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def accuracy_text(score: Score) -> str:
    """Accuracy and spread."""
    if math.isnan(score.accuracy):
        return "n/a"
    return f"{score.accuracy:.3f} ± {decimal(score.spread)}"
