"""After how many new tasks a generator has earned back what it took to prepare and train it."""

import html
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from lohp_jax.evaluation.markup import table
from lohp_jax.evaluation.records import field
from lohp_jax.evaluation.standings import integer, significant


class Spent(NamedTuple):
    """Seconds of wall clock before the first new task, compilation included.

    Attributes:
      prepare: for the trajectories of all teachers.
      train: for the method, and what it starts from.
      compilation: that is among these.
    """

    prepare: float
    train: float
    compilation: float


def break_even(
    rows: Sequence[dict[str, Any]], measure: str, method: str, spent: Spent | None, adam: str
) -> dict[str, Any]:
    """When a generator pays, beside tuned Adam on the same support and beside its fastest equal.

    It pays against a rival after N tasks: the seconds that it took, less those that the rival's own
    training took, over the seconds that it saves on each task. It never does where it is not faster, or
    worse by more than the spread of the difference, sqrt(s_1^2 + s_2^2) of standard errors over tasks.

    Args:
      rows: of `make_row` on the same tasks, each method once; those of a rival that was trained have
        `train_seconds`.
      measure: "accuracy" or "objective".
      method: the generator.
      spent: on it; None where that is not known.
      adam: the row of tuned Adam on the support; it may be missing.

    Returns: JSON values: `prepare_seconds`, `train_seconds` and `compile_seconds`; `against`, for Adam
      and for the fastest baseline that reaches the generator's score within the spread, if there is one,
      a dict of `rival`, `saved_ms` and `saved_ms_batch` per task, `tasks` and `tasks_batch`, null for
      never, one at a time and in batches; and `words`.
    """
    by_name = {row["method"]: row for row in rows}
    own = by_name[method]
    baselines = [row for row in rows if row["kind"] == "baseline" and row is not own]
    equals = [row for row in baselines if not _is_better(own, row, measure)]
    rivals = [by_name[adam]] if adam in by_name else []
    fastest = min(equals, key=lambda row: row["latency_ms_p50"], default=None)
    if fastest is not None and fastest not in rivals:
        rivals.append(fastest)
    against = [_compare(own, rival, measure, spent) for rival in rivals]
    if spent is None:
        words = [
            "Unknown: there is no record of how long preparing and training took (metrics.jsonl)."
        ]
    elif not rivals:
        words = ["Nothing to compare with: there is no row of a baseline as good, nor of Adam."]
    else:
        words = [_told(spent), *(compared.pop("words") for compared in against)]
        if fastest is None:
            words.append("No baseline reaches its score within the spread.")
    return {
        "prepare_seconds": spent and spent.prepare,
        "train_seconds": spent and spent.train,
        "compile_seconds": spent and spent.compilation,
        "against": [] if spent is None else against,
        "words": " ".join(words),
    }


def _is_better(one: dict[str, Any], other: dict[str, Any], measure: str) -> bool:
    """Whether `one` scores better by more than the spread of the difference; NaN is never better."""
    sign = 1 if measure == "accuracy" else -1
    errors = [row[f"{measure}_std"] / math.sqrt(row["num_tasks"]) for row in (one, other)]
    if not math.isfinite(other[measure]) and math.isfinite(one[measure]):
        return True
    return sign * (one[measure] - other[measure]) > math.hypot(*errors)


def _compare(
    own: dict[str, Any], rival: dict[str, Any], measure: str, spent: Spent | None
) -> dict[str, Any]:
    saved, saved_batch = (
        rival[name] - own[name] for name in ("latency_ms_p50", "latency_ms_p50_batch")
    )
    worse, name = _is_better(rival, own, measure), rival["method"]
    cost = 0.0 if spent is None else spent.prepare + spent.train - rival.get("train_seconds", 0.0)
    tasks, tasks_batch = (
        None if worse or each <= 0 else max(0, math.ceil(1e3 * cost / each))
        for each in (saved, saved_batch)
    )
    scored = f"{measure} {own[measure]:.3g} against {rival[measure]:.3g}"
    times = (
        f"{significant(own['latency_ms_p50'])} ms against {significant(rival['latency_ms_p50'])} ms"
    )
    if worse:
        words = f"Never pays against {name}: it is worse ({scored})."
    elif tasks is None:
        better = f", though better ({scored})" if _is_better(own, rival, measure) else ""
        words = f"Never pays in time against {name}: it is not faster ({times} for a task){better}."
    else:
        words = f"Pays against {name} after {integer(tasks)} tasks ({times} for a task; {scored})."
    if not worse and tasks_batch != tasks:
        size = own.get("latency_batch_size")
        batches = "In batches" if size is None else f"In batches of {size}"
        after = "never" if tasks_batch is None else f"after {integer(tasks_batch)} tasks"
        words += f" {batches}: {after}."
    return {
        "rival": name,
        "saved_ms": saved,
        "saved_ms_batch": saved_batch,
        "tasks": tasks,
        "tasks_batch": tasks_batch,
        "words": words,
    }


def _told(spent: Spent) -> str:
    total = spent.prepare + spent.train
    return (
        f"It took {significant(total)} s before the first new task, {significant(spent.prepare)} s to "
        f"prepare and {significant(spent.train)} s to train, {significant(spent.compilation)} s of "
        "these to compile."
    )


def break_even_section(found: dict[str, Any], where: str) -> str:
    """The table of a page: methods and what `break_even` says of them."""
    if not found:
        return "<p>Left out: results.json does not say what methods took.</p>"
    rows = [
        [html.escape(method), html.escape(field(told, "words", f"{where}, {method!r}", str))]
        for method, told in found.items()
    ]
    return table(("Method", "Pays after"), rows, css="break-even")
