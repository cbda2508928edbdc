"""Verdicts in words on the numbers of `honesty`, and the thresholds behind them.

Where a number is compared task by task, one side has to win more tasks than a fair coin would: a share
beyond 1/2 + 1/sqrt(R) of R tasks, two standard errors. This asks for no unit, and holds for an accuracy
and an objective alike.
"""

import math
from typing import Any, NamedTuple

import numpy as np

RMS_RATIOS = (0.8, 1.2)
"""Wanted of the distance from theta_0 over that of the teacher (this project's specification)."""
ABOVE_CHANCE = 0.05
"""How far above chance an accuracy under a shuffled condition may stay, and, as a share of chance, how
far below it an objective may (ours; the specification asks for chance)."""
LEAST_SPREAD = 0.05
"""Of the spread of generated weights over tasks, in units of their size, over that of the teacher's:
below it a task moves less than 1/400 of the variance that it moves in the teacher's weights (ours)."""
COPY_DISTANCE = 0.1
"""Of the distance to the nearest training weights, over that of the teacher's weights for the same
unseen tasks: below it weights are copies (ours)."""
SAME_ERRORS = 0.9
"""|A and B| / |A or B| of the errors of a generated and a training network above which they are one
network (ours; the measure is that of Zeng et al., 2025)."""
CONSTANT_SHARE = 0.05
"""Of the tasks on which a network may give all examples one label (ours)."""
TOLD = frozenset(
    (
        *("non_finite", "num_tasks", "constant_predictions", "chance_wins", "shuffled_wins"),
        *("spread_ratio", "noise_wins", "average_wins"),
    )
)
"""Numbers that the words of the verdicts tell."""


class Verdict(NamedTuple):
    """What a check found; `passed` is None where it could not be measured."""

    passed: bool | None
    words: str


def win_share(one: np.ndarray, other: np.ndarray, sign: int) -> float:
    """Share of tasks on which the scores `one` `[R]` are better than `other`; a tie counts half.

    What is not finite is worse than all else. `sign` is 1 where higher is better, -1 where lower is.
    """
    one, other = (np.where(np.isfinite(x), sign * x, -np.inf) for x in (one, other))
    return float(np.mean((one > other) + 0.5 * (one == other)))


def wins(share: float, num_tasks: int) -> bool:
    """Whether a `win_share` of so many tasks is more than luck."""
    return share > 0.5 + 1 / math.sqrt(num_tasks)


def shuffled_is_chance(shuffled: float, chance: float, sign: int) -> bool:
    """Whether a score under a shuffled condition is no better than chance."""
    if sign > 0:
        return shuffled <= chance + ABOVE_CHANCE
    return shuffled >= chance - ABOVE_CHANCE * abs(chance)


def judge(measures: dict[str, Any], sign: int) -> dict[str, Any]:
    """Verdicts on the numbers of `honesty`.

    Args:
      measures: of `honesty`.
      sign: 1 for an accuracy, -1 for an objective.

    Returns: `verdicts`, for "degenerate", "context", "collapse", "memory" and "size" a dict of `passed`
      (null where it could not be measured) and `words`; and `verdict`, the same over all.
    """
    found = {
        "degenerate": _degenerate(measures),
        "context": _context(measures, sign),
        "collapse": _collapse(measures),
        "memory": _memory(measures),
        "size": _size(measures),
    }
    failed = [name for name, verdict in found.items() if verdict.passed is False]
    unknown = [name for name, verdict in found.items() if verdict.passed is None]
    if failed:
        words = f"Fails {len(failed)} of {len(found)} checks: {', '.join(failed)}."
    else:
        words = f"Nothing found against it in {len(found) - len(unknown)} of {len(found)} checks."
    if unknown:
        words += f" Not measured: {', '.join(unknown)}."
    overall = Verdict(False if failed else None if unknown else True, words)
    return {
        "verdicts": {name: verdict._asdict() for name, verdict in found.items()},
        "verdict": overall._asdict(),
    }


