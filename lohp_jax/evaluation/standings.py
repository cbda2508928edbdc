"""Rows of a comparison as standings: one line per method, and the whole in one sentence."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lohp_jax.evaluation.records import choice, field, number

KINDS = ("teacher", "generator", "baseline")
"""What a method may be."""


class Measure(NamedTuple):
    """What networks are scored by, and how its values are compared and written.

    Attributes:
      name: the key of its values in rows.
      sign: 1 where higher is better, -1 where lower is.
      worst: what the score of the worst task has at the end of its key, "min" or "max".
      sides: where a better and where a worse value lies, in words.
      phrase: a sentence's words around a value.
      write: `(value, spread) -> texts` of both.
    """

    name: str
    sign: int
    worst: str
    sides: tuple[str, str]
    phrase: str
    write: Callable[[float, float], tuple[str, str]]


class Score(NamedTuple):
    """One method on one split, over its seeds; NaN stands for what the rows do not tell.

    `spread` is the standard deviation of `value` over seeds, or the standard error over tasks where
    there is one seed; `spread_of` says which.
    """

    method: str
    kind: str
    split: str
    value: float
    spread: float
    spread_of: str
    worst: float
    num_tasks: float
    gradients: float
    forward_passes: float
    latency: float
    latency_batch: float
    latency_p99: float
    latency_batch_p99: float


class Standings(NamedTuple):
    """A comparison.

    Attributes:
      family: the tasks.
      measure: what methods are scored by.
      main: the method that it is about.
      imitated: the teacher that generators imitate, if any.
      scores: the best first, unknown values last.
    """

    family: str
    measure: Measure
    main: str
    imitated: str | None
    scores: list[Score]


def decimal(value: float) -> str:
    """Three decimals."""
    return "n/a" if math.isnan(value) else f"{value:.3f}"


def integer(value: float) -> str:
    """No decimals."""
    return "n/a" if math.isnan(value) else f"{value:,.0f}"


def significant(value: float) -> str:
    """Three significant digits; all digits of a whole number below ten millions."""
    if math.isnan(value):
        return "n/a"
    if abs(value) >= 1e7:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def _decimals(value: float, spread: float) -> tuple[str, str]:
    return decimal(value), decimal(spread)


def _matched(value: float, spread: float) -> tuple[str, str]:
    """Both to as many decimals as show two digits of the smaller one."""
    if math.isnan(value) or math.isnan(spread) or spread == 0:
        return significant(value), significant(spread)
    sizes = [abs(size) for size in (value, spread) if size]
    places = 1 - math.floor(math.log10(min(sizes)))
    if places > 6 or max(sizes) >= 1e7:
        return f"{value:.3g}", f"{spread:.2g}"
    places = max(places, 0)
    return f"{value:,.{places}f}", f"{spread:,.{places}f}"


ACCURACY = Measure("accuracy", 1, "min", ("above", "below"), "{}", _decimals)
OBJECTIVE = Measure(
    "objective",
    -1,
    "max",
    ("better than", "worse than"),
    "an objective of {} (lower is better)",
    _matched,
)
_MEASURES = {measure.name: measure for measure in (ACCURACY, OBJECTIVE)}


def standings(results: dict[str, Any], where: str) -> Standings:
    """The rows of results, grouped over seeds."""
    family = str(field(results, "family", where))
    measure = _MEASURES[choice(results, "measure", where, tuple(_MEASURES))]
    main = field(results, "main", where, str)
    imitated = field(results, "imitated", where, str | None)
    scores = _scores(field(results, "rows", where, list), measure, where)
    return Standings(family, measure, main, imitated, scores)


def _scores(rows: list[Any], measure: Measure, where: str) -> list[Score]:
    groups: dict[tuple[str, str], dict[str, tuple[str, dict]]] = {}
    kinds: dict[str, str] = {}
    for i, row in enumerate(rows):
        at = f"{where}, rows[{i}]"
        field(row, measure.name, at)
        method, split, seed = (str(field(row, name, at)) for name in ("method", "split", "seed"))
        kind = choice(row, "kind", at, KINDS)
        if kinds.setdefault(method, kind) != kind:
            raise ValueError(
                f"write_report: {at} has {method} as a {kind}, but a row before it as a "
                f"{kinds[method]}; expected one kind for a method."
            )
        seeds = groups.setdefault((method, split), {})
        if seed in seeds:
            raise ValueError(
                f"write_report: {at} is a second row of {method}, split {split}, seed {seed}; "
                "expected one."
            )
        seeds[seed] = at, row
    scores = [
        _score(method, kinds[method], split, list(seeds.values()), measure)
        for (method, split), seeds in groups.items()
    ]
    return sorted(scores, key=lambda s: (math.isnan(s.value), -measure.sign * s.value))


def _score(
    method: str, kind: str, split: str, rows: list[tuple[str, dict]], measure: Measure
) -> Score:
    def column(name):
        return np.array([number(row, name, at) for at, row in rows])

    values, num_tasks = column(measure.name), column("num_tasks")
    worst = column(f"{measure.name}_{measure.worst}")
    if len(rows) > 1:
        spread, spread_of = values.std(ddof=1), f"std over {len(rows)} seeds"
    else:
        spread = column(f"{measure.name}_std")[0] / math.sqrt(num_tasks[0] or math.nan)
        spread_of = f"s.e. over {integer(num_tasks[0])} tasks"
    return Score(
        method=method,
        kind=kind,
        split=split,
        value=float(values.mean()),
        spread=float(spread),
        spread_of=spread_of,
        worst=float(measure.sign * (measure.sign * worst).min()),
        num_tasks=float(num_tasks.min()),
        gradients=float(column("gradients").mean()),
        forward_passes=float(column("forward_passes").mean()),
        latency=float(column("latency_ms_p50").mean()),
        latency_batch=float(column("latency_ms_p50_batch").mean()),
        latency_p99=float(column("latency_ms_p99").max()),
        latency_batch_p99=float(column("latency_ms_p99_batch").max()),
    )


def statement(standings: Standings) -> str:
    """The result in one sentence: the main method, the best baseline and the best teacher."""
    family, measure, main, _, _ = standings
    known = held_out(standings)
    ours = next((score for score in known if score.method == main), None)
    rival = next((s for s in known if s.method != main and s.kind != "teacher"), None)
    teacher = next((score for score in known if score.kind == "teacher"), None)
    if ours is None:
        sentence = f"There is no {measure.name} of {main} on {family}"
        if rival is not None:
            phrase = measure.phrase.format(score_text(rival, measure))
            sentence += f"; the best baseline, {rival.method}, reaches {phrase}"
    else:
        sentence = (
            f"{main} reaches {measure.phrase.format(score_text(ours, measure))} on "
            f"{integer(ours.num_tasks)} unseen tasks of {family}, {_compare(ours, rival, measure)}"
        )
    if teacher is not None:
        sentence += f"; the best teacher, {teacher.method}, reaches {score_text(teacher, measure)}"
    named = [score for score in (ours, rival, teacher) if score is not None]
    return f"{sentence} (±: {spreads(named)})." if named else f"{sentence}."


def _compare(ours: Score, rival: Score | None, measure: Measure) -> str:
    """How far `ours` is from `rival` and on which side; a lead inside the spread is called one."""
    if rival is None:
        return "with no baseline to compare it with"
    name = f"the best baseline, {rival.method} at {score_text(rival, measure)}"
    difference = abs(ours.value - rival.value)
    if difference == 0:
        return f"level with {name}"
    spread = math.hypot(ours.spread, rival.spread)
    amount = value_text(difference, measure)
    if amount == decimal(0):
        amount = "less than 0.001"
    side = measure.sides[measure.sign * (ours.value - rival.value) < 0]
    if math.isnan(spread):
        return f"{amount} {side} {name} (spread unknown)"
    reach = "beyond" if difference > spread else "within"
    of = f"the spread of the difference (± {value_text(spread, measure)})"
    return f"{amount} {side} {name}, {reach} {of}"


def spreads(scores: list[Score]) -> str:
    """What the spreads of `scores` are, in words."""
    return "; ".join(sorted({score.spread_of for score in scores}))


def held_out(standings: Standings) -> list[Score]:
    """The scores on unseen tasks whose value is known, in the same order."""
    return [s for s in standings.scores if s.split == "held_out" and not math.isnan(s.value)]


def teachers(standings: Standings) -> set[str]:
    """Names of all teachers, the imitated one among them even if it has no row."""
    found = {score.method for score in standings.scores if score.kind == "teacher"}
    return found if standings.imitated is None else found | {standings.imitated}


def value_text(value: float, measure: Measure) -> str:
    """A value alone."""
    return measure.write(value, math.nan)[0]


def score_text(score: Score, measure: Measure) -> str:
    """Value and spread."""
    if math.isnan(score.value):
        return "n/a"
    return " ± ".join(measure.write(score.value, score.spread))
