"""The problems on which Diff-L2O and its rivals are compared, with their optima."""

import functools
import pathlib
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import numpy as np
from sklearn.linear_model import Lasso

from lohp_jax.data.patches import cosine_dictionary
from lohp_jax.problems.ackley import ackley
from lohp_jax.problems.lasso import lasso, lasso_patches
from lohp_jax.problems.rastrigin import rastrigin
from lohp_jax.types import ProblemFamily

NUM_GENERATED = 32
"""Instances of a set of which the file of known optima has none."""
PAIRS = (10, 20, 100)
"""Budgets on LASSO: products with A and A^T, in pairs."""
STARTS = (1, 64)
"""Budgets where there are many minima: proposals, K."""


class ProblemSet(NamedTuple):
    """Instances, and what learned methods train on.

    Attributes:
      kind: "lasso", whose gaps are relative, or "wells", whose gaps are not.
      family: of the instances.
      training: of the problems that learned methods see in training.
      training_name: sets of the same name share what was trained.
      problems: arrays as in the problems of `family`; an array that all share has no leading axis.
      optimum: `[N]` float64, the least known value.
      value: `(problem, x) -> scalar`, the objective in NumPy, apart from the package.
      certain: whether the optima are proven, and not only the best known.
    """

    kind: Literal["lasso", "wells"]
    family: ProblemFamily
    training: ProblemFamily
    training_name: str
    problems: dict[str, np.ndarray]
    optimum: np.ndarray
    value: Callable[[dict[str, np.ndarray], np.ndarray], float]
    certain: bool = True

    @property
    def axes(self) -> dict[str, int | None]:
        """`in_axes` of the problems for `jax.vmap`."""
        one = jax.eval_shape(self.family.sample, jax.random.key(0))
        return {k: 0 if v.ndim > one[k].ndim else None for k, v in self.problems.items()}

    @property
    def budgets(self) -> tuple[int, ...]:
        """What is varied, by kind."""
        return PAIRS if self.kind == "lasso" else STARTS

    @property
    def one_matrix(self) -> bool:
        """Whether training and instances share one A and one λ."""
        return self.family.name == self.training.name == "lasso_fixed"

    def instance(self, index: int) -> dict[str, np.ndarray]:
        """One problem."""
        axes = self.axes
        return {k: v if axes[k] is None else v[index] for k, v in self.problems.items()}

    def gaps(self, points: np.ndarray) -> np.ndarray:
        """`[N, n]` -> `[N]`: f - f*, for LASSO over f*; float64, `inf` where it is not finite."""
        values = []
        for index, x in enumerate(np.asarray(points, np.float64)):
            problem = {k: np.float64(v) for k, v in self.instance(index).items()}
            values.append(self.value(problem, x))
        gaps = np.array(values) - self.optimum
        gaps = gaps / self.optimum if self.kind == "lasso" else gaps
        return np.where(np.isfinite(gaps), gaps, np.inf)


def _lasso_value(p: dict, x: np.ndarray) -> float:
    return 0.5 * np.sum((p["A"] @ x - p["b"]) ** 2) + p["penalty"] * np.abs(x).sum()


def _rippled_value(p: dict, x: np.ndarray) -> float:
    ripples = 10 * np.sum(1 - p["c"] * np.cos(2 * np.pi * x))
    return 0.5 * np.sum((p["A"] @ x - p["b"]) ** 2) + ripples


def _rastrigin_value(p: dict, x: np.ndarray) -> float:
    z = x - p["shift"]
    return np.sum(z**2 + 10 * (1 - np.cos(2 * np.pi * z)))


def _ackley_value(p: dict, x: np.ndarray) -> float:
    z = x - p["shift"]
    valley = 20 * np.expm1(-0.2 * np.sqrt(np.mean(z**2)))
    return -valley + np.e - np.exp(np.mean(np.cos(2 * np.pi * z)))


def _lasso_set(
    rows: int,
    columns: int,
    penalty: float,
    arrays: dict[str, np.ndarray] | None,
    *,
    trained_at: tuple[int, int] | None = None,
) -> ProblemSet:
    """A LASSO; in the file with one A or with many; `trained_at` other sizes and A of their own."""
    matrix = None if arrays is None else arrays["A"]
    shared = matrix is not None and matrix.ndim == 2
    family = lasso(rows, columns, penalty=penalty, dictionary=matrix if shared else None)
    training = family if trained_at is None else lasso(*trained_at, penalty=penalty)
    sizes = trained_at or (rows, columns)
    name = f"lasso{sizes[0]}x{sizes[1]}_{penalty}" + ("_fixed" if shared and not trained_at else "")
    if arrays is None:
        return _generated_lasso(family, training, name)
    some = arrays["b"].any(axis=1)  # b = 0 has f* = 0
    problems = {
        "A": matrix if shared else matrix[some],
        "b": arrays["b"][some],
        "penalty": np.float32(penalty),
    }
    optimum = arrays[f"fstar_lam{penalty}"][some]
    return ProblemSet("lasso", family, training, name, problems, optimum, _lasso_value)


