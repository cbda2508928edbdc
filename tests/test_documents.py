"""What README.md and docstrings show runs as it is pasted."""

import doctest
import importlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_readme_is_short_and_shows_something():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150
    assert len(SNIPPETS) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_snippet_of_the_readme_runs_as_pasted(snippet):
    exec(compile(snippet, "README.md", "exec"), {})


@pytest.mark.parametrize(
    "module",
    [
        pytest.param("lohp_jax.fitting", marks=pytest.mark.slow),
        "lohp_jax.methods.lohp",
        "lohp_jax.tasks.domains",
        "lohp_jax.data.text",
    ],
)
def test_examples_in_docstrings_hold(module):
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0 and results.failed == 0
