"""Reads the files of a run directory; what does not fit is named by file, line and key."""

import math
import pathlib
import types
from typing import Any

import numpy as np

from lohp_jax.files import read_json


def read_results(directory: pathlib.Path) -> dict[str, Any]:
    """The results of a run directory; says how to make them if there are none."""
    file = directory / "results.json"
    if not file.exists():
        raise FileNotFoundError(
            f"write_report: no results in {directory}: there is no {file}. Make them with "
            f"`lohp evaluate --out {directory}`."
        )
    return read_json(file)


def field(mapping: Any, key: str, where: str, kind: type | types.UnionType = object) -> Any:
    """The value at `key`; ValueError if it is absent or not of that kind."""
    if not isinstance(mapping, dict) or key not in mapping:
        raise ValueError(f"write_report: {where} lacks the key {key!r}.")
    if not isinstance(mapping[key], kind):
        name = kind.__name__ if isinstance(kind, type) else str(kind)
        raise ValueError(
            f"write_report: expected a {name} at {key!r} of {where}, got {mapping[key]!r}."
        )
    return mapping[key]


def choice(mapping: Any, key: str, where: str, among: tuple[str, ...]) -> str:
    """The word at `key`; ValueError if it is absent or none of `among`."""
    value = field(mapping, key, where)
    if value not in among:
        raise ValueError(
            f"write_report: expected one of {', '.join(among)} at {key!r} of {where}, got {value!r}."
        )
    return value


def section(mapping: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """The object at `key`; empty if it is absent or null."""
    return {} if mapping.get(key) is None else field(mapping, key, where, dict)


def number(mapping: dict[str, Any], key: str, where: str) -> float:
    """The number at `key`; NaN if it is absent, null or not finite."""
    value = mapping.get(key)
    if value is None:
        return math.nan
    if not isinstance(value, int | float):
        raise ValueError(f"write_report: expected a number at {key!r} of {where}, got {value!r}.")
    return float(value) if math.isfinite(value) else math.nan


def array(mapping: Any, key: str, where: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """The numbers at `key` as float64, null as NaN; None in `shape` stands for any length."""
    value = field(mapping, key, where)
    try:
        array = np.asarray(value, np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"write_report: {key!r} of {where} is no array: {error}.") from error
    if array.size == 0 and None in shape:
        return np.zeros([length or 0 for length in shape])
    if array.ndim != len(shape) or any(
        wanted not in (None, got) for wanted, got in zip(shape, array.shape, strict=True)
    ):
        raise ValueError(
            f"write_report: expected {key!r} of {where} to have shape {shape}, got {array.shape}."
        )
    return array
