"""Metrics as JSON lines: one object per line, appended."""

import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from lohp_jax.files import read_json_lines

_LEAST_PROGRESS = 0.1


def append_line(path: str | os.PathLike, values: dict[str, Any]) -> dict[str, Any]:
    """Appends one object; arrays become lists, numbers that are not finite become null.

    Returns: the object as it will be read.
    """
    plain = {name: _plain(value) for name, value in values.items()}
    with pathlib.Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(plain, allow_nan=False) + "\n")
    return plain


def read_lines(path: str | os.PathLike, method: str) -> list[dict[str, Any]]:
    """The objects of one method, in order; none where there is no file.

    Raises: ValueError for a line that is no object.
    """
    lines = read_json_lines(pathlib.Path(path))
    return [values for _, values in lines if values.get("method") == method]


def drop_lines_after(path: str | os.PathLike, method: str, step: int) -> None:
    """Removes the lines of `method` beyond `step`, left by a run that did not reach its checkpoint.

    Lines that are no JSON object, as a killed writer may leave them, go too.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if not _is_after(line, method, step)]
    if len(kept) < len(lines):
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)


def freeze_alarm(means: dict[str, Any], history: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """Whether a policy froze: its loss fell, yet its roll-out goes next to nowhere.

    What counts is the distance along the stored displacement, as a share of it: noise alone covers
    distance, too.

    Args:
      means: of the newest chunk, with `loss` and, of policies that roll out, `progress` and `cosine`.
      history: lines of the same method before it.

    Returns: `frozen`, or nothing where there is no `progress`.
    """
    if "progress" not in means:
        return {}
    fell = bool(history) and bool(means["loss"] < history[0]["loss"])
    along = means["progress"] * means["cosine"]
    return {"frozen": fell and bool(along < _LEAST_PROGRESS)}


def _is_after(line: str, method: str, step: int) -> bool:
    try:
        values = json.loads(line)
    except json.JSONDecodeError:
        return True
    if not isinstance(values, dict):
        return True
    return values.get("method") == method and values.get("step", 0) > step


def _plain(value: Any) -> Any:
    if isinstance(value, str | int | None):
        return value
    array = np.asarray(value, np.float64)
    if array.ndim:
        return [_plain(float(x)) for x in array]
    return float(array) if math.isfinite(float(array)) else None
