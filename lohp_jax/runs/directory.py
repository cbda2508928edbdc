"""What all run directories share: the config they were made with, and the machine that filled them."""

import dataclasses
import importlib.metadata
import os
import pathlib
import platform
from typing import Any

import jax

from lohp_jax.files import first_difference, read_json, write_json
from lohp_jax.runs.config import from_json

_VERSIONS = ("lohp_jax", "jax", "jaxlib", "dm-haiku", "optax", "numpy")


def open_directory(directory: str | os.PathLike, config: Any) -> None:
    """Makes a directory for a config, a dataclass, or checks that the one that is there has the same.

    Raises: ValueError for another config (with the first field that differs) or one that does not read.
    """
    path, values = pathlib.Path(directory) / "config.json", dataclasses.asdict(config)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, values)
        return
    check_same_config(directory, dataclasses.asdict(read_config(directory, type(config))), values)


def check_same_config(directory: str | os.PathLike, stored: Any, asked: Any) -> None:
    """Raises: ValueError, if two configs differ, with the first field that does."""
    if difference := first_difference(stored, asked):
        raise ValueError(
            f"{directory} holds a run with another config: {difference}; "
            "choose another --out, or give the same options."
        )


def read_config(directory: str | os.PathLike, kind: type) -> Any:
    """The config of a run that is there, of the dataclass `kind`.

    Raises: ValueError if it does not read.
    """
    path = pathlib.Path(directory) / "config.json"
    return from_json(read_json(path), kind, str(path))


def environment() -> dict[str, Any]:
    """Versions, platform and device."""
    return {
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "cpu_cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
    }
