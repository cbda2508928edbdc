"""Imports run one way, and importing the package stays light."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

LAYERS = [
    {"version", "files", "checks"},
    {"types"},
    {"codec"},
    {"data", "optimizers", "solvers"},
    {"networks"},
    {"training"},
    {"tasks"},
    {"workloads", "problems"},
    {"trajectories"},
    {"policy"},
    {"diffusion"},
    {"methods", "learned_solvers", "baselines"},
    {"generation", "export"},
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
