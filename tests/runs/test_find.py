import sys
import textwrap

import pytest

from lohp_jax.runs.find import find_family
from lohp_jax.types import TaskFamily

FAMILY = """
    import types
    from lohp_jax.types import TaskFamily

    def parts(*_):
        return 0

    family = TaskFamily(parts, parts, parts, parts, parts, name="mine")
    group = types.SimpleNamespace(inner=family, number=3)

    def make(size=3):
        return family

    def needs(size):
        return family

    def wrong():
        return [1, 2]

    def fails():
        return {}["absent"]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory, with a file and a package."""
    monkeypatch.chdir(tmp_path)
    modules, path = set(sys.modules), list(sys.path)
    write(tmp_path / "mine.py", FAMILY)
    write(tmp_path / "found_package" / "__init__.py", "")
    write(tmp_path / "found_package" / "inside.py", FAMILY)
    yield tmp_path
    assert sys.path == path
    for name in set(sys.modules) - modules:
        if "found_package" in name or name.startswith(("helper_of", "_family_in")):
            del sys.modules[name]


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(textwrap.dedent(text))


@pytest.mark.parametrize("attribute", ["family", "make", "group.inner"])
@pytest.mark.parametrize("source", ["mine.py", "./found_package/inside.py", "found_package.inside"])
def test_a_family_is_found(source, attribute):
    found = find_family(f"{source}:{attribute}")
    assert isinstance(found, TaskFamily) and found.name == "mine"


def test_a_file_is_found_by_its_whole_path_and_read_anew(folder, monkeypatch):
    monkeypatch.chdir("/")
    assert find_family(f"{folder}/mine.py:family").name == "mine"
    write(folder / "mine.py", FAMILY.replace('"mine"', '"new name"'))
    assert find_family(f"{folder}/mine.py:family").name == "new name"


def test_a_file_imports_what_lies_beside_it_and_defines_dataclasses(folder):
    write(folder / "sub" / "helper_of_it.py", FAMILY)
    text = """
        from __future__ import annotations
        import dataclasses
        from helper_of_it import family

        @dataclasses.dataclass
        class Config:
            size: int = 3
    """
    write(folder / "sub" / "it.py", text)
    assert find_family("sub/it.py:family").name == "mine"


@pytest.mark.parametrize(
    "where, message",
    [
        (
            "mine.py",
            "expected 'package.module:attribute' or 'path/to/file.py:attribute', got 'mine.py'",
        ),
        ("mine.py:", "expected 'package.module:attribute'"),
        (":family", "expected 'package.module:attribute'"),
        ("mein.py:family", "there is no file 'mein.py' in .*; did you mean 'mine.py'"),
        ("no/mine.py:family", "no file 'no/mine.py' in .*; there is no folder 'no' either"),
        ("absent.module:family", "there is no module 'absent', neither installed nor in"),
        ("found_package.absent:family", "there is no module 'found_package.absent'"),
        ("mine.py:famly", "'mine.py' has no attribute 'famly'; did you mean 'family'"),
        ("mine.py:group.outer", "'mine.py:group' has no attribute 'outer'; did you mean '"),
        ("mine.py:group.number", "to be a TaskFamily, or a function .*, got int 3"),
        ("mine.py:wrong", r"got a function that returns list \[1, 2\]"),
        ("mine.py:needs", "got a function that needs arguments .*'size'"),
        ("mine.py:fails", r"calling 'mine.py:fails' failed, KeyError: 'absent' .*mine.py, line 21"),
    ],
)
def test_what_is_wrong_is_said(where, message):
    with pytest.raises(ValueError, match=f"find: .*{message}"):
        find_family(where)


@pytest.mark.parametrize(
    "text, message",
    [
        ("a = 1\nb = a / 0\n", r"ZeroDivisionError: division by zero \(.*bad.py, line 2\)"),
        ("def f(:\n", r"SyntaxError: .* \(.*bad.py, line 1\)"),
        ("\nimport absent_library\n", r"No module named 'absent_library' \(.*bad.py, line 2\)"),
        ("raise SystemExit(3)\n", r"SystemExit: 3 \(.*bad.py, line 1\)"),
        ("import numpy as np\nnp.zeros(-1)\n", r"ValueError: .* \(.*bad.py, line 2\)"),
    ],
)
def test_an_import_that_fails_names_the_error_and_its_line(folder, text, message):
    write(folder / "found_package" / "bad.py", text)
    for where in ("found_package/bad.py:family", "found_package.bad:family"):
        with pytest.raises(ValueError, match=f"find: importing .* failed, .*{message}") as caught:
            find_family(where)
        assert caught.value.__cause__ is not None
    assert "_family_in_bad" not in sys.modules
