"""LASSO by the thousand: instances per second to one gap, against a loop of scikit-learn's solver."""

import functools
import statistics
import time
import warnings

import jax
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso

from benchmarks.diffl2o.methods import METHODS
from benchmarks.diffl2o.sets import ProblemSet, make_set

GAP = 1e-3
"""Mean relative gap that every solver is set to reach."""
COUNTS = (1, 100, 10_000)
BUDGETS = (10, 14, 20, 28, 40, 56, 80, 112, 160, 224, 320)
TOLERANCES = tuple(10.0**e for e in np.arange(-1.0, -6.5, -0.5))
ROUNDS = 3
SOLVERS = ("fista_restart", "coordinate_descent", "lista", "regression_unrolled", "diffusion")
_NUM_TUNING = 100


def compare(quick: bool) -> list[dict]:
    """Sets every solver to the least effort that reaches the gap, then times all in turn.

    Returns: a row for each solver and number of instances, with `times_scikit_learn`, the median over
      rounds and their range.
    """
    base = make_set("lasso25x50_0.1", None)
    tuning = _drawn(base, _NUM_TUNING, seed=1)
    tolerance = _least(TOLERANCES, lambda tol: tuning.gaps(_scikit_learn(tuning, tol)).mean())
    solvers = {}
    for name in SOLVERS:
        method = METHODS[name]
        params = method.train and method.train(base, jax.random.key(0), quick)
        run = functools.partial(_run, method, params)
        budget = _least(BUDGETS, lambda b, run=run: tuning.gaps(run(tuning, b)()).mean())
        print(name, "budget", budget, flush=True)
        if budget is not None:
            solvers[name] = budget, run
    rows = []
    for count in COUNTS[: 2 if quick else 3]:
        problems = _drawn(base, count, seed=2)
        calls = {"scikit_learn": lambda problems=problems: _scikit_learn(problems, tolerance)}
        calls |= {name: run(problems, budget) for name, (budget, run) in solvers.items()}
        effort = {"scikit_learn": tolerance} | {name: b for name, (b, _) in solvers.items()}
        rows += _rows(problems, count, calls, effort)
    return rows


def _rows(problems: ProblemSet, count: int, calls: dict, effort: dict) -> list[dict]:
    gaps = {name: problems.gaps(call()) for name, call in calls.items()}  # a warm-up, too
    seconds = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    rows = []
    for name, spent in seconds.items():
        ratios = [a / b for a, b in zip(seconds["scikit_learn"], spent, strict=True)]
        rows.append(
            {
                "solver": name,
                "num_instances": count,
                "effort": effort[name],
                "gap_mean": float(f"{gaps[name].mean():.3g}"),
                "instances_per_second": float(f"{count / statistics.median(spent):.4g}"),
                "times_scikit_learn": float(f"{statistics.median(ratios):.4g}"),
                "range": [float(f"{ratio:.4g}") for ratio in (min(ratios), max(ratios))],
            }
        )
        print(rows[-1], flush=True)
    return rows


def _least(options, gap_of):
    """The first option whose gap is small enough; None without one."""
    return next((option for option in options if gap_of(option) <= GAP), None)


def _drawn(base: ProblemSet, count: int, seed: int) -> ProblemSet:
    """New instances, solved by the label solver, whose duality gap is certified to 1e-6."""
    keys = jax.random.split(jax.random.key(seed), count)

    @jax.jit
    def draw(keys):
        problems = jax.vmap(lambda key: base.family.sample(key, "held_out"))(keys)
        return problems, jax.lax.map(
            lambda item: base.family.solve(*item), (problems, keys), batch_size=100
        )

    problems, points = jax.device_get(draw(keys))
    new = base._replace(problems=problems, optimum=np.ones(count))
    return new._replace(optimum=new.gaps(points) + 1.0)


def _run(method, params, problems: ProblemSet, budget: int):
    """A compiled call that solves all instances at once and gives their points."""
    keys = jax.random.split(jax.random.key(0), len(problems.optimum))
    solve = method.solve(problems, budget)
    run = jax.jit(jax.vmap(lambda params, p, key: solve(params, p, key).x, (None, 0, 0)))
    arrays = jax.device_put(problems.problems)
    return lambda: np.asarray(run(params, arrays, keys))


def _scikit_learn(problems: ProblemSet, tolerance: float) -> np.ndarray:
    points = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for matrix, b, penalty in zip(
            *(problems.problems[k] for k in ("A", "b", "penalty")), strict=True
        ):
            model = Lasso(
                float(penalty) / len(b), fit_intercept=False, tol=tolerance, max_iter=10**5
            )
            points.append(model.fit(matrix, b).coef_)
    return np.array(points)
