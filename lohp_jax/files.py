"""Writing files so that no reader ever meets half of one; JSON with a schema, and its differences."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import IO, Any

SCHEMA = 1
"""Version of `config.json`, `results.json` and `figures.json` of a run; the only one that is read."""

_ABSENT = object()  # stands for a field that a config lacks


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Writes a file in one step: a reader sees the old one or the new one, whole.

    Raises: OSError if the disk is full or the folder is not writable; the old file is then intact.
    """
    with writing_atomically(path) as file:
        file.write(content)


@contextlib.contextmanager
def writing_atomically(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """A file to write to that takes the place of `path` in one step, once the block ends without error.

    Raises: OSError as `write_atomically` does.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = f"{error.strerror} (what was there before is intact; see to the disk and go on)"
        raise OSError(error.errno, reason, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: pathlib.Path, values: dict[str, Any], *, schema: int = SCHEMA) -> None:
    """Writes values and the version of their layout in one step, for `read_json`.

    Raises: OSError as `write_atomically` does; TypeError for what JSON does not have.
    """
    content = json.dumps({"schema": schema, **values}, indent=1) + "\n"
    write_atomically(path, content.encode())


def read_json(path: pathlib.Path, *, schema: int = SCHEMA) -> dict[str, Any]:
    """What `write_json` wrote; the schema is checked and taken off.

    Raises: FileNotFoundError; ValueError if the file does not parse, holds no object, or is of another
      schema; nothing is deleted.
    """
    values = _parse_object(_read_text(path), path)
    if "schema" not in values:
        raise damaged(path, "it lacks 'schema'")
    found = values.pop("schema")
    if found != schema:
        raise ValueError(
            f"{path} has schema {found!r}, this version of lohp_jax reads schema {schema} only; use the "
            "version that wrote it, or start in another directory. Nothing was deleted."
        )
    return values


def read_json_lines(path: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a file of JSON lines, each with "FILE, line N"; none if there is no file.

    Raises: ValueError for a line that is no object.
    """
    lines = _read_text(path).split("\n") if path.exists() else []
    return [
        (f"{path}, line {number}", _parse_object(line, path, number))
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def damaged(path: pathlib.Path, reason: Any) -> ValueError:
    """The error for a file that does not hold what it should."""
    return ValueError(
        f"{path} is damaged ({reason}); put a copy back, or start in another directory. Nothing was "
        "deleted."
    )


def _read_text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise damaged(path, f"byte {error.start} is not UTF-8") from error


def _parse_object(text: str, path: pathlib.Path, first_line: int = 1) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {first_line + error.lineno - 1}, column {error.colno}"
        raise damaged(path, f"{place} is not JSON: {error.msg}") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise damaged(path, f"line {first_line} has a {kind} where an object was expected")
    return content


def first_difference(old: Any, new: Any, path: str = "") -> str | None:
    """The first field in which two configs differ, as a sentence with both values; None if they agree.

    Dicts are compared by key, and a key that is a path already, as `['w']` or `.w`, follows without
    another dot; tuples and lists are the same, as they are in JSON.

    Args:
      old: the config that is there.
      new: the config that is asked for.
      path: what the config is called; begins the names of its fields.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            values = old.get(name, _ABSENT), new.get(name, _ABSENT)
            separator = "." if path and not name.startswith(("[", ".")) else ""
            if found := first_difference(*values, f"{path}{separator}{name}"):
                return found
        return None
    old, new = _as_lists(old), _as_lists(new)
    return None if old == new else f"{path} is {_show(old)} there and {_show(new)} here"


def _as_lists(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_as_lists(entry) for entry in value]
    return value


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else repr(value)