def _degenerate(measures: dict[str, Any]) -> Verdict:
    if measures["non_finite"] > 0:
        share = _percent(measures["non_finite"])
        return Verdict(False, f"Degenerate: weights or scores are not finite on {share} of tasks.")
    constant = measures.get("constant_predictions")
    if constant is not None and constant > CONSTANT_SHARE:
        return Verdict(
            False, f"Degenerate: one label for all examples on {_percent(constant)} of tasks."
        )
    said = "" if constant is None else f", one label for all on {_percent(constant)} of tasks"
    if "chance_wins" not in measures:
        return Verdict(None if constant is None else True, f"All weights are finite{said}.")
    share = measures["chance_wins"]
    if not wins(share, measures["num_tasks"]):
        return Verdict(
            False,
            "Degenerate: no better than a prediction that sees no input, which it beats on "
            f"{_percent(share)} of tasks.",
        )
    return Verdict(
        True, f"Alive: finite{said}, better than a constant answer on {_percent(share)} of tasks."
    )


def _context(measures: dict[str, Any], sign: int) -> Verdict:
    if "shuffled_wins" not in measures:
        return _NOT_FINITE
    share, shuffled = measures["shuffled_wins"], measures["shuffled"]
    if not wins(share, measures["num_tasks"]):
        return Verdict(
            False,
            f"Ignores its context: better with it than with another task's on {_percent(share)} of "
            "tasks only.",
        )
    if "chance" not in measures:
        return Verdict(
            True,
            f"Uses its context: better with it on {_percent(share)} of tasks; chance is unknown.",
        )
    chance = measures["chance"]
    if not shuffled_is_chance(shuffled, chance, sign):
        return Verdict(
            False,
            f"Does not need its context: with another task's it still scores {shuffled:.3g}, where "
            f"chance is {chance:.3g}.",
        )
    return Verdict(
        True,
        f"Uses its context: better with it on {_percent(share)} of tasks, and with another task's it "
        f"falls to {shuffled:.3g}, where chance is {chance:.3g}.",
    )


def _collapse(measures: dict[str, Any]) -> Verdict:
    if (ratio := measures.get("spread_ratio")) is None:
        return _NOT_FINITE
    words = (
        f"for their size, weights differ {ratio:.2g} times as much between tasks as the teacher's."
    )
    if ratio < LEAST_SPREAD:
        return Verdict(False, f"Collapsed: {words}")
    return Verdict(True, f"Not collapsed: {words}")


def _memory(measures: dict[str, Any]) -> Verdict:
    if "noise_wins" not in measures:
        return Verdict(None, "Not measured: no finite training and generated weights to compare.")
    distance = measures["nearest_training_distance"]
    share_of = distance / max(measures["teacher_nearest_training_distance"], 1e-30)
    same = measures["error_overlap"].get("generated")
    if share_of < COPY_DISTANCE or (same is not None and same > SAME_ERRORS):
        errors = "" if same is None else f" and share {_percent(same)} of their errors"
        return Verdict(
            False,
            f"A memory: weights lie {share_of:.2g} times as far from training weights as the teacher's "
            f"for the same unseen tasks{errors}.",
        )
    noise, average = measures["noise_wins"], measures["average_wins"]
    beside = (
        f"a training network with noise on {_percent(noise)} of tasks, and the mean of the nearest ones "
        f"on {_percent(average)}"
    )
    if not wins(min(noise, average), measures["num_tasks"]):
        return Verdict(
            False, f"No more than training weights: it beats {beside}, which may be luck."
        )
    return Verdict(
        True,
        f"Not a memory: {share_of:.2g} times as far from training weights as the teacher's; beats "
        f"{beside}.",
    )


def _size(measures: dict[str, Any]) -> Verdict:
    if (ratio := measures.get("rms_ratio")) is None:
        return _NOT_FINITE
    low, high = RMS_RATIOS
    words = f"weights lie {ratio:.2g} times as far from the start as the teacher's."
    if ratio < low:
        return Verdict(False, f"Timid: {words}")
    if ratio > high:
        return Verdict(False, f"Overshoots: {words}")
    return Verdict(True, f"Of the right size: {words}")


_NOT_FINITE = Verdict(None, "Not measured: fewer than two tasks with finite weights and scores.")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
