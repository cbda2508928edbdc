"""Imports run one way, and importing the package stays light."""

import ast
import importlib.resources
import inspect
import json
import pathlib
import subprocess
import sys
import tomllib

import pytest

import lohp_jax
from lohp_jax.methods import METHODS

ROOT = pathlib.Path(__file__).parents[1]

LAYERS = [
    {"version", "files", "checks"},
    {"types"},
    {"codec"},
    {"windows"},
    {"data", "optimizers", "solvers"},
    {"networks"},
    {"training"},
    {"tasks"},
    {"workloads", "problems"},
    {"trajectories"},
    {"policy"},
    {"diffusion"},
    {"methods", "learned_solvers", "baselines"},
    {"generation"},
    {"export"},
    {"fitting"},
    {"evaluation"},
    {"runs"},
    {"cli"},
]
"""From the bottom up: a module imports its own part and what stands in the lines before."""

ONLY_MODULES = {
    "lohp_jax.policy.balance": {"jax", "chex"},
    "lohp_jax.policy.gaussian": {"jax", "chex"},
}
"""Modules that import nothing else, the standard library apart."""

HAIKU_PART = "networks"
"""The part of the package that may import Haiku."""

GROUPS = (
    *("data", "diffusion", "learned_solvers", "optimizers"),
    *("policy", "problems", "solvers", "workloads"),
)
HEAVY = ("tensorflow_datasets", "matplotlib", "tyro", "sklearn", "safetensors", "orbax")


