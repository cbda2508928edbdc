"""Committed pages are what the committed results give, and scripts fill them without harm."""

import importlib
import json
import pathlib
import shutil
import sys

import pytest

from benchmarks import pages

FOLDER = pathlib.Path(pages.__file__).parent
SLOW = ("hub", "diffl2o_pac_bayes")  # thousands of resamples
QUICK = (
    "lohp",
    "sine",
    "trajectories",
    "learned_step",
    "pretrained",
    "diffl2o",
    "diffl2o_ablations",
    "diffl2o_guidance",
    "size",
    "feedback",
    "quadratics",
    "partitions",
    "omniglot",
    "domains",
)


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_pages_come_from_their_results_byte_for_byte(name, tmp_path):
    committed = {path.name: path.read_bytes() for path in (FOLDER / name).glob("*.md")}
    assert "README.md" in committed
    for path in (FOLDER / name).glob("*.json"):
        shutil.copy(path, tmp_path)
    emptied = pages.fill(committed["README.md"].decode(), dict.fromkeys(places(name), "nothing"))
    (tmp_path / "README.md").write_text(emptied)
    importlib.import_module(f"benchmarks.{name}.report").write(tmp_path / "results.json")
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.md")} == committed


def places(name):
    lines = (FOLDER / name / "README.md").read_text().splitlines()
    found = [line[5:-4] for line in lines if line.startswith("<!-- ") and line != "<!-- end -->"]
    assert found
    return found


def test_a_table_goes_where_its_name_stands():
    page = "one\n<!-- a -->\nold\n<!-- end -->\ntwo\n<!-- b -->\n<!-- end -->\n"
    filled = pages.fill(page, {"a": "| 1 \\d |", "b": "| 2 |"})
    assert filled == (
        "one\n<!-- a -->\n\n| 1 \\d |\n\n<!-- end -->\ntwo\n<!-- b -->\n\n| 2 |\n\n<!-- end -->\n"
    )
    assert pages.fill(filled, {"a": "| 1 \\d |"}) == filled


@pytest.mark.parametrize("page", ["", "<!-- a -->\n<!-- end -->\n" * 2])
def test_a_page_without_the_place_or_with_two_is_refused(page):
    with pytest.raises(ValueError, match="fill: expected one '<!-- a -->'"):
        pages.fill(page, {"a": "table"})


@pytest.mark.parametrize(
    "results, tables",
    [
        ("results.json", "tables.md"),
        ("results_quick.json", "tables_quick.md"),
        ("x.json", "tables_x.md"),
    ],
)
def test_a_short_try_overwrites_nothing(results, tables):
    assert pages.beside(pathlib.Path("a") / results, "tables.md") == pathlib.Path("a") / tables


def test_files_are_merged_before_pages_are_made(tmp_path, monkeypatch):
    paths = [tmp_path / "results.json", tmp_path / "more.json"]
    for path, content in zip(paths, ({"a": 1}, {"b": 2}), strict=True):
        path.write_text(json.dumps(content))
    argv = ["report", "--results", str(paths[0]), "--merge", str(paths[1])]
    monkeypatch.setattr(sys, "argv", argv)
    made = []
    pages.report("Doc.", FOLDER / "no.json", made.append, dict.update)
    assert made == [paths[0]]
    assert json.loads(paths[0].read_text()) == {"a": 1, "b": 2}
