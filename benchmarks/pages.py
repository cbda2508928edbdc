"""Where the pages of a benchmark lie, and how the tables in them come from its results."""

import argparse
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

from lohp_jax.files import write_atomically


def beside(results: pathlib.Path, name: str) -> pathlib.Path:
    """Path of what is made from a file of results.

    `results.json` has `tables.md` beside it, `results_quick.json` has `tables_quick.md`: a short try
    overwrites nothing that is committed.
    """
    path = results.with_name(name)
    if results.stem == "results":
        return path
    return path.with_stem(f"{path.stem}_{results.stem.removeprefix('results_')}")


def fill(page: str, parts: dict[str, str]) -> str:
    """A page with tables put in: each replaces what stands from `<!-- NAME -->` to `<!-- end -->`.

    Raises: ValueError, if the page has no such place, or several.
    """
    for name, text in parts.items():
        place = re.compile(rf"<!-- {re.escape(name)} -->\n.*?<!-- end -->", re.DOTALL)
        if (found := len(place.findall(page))) != 1:
            raise ValueError(
                f"fill: expected one '<!-- {name} -->' ... '<!-- end -->' in the page, got {found}."
            )
        filled = f"<!-- {name} -->\n\n{text.strip()}\n\n<!-- end -->"
        page = place.sub(lambda _, filled=filled: filled, page)
    return page


def fill_readme(results: pathlib.Path, parts: dict[str, str]) -> None:
    """Puts tables into the README.md beside `results.json`; other results have none."""
    path = beside(results, "README.md")
    if path.exists():
        write_atomically(path, fill(path.read_text(), parts).encode())


def report(
    doc: str,
    results: pathlib.Path,
    write: Callable[[pathlib.Path], None],
    merge: Callable[[dict[str, Any], dict[str, Any]], None] | None = None,
) -> None:
    """The command line of a script that makes pages of results.

    Args:
      doc: of the script; its first line is shown.
      results: the default file.
      write: makes the pages of the file that it gets.
      merge: takes the content of a second file into that of the first; None for a script without
        `--merge`.
    """
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--results", type=pathlib.Path, default=results)
    if merge:
        parser.add_argument(
            "--merge", type=pathlib.Path, nargs="+", help="files to be taken into --results"
        )
    arguments = parser.parse_args()
    path = arguments.results
    if merge and arguments.merge:
        found = json.loads(path.read_text()) if path.exists() else {}
        for other in arguments.merge:
            merge(found, json.loads(other.read_text()))
        write_atomically(path, (json.dumps(found) + "\n").encode())
    write(path)
