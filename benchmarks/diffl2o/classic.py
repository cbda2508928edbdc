"""Methods of the benchmark of Diff-L2O: what they are, and those that learn nothing but a rate."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.diffl2o.sets import ProblemSet
from lohp_jax.learned_solvers.recurrent import run_learned_solver
from lohp_jax.solvers.descent import run_optax
from lohp_jax.solvers.multistart import gaussian_starts, multistart

LEARNED_STEPS = 100
"""Steps of Adam and of learned solvers where there are many minima."""
RATES = tuple(10.0**e for e in (-3, -2.5, -2, -1.5, -1, -0.5, 0))


class Answer(NamedTuple):
    """What a method says of one problem, and the calls that it took.

    Attributes:
      x: `[n]`.
      objective_calls: evaluations of the objective.
      gradient_calls: of its gradient, or of a pair of products with A and A^T.
      network_calls: of a learned network.
    """

    x: jax.Array
    objective_calls: jax.Array | int
    gradient_calls: jax.Array | int
    network_calls: int = 0


class Method(NamedTuple):
    """One way to solve the problems of a set.

    Attributes:
      solve: `(set, budget) -> (params, problem, key) -> Answer`, a pure function.
      train: `(set, key, quick) -> params`; None where nothing is learned.
      serves: `(set) -> bool`.
      random: whether the key matters without training.
      set_up: what is done once per problem, apart from the calls.
      on_host: whether `solve` takes NumPy and a seed, and runs problem by problem.
    """

    solve: Callable[[ProblemSet, int], Callable[[Any, Any, Any], Answer]]
    train: Callable[[ProblemSet, jax.Array, bool], Any] | None = None
    serves: Callable[[ProblemSet], bool] = lambda problem_set: True
    random: bool = False
    set_up: str = ""
    on_host: bool = False


def is_lasso(problem_set: ProblemSet) -> bool:
    """Whether the set is of LASSOs."""
    return problem_set.kind == "lasso"


def has_wells(problem_set: ProblemSet) -> bool:
    """Whether the objectives have many minima."""
    return problem_set.kind == "wells"


def trace_answer(trace, network_calls: int = 0) -> Answer:
    """The end of a solver, with its own count of calls."""
    return Answer(trace.x, trace.objective_calls, trace.gradient_calls, network_calls)


def from_start(solver, **options):
    """A solver from the start of the family, one gradient to a step."""

    def solve(problem_set, budget):
        family = problem_set.family

        def run(params, problem, key):
            return trace_answer(solver(family, problem, family.start(problem), budget, **options))

        return run

    return solve


def many_starts(solver, num_steps, *, options=lambda params, budget: {}, draw=gaussian_starts):
    """K starts, from the frame's normal distribution unless `draw` says otherwise."""

    def solve(problem_set, budget):
        family = problem_set.family

        def run(params, problem, key):
            x0 = draw(family, problem, key, budget)
            trace = multistart(
                family, problem, x0, num_steps, solver=solver, **options(params, budget)
            )
            learned = solver is run_learned_solver
            return trace_answer(trace, budget * num_steps if learned else 0)

        return run

    return solve


def from_init(family, problem, key, num_starts):
    """`[K, n]` starts as the family draws them, whatever the problem."""
    return jax.vmap(family.init)(jax.random.split(key, num_starts))


def from_centre(family, problem, key, num_starts):
    """`[K, n]`: the centre of the frame, and starts around it; what a network adds is beyond this."""
    more = gaussian_starts(family, problem, key, num_starts - 1)
    return jnp.concatenate([family.frame(problem)[0][None], more])


def _adam(rates, budget):
    return {"optimizer": optax.adam(rates[str(budget)])}


def solve_adam(problem_set: ProblemSet, budget: int):
    """Adam at the rate of `tune_adam`."""
    if problem_set.kind == "wells":
        return many_starts(run_optax, LEARNED_STEPS, options=_adam)(problem_set, budget)

    def run(rates, problem, key):
        x0 = problem_set.family.start(problem)
        trace = run_optax(problem_set.family, problem, x0, budget, **_adam(rates, budget))
        return trace_answer(trace)

    return run


def tune_adam(problem_set: ProblemSet, key: jax.Array, quick: bool) -> dict[str, jax.Array]:
    """For each budget the rate of the least mean objective on training problems."""
    family, found = problem_set.training, {}
    problem_key, solve_key = jax.random.split(key)
    keys = jax.random.split(problem_key, 4 if quick else 64)
    problems = jax.vmap(lambda k: family.sample(k, "train"))(keys)
    for budget in problem_set.budgets:
        run = solve_adam(problem_set._replace(family=family), budget)

        @jax.jit
        def mean(rate, run=run, budget=budget):
            x = jax.vmap(lambda p, k: run({str(budget): rate}, p, k).x)(
                problems, jax.random.split(solve_key, len(keys))
            )
            return jnp.mean(jax.vmap(family.objective)(x, problems))

        values = np.array([mean(rate) for rate in RATES])
        found[str(budget)] = jnp.float32(RATES[int(np.argmin(np.nan_to_num(values, nan=np.inf)))])
    return found


def cma_es(problem_set: ProblemSet, budget: int):
    """CMA-ES from the frame; for K > 1 with up to 9 restarts of doubled populations."""
    import cma  # extra `bench`

    centre_and_scale = jax.jit(problem_set.family.frame)

    def run(problem, seed):
        p = {k: np.float64(v) for k, v in problem.items()}
        centre, scale = (np.float64(a) for a in centre_and_scale(problem))
        options = {
            "verbose": -9,
            "seed": seed + 1,
            "CMA_stds": scale,
            "maxfevals": (2_000 if budget == 1 else 20_000) * len(centre),
        }
        restarts = 0 if budget == 1 else 9
        result = cma.fmin(
            lambda x: problem_set.value(p, x), centre, 1.0, options, restarts=restarts, incpopsize=2
        )
        return Answer(np.float64(result[0]), int(result[3]), 0)

    return run