def _generated_lasso(family: ProblemFamily, training: ProblemFamily, name: str) -> ProblemSet:
    """Held-out problems, solved by scikit-learn in float64."""
    keys = jax.random.split(jax.random.key(2024), NUM_GENERATED)
    problems = jax.device_get(jax.vmap(lambda k: family.sample(k, "held_out"))(keys))
    if (problems["A"] == problems["A"][:1]).all():
        problems["A"] = problems["A"][0]
    empty = np.zeros(NUM_GENERATED)
    made = ProblemSet("lasso", family, training, name, problems, empty, _lasso_value)
    optimum = []
    for index in range(NUM_GENERATED):
        p = {k: np.float64(v) for k, v in made.instance(index).items()}
        model = Lasso(p["penalty"] / len(p["b"]), fit_intercept=False, tol=1e-13, max_iter=10**6)
        optimum.append(_lasso_value(p, model.fit(p["A"], p["b"]).coef_))
    return made._replace(optimum=np.array(optimum))


def _patches(arrays: None, *, unseen: bool) -> ProblemSet:
    """Patches of a photograph, after training on synthetic codes; 0.22 / |b| is alike in both.

    `unseen`: training sees other, random A of 25x50; otherwise the dictionary itself.
    """
    del arrays
    training, name = lasso(25, 50), "lasso25x50_0.1"
    if not unseen:
        atoms = cosine_dictionary()
        training, name = lasso(penalty=0.22, dictionary=atoms, noise=0.1), "synthetic_patches"
    return _generated_lasso(lasso_patches(penalty=0.5), training, name)


def _rippled_set(n: int, arrays: dict[str, np.ndarray] | None) -> ProblemSet:
    family, name = rastrigin(n), f"rastrigin_n{n}"
    if arrays is not None:
        problems = {k: arrays[k] for k in ("A", "b", "c")}
        certain = "certified_lower" in arrays
        optimum = arrays["fstar"]
        return ProblemSet("wells", family, family, name, problems, optimum, _rippled_value, certain)
    keys = jax.random.split(jax.random.key(2024), NUM_GENERATED)
    problems = jax.vmap(lambda k: family.sample(k, "held_out"))(keys)
    points = jax.device_get(jax.jit(jax.vmap(family.solve))(problems, keys))
    empty = ProblemSet(
        "wells", family, family, name, jax.device_get(problems), 0.0, _rippled_value, False
    )
    return empty._replace(optimum=empty.gaps(points))


def _shifted_set(function: str, n: int, arrays: dict[str, np.ndarray] | None) -> ProblemSet:
    ackleys = function == "ackley"
    family = ackley(n) if ackleys else rastrigin(n, form="shifted")
    if arrays is None:
        keys = jax.random.split(jax.random.key(2024), NUM_GENERATED)
        arrays = jax.device_get(jax.vmap(lambda k: family.sample(k, "held_out"))(keys))
    problems = {k: arrays[k] for k in ("shift", "x0")}
    optimum = np.zeros(len(arrays["shift"]))
    value = _ackley_value if ackleys else _rastrigin_value
    name = f"{function}_n{n}"
    return ProblemSet("wells", family, family, name, problems, optimum, value)


def _lassos(rows, columns, penalty, **options):
    return functools.partial(_lasso_set, rows, columns, penalty, **options)


_MAKERS: dict[str, tuple[str | None, Callable[..., ProblemSet]]] = {
    "lasso25x50_fixedA_0.1": ("lasso25x50_fixedA", _lassos(25, 50, 0.1)),
    "lasso25x50_fixedA_0.005": ("lasso25x50_fixedA", _lassos(25, 50, 0.005)),
    "lasso5x10_0.1": ("lasso5x10", _lassos(5, 10, 0.1)),
    "lasso5x10_0.005": ("lasso5x10", _lassos(5, 10, 0.005)),
    "lasso25x50_0.1": ("lasso25x50", _lassos(25, 50, 0.1)),
    "lasso25x50_0.005": ("lasso25x50", _lassos(25, 50, 0.005)),
    "lasso250x500_0.1": ("lasso250x500_fixedA", _lassos(250, 500, 0.1, trained_at=(25, 50))),
    "patches": (None, functools.partial(_patches, unseen=False)),
    "patches_unseen": (None, functools.partial(_patches, unseen=True)),
    **{
        f"rastrigin_n{n}": (f"rast_openl2o_n{n}", functools.partial(_rippled_set, n))
        for n in (2, 10, 30)
    },
    **{
        f"{function}_n{n}": (f"shifted_n{n}", functools.partial(_shifted_set, function, n))
        for function in ("rastrigin_shifted", "ackley")
        for n in (2, 10)
    },
}
SETS = tuple(_MAKERS)


def make_set(name: str, oracles: pathlib.Path | None) -> ProblemSet:
    """A set by name: of the instances with known optima where the file has them, else of generated ones.

    Args:
      name: one of `SETS`.
      oracles: an .npz file with `<set>/<array>`; None for generated instances.
    """
    prefix, make = _MAKERS[name]
    arrays = None
    if prefix is not None and oracles is not None and oracles.exists():
        with np.load(oracles) as file:
            found = [k for k in file.files if k.startswith(f"{prefix}/")]
            arrays = {k.removeprefix(f"{prefix}/"): file[k] for k in found} or None
    return make(arrays=arrays)


def sized_set(kind: Literal["lasso", "ackley"], size: int) -> ProblemSet:
    """Generated instances in any dimension: LASSO with half as many rows, each A its own, or Ackley."""
    return (
        _lasso_set(size // 2, size, 0.1, None)
        if kind == "lasso"
        else _shifted_set(kind, size, None)
    )