def imported(source, module):
    """Absolute names of what a module imports, anywhere in it, relative imports resolved."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            parent = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{parent}.{alias.name}" for alias in node.names}
    return names


def part_of(name):
    """The part of the package that a name belongs to; None for other packages."""
    package, _, rest = name.partition(".")
    return rest.partition(".")[0] if package == "lohp_jax" else None


def layer_of(part):
    for height, parts in enumerate(LAYERS):
        if part in parts:
            return height
    raise AssertionError(f"lohp_jax.{part} has no place in LAYERS; give it one, as in design.md.")


def wrong_imports(module, source):
    """What a module must not import."""
    names, own = imported(source, module), part_of(module)
    parts = {name: part_of(name) for name in names if part_of(name) is not None}
    wrong = [
        name for name, part in parts.items() if part != own and layer_of(part) >= layer_of(own)
    ]
    roots = {name: name.partition(".")[0] for name in names}
    if module in ONLY_MODULES:
        allowed = ONLY_MODULES[module] | sys.stdlib_module_names
        wrong += [name for name, root in roots.items() if root not in allowed]
    if own != HAIKU_PART:
        wrong += [name for name, root in roots.items() if root == "haiku"]
    return sorted(wrong)


def modules():
    for path in sorted((ROOT / "lohp_jax").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name != "lohp_jax":  # the public names, from all layers
            yield pytest.param(name, path.read_text(), id=name)


@pytest.mark.parametrize("module, source", list(modules()))
def test_imports_run_one_way(module, source):
    assert wrong_imports(module, source) == []


@pytest.mark.parametrize(
    "module, source, wrong",
    [
        (
            "tasks.n_way",
            "from lohp_jax.trajectories.store import Store",
            ["trajectories.store.Store"],
        ),
        ("tasks.n_way", "def f():\n    import lohp_jax.cli", ["cli"]),
        ("networks.denoiser", "from lohp_jax.solvers.proximal import soft_threshold", []),
        ("networks.denoiser", "from lohp_jax.diffusion import schedule", ["diffusion.schedule"]),
        ("data.digits", "from lohp_jax.optimizers import sam", ["optimizers.sam"]),
        ("training.engine", "from lohp_jax import methods", ["methods"]),
        ("training.engine", "from ..methods import lohp", ["methods.lohp"]),
        ("policy.hybrid", "from . import unet\nfrom lohp_jax.codec import Codec", []),
        ("baselines.cloning", "from lohp_jax.policy import gaussian", []),
        ("policy.hybrid", "from lohp_jax.baselines import cloning", ["baselines.cloning"]),
        ("types", "from lohp_jax.version import __version__", []),
    ],
)
def test_a_wrong_import_is_found(module, source, wrong):
    assert wrong_imports(f"lohp_jax.{module}", source) == [f"lohp_jax.{name}" for name in wrong]


@pytest.mark.parametrize(
    "module, source, wrong",
    [
        ("policy.balance", "import jax.numpy as jnp\nimport chex\nfrom typing import Any", []),
        ("policy.balance", "import numpy as np", ["numpy"]),
        ("policy.gaussian", "from lohp_jax.codec import Codec", ["lohp_jax.codec.Codec"]),
        ("policy.hybrid", "def f():\n    import haiku as hk", ["haiku"]),
        ("networks.unet", "import haiku as hk", []),
        ("learned_solvers.recurrent", "import haiku as hk", ["haiku"]),
    ],
)
def test_a_wrong_library_is_found(module, source, wrong):
    assert wrong_imports(f"lohp_jax.{module}", source) == wrong


def test_a_part_without_a_place_is_found():
    with pytest.raises(AssertionError, match=r"lohp_jax\.extra has no place"):
        wrong_imports("lohp_jax.extra.module", "import lohp_jax.types")


def test_import_is_light():
    code = "import json, sys, lohp_jax; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert {"lohp_jax", "jax", "haiku", "optax"} <= loaded
    assert not loaded.intersection(HEAVY)


def module_graph():
    """Each module of the package and the modules of the package that it imports at any time."""
    sources = {param.id: param.values[1] for param in modules()}

    def module_of(name):
        while name not in sources and "." in name:
            name = name.rpartition(".")[0]
        return name

    found = {
        name: {module_of(n) for n in imported(source, name)} for name, source in sources.items()
    }
    return {name: (found[name] & sources.keys()) - {name} for name in sources}


def circle(graph):
    """The names of one circle, in its order; [] if there is none."""
    done = set()

    def visit(name, path):
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        found = next((f for n in sorted(graph[name]) if (f := visit(n, [*path, name]))), [])
        done.add(name)
        return found

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def test_no_modules_import_each_other():
    graph = module_graph()
    assert "lohp_jax.types" in graph["lohp_jax.methods.lohp"]
    assert circle(graph) == []


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


# --- methods are values


def compared_names(source, names):
    """Lines in which a string of `names` is compared, matched, or a key of a dict."""
    lines = set()

    def note(node):
        for inner in ast.walk(node):
            if isinstance(inner, ast.Constant) and inner.value in names:
                lines.add(inner.lineno)

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            note(node)
        elif isinstance(node, ast.MatchValue):
            note(node.value)
        elif isinstance(node, ast.Dict):
            for key in node.keys:
                if isinstance(key, ast.Constant):
                    note(key)
        elif isinstance(node, ast.Subscript):
            note(node.slice)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in (
            *("startswith", "endswith", "get", "fullmatch", "match"),
        ):
            note(node)
    return sorted(lines)


def knows_the_table(module):
    return part_of(module) in ("runs", "cli") or module == "lohp_jax.methods"


@pytest.mark.parametrize("module, source", list(modules()))
def test_no_code_asks_for_the_name_of_a_method(module, source):
    if not knows_the_table(module):
        assert compared_names(source, METHODS.keys()) == []


@pytest.mark.parametrize(
    "source, lines",
    [
        ('if method == "lohp":\n    pass', [1]),
        ('if method.name in ("cloning", "lohp"):\n    pass', [1]),
        ('if "lo_di" != name:\n    pass', [1]),
        ('x = name.startswith("lohp")', [1]),
        ('match name:\n    case "lo_op":\n        pass', [2]),
        ('losses = {"cloning": 1,\n  "other": 2}', [1]),
        ('losses["cloning"]', [1]),
        ('method = Method("cloning", bind=bind)\nx = a == "clone"', []),
    ],
)
def test_a_question_for_the_name_of_a_method_is_found(source, lines):
    assert compared_names(source, METHODS.keys()) == lines


# --- functions of a readable length

LONGEST = 60
"""Lines from the first to the last, docstring included."""


def lengths(source):
    """Lines of every function."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, functions)]
    return {node.name: node.end_lineno - node.lineno for node in found}


@pytest.mark.parametrize("module, source", list(modules()))
def test_functions_stay_short(module, source):
    assert {name: n for name, n in lengths(source).items() if n > LONGEST} == {}


# --- names


def test_public_names_are_there_once():
    names = lohp_jax.__all__
    assert len(names) == len(set(names))
    assert [name for name in names if not hasattr(lohp_jax, name)] == []


def test_groups_offer_what_they_say():
    groups = [getattr(lohp_jax, name) for name in lohp_jax.__all__]
    groups = [group for group in groups if inspect.ismodule(group)]
    assert {group.__name__ for group in groups} == {f"lohp_jax.{name}" for name in GROUPS}
    for group in groups:
        assert group.__all__ and all(hasattr(group, name) for name in group.__all__), group


def test_an_optimizer_is_one_function_wherever_it_is_found():
    for name in ("hub", "hub_trust", "lgl2o", "sam", "velo", "celo2", "load_theta"):
        assert getattr(lohp_jax, name) is getattr(lohp_jax.optimizers, name)
        assert inspect.isfunction(getattr(lohp_jax, name))


def test_types_are_said_to_be_there():
    assert importlib.resources.files(lohp_jax).joinpath("py.typed").is_file()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "py.typed" in settings["tool"]["setuptools"]["package-data"]["lohp_jax"]
