"""The family of a run: one of the table, or one of the user's own."""

import functools
import pathlib

from lohp_jax.runs.config import RunConfig
from lohp_jax.runs.find import find_family
from lohp_jax.tasks import make_family
from lohp_jax.types import TaskFamily


def family_of(config: RunConfig) -> TaskFamily:
    """The task family of a resolved config; its data are read once for all stages of a run.

    A file of the user's own is read again once it has changed.

    Raises: what `make_family` or `find_family` raise.
    """
    if ":" in config.family:
        return _found(config.family, *_version(config.family))
    return _made(config)


@functools.lru_cache(maxsize=4)
def _found(where: str, *version: object) -> TaskFamily:
    del version
    return find_family(where)


def _version(where: str) -> tuple[str, int]:
    """Which file `where` means from here, and when it was written; 0 for one that is not there."""
    path = pathlib.Path(where.rpartition(":")[0]).resolve()
    return str(path), path.stat().st_mtime_ns if path.is_file() else 0


@functools.lru_cache(maxsize=4)
def _made(config: RunConfig) -> TaskFamily:
    return make_family(config.family, seed=config.seed, **vars(config.tasks))
