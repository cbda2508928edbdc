"""Metrics as JSON lines: one object per line, appended."""

import json
import math
import os
import pathlib
from typing import Any

import numpy as np


def append_line(path: str | os.PathLike, values: dict[str, Any]) -> None:
    """Appends one object; arrays become lists, numbers that are not finite become null."""
    line = json.dumps({name: _plain(value) for name, value in values.items()}, allow_nan=False)
    with pathlib.Path(path).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def drop_lines_after(path: str | os.PathLike, method: str, step: int) -> None:
    """Removes the lines of `method` beyond `step`, left by a run that did not reach its checkpoint."""
    path = pathlib.Path(path)
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not _is_after(line, method, step)]
    if len(kept) < len(lines):
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)


def _is_after(line: str, method: str, step: int) -> bool:
    try:
        values = json.loads(line)
    except json.JSONDecodeError:  # the last line of a killed writer
        return True
    return values.get("method") == method and values.get("step", 0) > step


def _plain(value: Any) -> Any:
    if isinstance(value, str | int | None):
        return value
    array = np.asarray(value, np.float64)
    if array.ndim:
        return [_plain(float(x)) for x in array]
    return float(array) if math.isfinite(float(array)) else None
