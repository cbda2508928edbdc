"""The honesty report as a section of a page: numbers, and what they mean in words."""

import html
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from lohp_jax.evaluation.markup import table
from lohp_jax.evaluation.records import field, number, section
from lohp_jax.evaluation.standings import ACCURACY, OBJECTIVE, Standings, significant
from lohp_jax.evaluation.verdicts import RMS_RATIOS, TOLD, shuffled_is_chance


class _Check(NamedTuple):
    """One line of the honesty report.

    `keys` maps a key of `results.json` to the words after its number; `passed` takes the numbers in
    this order and is None where nothing is wanted.
    """

    title: str
    meaning: str
    wanted: str
    keys: dict[str, str]
    passed: Callable[..., bool] | None = None


_SHUFFLED = {
    ACCURACY.name: _Check(
        "Shuffled condition",
        "Accuracy when each task gets the weights made from another task's examples. It has to "
        "fall to chance, what is reached without a look at the examples: if it stays higher, the "
        "weights do not come from the examples.",
        "at most 0.05 above chance",
        {"shuffled": "", "chance": "chance"},
        lambda shuffled, chance: shuffled_is_chance(shuffled, chance, 1),
    ),
    OBJECTIVE.name: _Check(
        "Shuffled condition",
        "Objective when each task gets the weights made from another task's examples. It has to "
        "rise to chance, what is reached without a look at the examples: if it stays lower, the "
        "weights do not come from the examples.",
        "at most 5 % below chance",
        {"shuffled": "", "chance": "chance"},
        lambda shuffled, chance: shuffled_is_chance(shuffled, chance, -1),
    ),
}
_CHECKS = (
    _Check(
        "RMS ratio",
        "How far generated weights lie from the common start, over how far the teacher's lie (root "
        "mean square). Well below 1, the generator shrinks towards an average; above, it "
        "overshoots.",
        "{} to {}".format(*RMS_RATIOS),
        {"rms_ratio": ""},
        lambda ratio: RMS_RATIOS[0] <= ratio <= RMS_RATIOS[1],
    ),
    _Check(
        "Distance to the nearest training weights",
        "Near 0, the generator copies weights that it was trained on. How far the teacher's own "
        "weights for the same unseen tasks lie from training weights is the size to expect.",
        "no limit",
        {"nearest_training_distance": "generated", "teacher_nearest_training_distance": "teacher"},
    ),
    _Check(
        "Distance to the teacher's weights",
        "Between generated weights and those that the teacher reached on the same unseen task. "
        "Other weights may be as good.",
        "no limit",
        {"teacher_distance": ""},
    ),
)


def honesty_section(honesty: dict[str, Any], where: str, compared: Standings) -> str:
    """Verdicts in words, then the numbers: methods down, checks across.

    Numbers of checks that are not known here follow without a mark.
    """
    if not honesty:
        return "<p>Left out: results.json has no honesty report.</p>"
    return _verdicts_table(honesty, where) + _numbers_table(honesty, where, compared)


def _verdicts_table(honesty: dict[str, Any], where: str) -> str:
    """What `judge` found, of the methods that it judged; nothing where there are none."""
    rows, names = [], []
    for method in honesty:
        at = f"{where}, honesty[{method!r}]"
        found = section(field(honesty, method, f"{where}, honesty", dict), "verdicts", at)
        if found:
            names = names or list(found)
            overall = _words(field(honesty[method], "verdict", at, dict), at)
            each = (_words(field(found, name, at, dict), at) for name in names)
            rows.append([html.escape(method), overall, *each])
    head = ("Method", "Verdict", *(html.escape(name.capitalize()) for name in names))
    return f"{table(head, rows, css='verdicts')}\n<h3>Numbers</h3>\n" if rows else ""


def _words(verdict: dict[str, Any], where: str) -> str:
    """A mark, and what was found."""
    passed = field(verdict, "passed", where, bool | None)
    words = html.escape(field(verdict, "words", where, str))
    return f'<span class="{_MARKS[passed][0]}">{_MARKS[passed][1]}</span> {words}'


_MARKS = {True: ("pass", "✓"), False: ("fail", "✗"), None: ("unknown", "?")}


def _numbers_table(honesty: dict[str, Any], where: str, compared: Standings) -> str:
    checks = (_SHUFFLED[compared.measure.name], *_CHECKS)
    checked = {key for check in checks for key in check.keys}
    measured = {
        method: _measures(honesty, method, f"{where}, honesty", checked) for method in honesty
    }
    others = sorted({key for measures in measured.values() for key in measures} - checked - TOLD)
    checks += tuple(_Check(_title(key), "", "no limit", {key: ""}) for key in others)
    rows = [
        [html.escape(method), *(_marked(check, measures) for check in checks)]
        for method, measures in measured.items()
    ]
    wanted = ["<em>wanted</em>", *(check.wanted for check in checks)]
    meanings = "".join(
        f"<dt>{check.title}</dt><dd>{check.meaning}</dd>" for check in checks if check.meaning
    )
    if compared.imitated is not None:
        teacher = html.escape(compared.imitated)
        meanings += f"<dt>Teacher</dt><dd>What generators imitate: {teacher}.</dd>"
    head = ("Method", *(check.title for check in checks))
    return f"{table(head, [*rows, wanted], css='honesty')}<dl>{meanings}</dl>"


def _measures(
    honesty: dict[str, Any], method: str, where: str, checked: set[str]
) -> dict[str, float]:
    """The numbers of one method; what is text or a list is left to results.json."""
    measures = field(honesty, method, where, dict)
    return {
        key: number(measures, key, f"{where}[{method!r}]")
        for key, value in measures.items()
        if key in checked or isinstance(value, int | float)
    }


def _marked(check: _Check, measures: dict[str, float]) -> str:
    """The numbers and, where something is wanted, a mark."""
    numbers = [measures.get(key, math.nan) for key in check.keys]
    shown = "".join(
        f"<div>{significant(number)} {words}</div>"
        for number, words in zip(numbers, check.keys.values(), strict=True)
    )
    if check.passed is None:
        return shown
    if any(map(math.isnan, numbers)):
        return f'{shown}<span class="unknown">not measured</span>'
    if check.passed(*numbers):
        return f'{shown}<span class="pass">✓ pass</span>'
    return f'{shown}<span class="fail">✗ fail</span>'


def _title(key: str) -> str:
    return html.escape(key.replace("_", " ").capitalize())
