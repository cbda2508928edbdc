"""Where the pages of a benchmark lie, and how the tables in them come from its results."""

import pathlib
import re

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
