"""Diff-L2O and its rivals: how each is trained, and what it does on one problem."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.diffl2o.classic import (
    LEARNED_STEPS,
    Answer,
    Method,
    cma_es,
    from_centre,
    from_init,
    from_start,
    has_wells,
    is_lasso,
    many_starts,
    solve_adam,
    trace_answer,
    tune_adam,
)
from benchmarks.diffl2o.sets import ProblemSet
from lohp_jax.diffusion.config import DiffusionConfig
from lohp_jax.diffusion.guidance import GuidanceConfig, gradient_calls
from lohp_jax.diffusion.training import train_diffusion
from lohp_jax.learned_solvers.lista import train_lista
from lohp_jax.learned_solvers.recurrent import run_learned_solver, train_learned_solver
from lohp_jax.learned_solvers.regression import train_regression
from lohp_jax.networks.denoiser import POWER_STEPS, DenoiserConfig
from lohp_jax.solvers.descent import lbfgs
from lohp_jax.solvers.multistart import gaussian_starts
from lohp_jax.solvers.newton import damped_newton
from lohp_jax.solvers.proximal import coordinate_descent, fista
from lohp_jax.solvers.refine import refine
from lohp_jax.solvers.trace import objective_of

NEWTON_STEPS = 20
LAYERS = 10
"""Of LISTA."""
ROUNDS, MOST_EVALUATIONS = 4, 4
"""Pairs of products in an evaluation of the denoiser for LASSO, and evaluations."""
DEEP = 2 * ROUNDS
"""Pairs of a deep one, which is evaluated half as often."""
SAMPLER_STEPS = 10
EIGENVALUE, POWER_ITERATION = "eigenvalue", f"{POWER_STEPS + 1} pairs"


def _train_lista(problem_set: ProblemSet, key: jax.Array, quick: bool):
    form = "matrices" if problem_set.one_matrix else "steps"
    rate, updates = (3e-3, 30_000) if problem_set.one_matrix else (1e-2, 1000)
    size = {"updates": 2, "batch_size": 4} if quick else {"updates": updates}
    return train_lista(
        problem_set.training, key, form=form, num_layers=LAYERS, learning_rate=rate, **size
    )


def _solve_lista(problem_set: ProblemSet, budget: int):
    def run(generator, problem, key):
        x = generator.apply(generator.params, problem)
        return _refined(problem_set, problem, x, budget - LAYERS, LAYERS, 1)

    return run


def _refined(problem_set, problem, x, num_steps, pairs, network_calls) -> Answer:
    """FISTA with restarts for what is left of a budget."""
    family = problem_set.family
    runner = functools.partial(fista, family, problem, restart=True)
    result = refine(objective_of(family, problem), x, runner, num_steps)
    calls = result.gradient_calls + pairs
    return Answer(result.x, result.objective_calls, calls, network_calls)


LASSO_CONFIG = DiffusionConfig(
    network=DenoiserConfig("lasso", width=32, depth=ROUNDS),
    gap_unit="optimum",
    pool=8192,
    batch_size=128,
    updates=3000,
    learning_rate=3e-3,
    ema=0.99,
)
DEEP_CONFIG = dataclasses.replace(
    LASSO_CONFIG, network=DenoiserConfig("lasso", width=32, depth=DEEP)
)
DENSE_CONFIG = dataclasses.replace(
    LASSO_CONFIG, network=DenoiserConfig(width=256), learning_rate=1e-3
)
WELLS_CONFIG = DiffusionConfig(
    network=DenoiserConfig(width=128), pool=8192, batch_size=256, updates=3000, ema=0.995, alpha=0.9
)


def _config_of(config: DiffusionConfig, quick: bool, **changes: Any) -> DiffusionConfig:
    small = {"updates": 2, "pool": 16, "batch_size": 4} if quick else {}
    return dataclasses.replace(config, **small, **changes)


def _train_with(train, config):
    return lambda problem_set, key, quick: train(
        problem_set.training, _config_of(config, quick), key
    )


def _solve_regression(problem_set: ProblemSet, budget: int):
    """The network at once, then all of the budget for FISTA, or Newton's method beside other starts."""

    def run(generator, problem, key):
        x = generator.apply(generator.params, problem)
        if problem_set.kind == "lasso":
            return _refined(problem_set, problem, x, budget, 0, 1)
        more = gaussian_starts(problem_set.family, problem, key, budget - 1)
        return _polished(problem_set, problem, jnp.concatenate([x[None], more]), 0, 1)

    return run


def _solve_unrolled(problem_set: ProblemSet, budget: int):
    pairs = DEEP + 1

    def run(generator, problem, key):
        x = generator.apply(generator.params, problem)
        return _refined(problem_set, problem, x, budget - pairs, pairs, 1)

    return run


def _solve_diffusion_lasso(problem_set: ProblemSet, budget: int, rounds: int = ROUNDS):
    """A few evaluations from z = 0 (the minimum is one), then FISTA; one pair more is for A^T b."""
    evaluations = min((budget - 1) // rounds, MOST_EVALUATIONS * ROUNDS // rounds)
    pairs = evaluations * rounds + 1

    def run(generator, problem, key):
        x = generator.apply(generator.params, problem, key, temperature=0.0, num_steps=evaluations)
        return _refined(problem_set, problem, x, budget - pairs, pairs, evaluations)

    return run


def _polished(problem_set, problem, points, gradients, network_calls, *, features=True) -> Answer:
    """Newton's method from each of `[K, n]` points; features of shifted families are n values of f."""
    family = problem_set.family
    runner = functools.partial(damped_newton, family, problem)
    result = refine(objective_of(family, problem), points, runner, NEWTON_STEPS)
    values = len(problem["shift"]) if features and "shift" in problem else 0
    return Answer(
        result.x,
        result.objective_calls + values,
        result.gradient_calls + gradients,
        network_calls,
    )


def _diffusion_of(*parts: str, steps: int = SAMPLER_STEPS) -> Method:
    guidance = GuidanceConfig(parts)

    def train(problem_set, key, quick):
        config = _config_of(WELLS_CONFIG, quick, guidance=guidance)
        return train_diffusion(problem_set.training, config, key)

    def solve(problem_set, budget):
        gradients = gradient_calls(guidance, steps, budget)

        def run(generator, problem, key):
            def propose(key):
                return generator.apply(generator.params, problem, key, num_steps=steps)

            points = jax.vmap(propose)(jax.random.split(key, budget))
            seen = "parameters" in parts
            calls = budget * steps
            return _polished(problem_set, problem, points, gradients, calls, features=seen)

        return run

    return Method(solve, train, has_wells)


def _learned(kind: str) -> Method:
    def train(problem_set, key, quick):
        size = {"updates": 1000, "batch_size": 32}
        if quick:
            size = {"updates": 2, "batch_size": 2, "num_steps": 2, "window": 2}
        starts = "frame" if problem_set.kind == "wells" else "start"
        return train_learned_solver(problem_set.training, kind, key, starts=starts, **size)

    def options(params, budget):
        return {"kind": kind, "params": params}

    def solve(problem_set, budget):
        if problem_set.kind == "wells":
            return many_starts(run_learned_solver, LEARNED_STEPS, options=options)(
                problem_set, budget
            )

        def run(params, problem, key):
            x0, family = problem_set.family.start(problem), problem_set.family
            trace = run_learned_solver(family, problem, x0, budget, kind=kind, params=params)
            return trace_answer(trace, budget)

        return run

    return Method(solve, train, set_up=EIGENVALUE if kind == "l2o_pa" else "")


def _centre_of_as_many_gradients(problem_set: ProblemSet, budget: int):
    """Newton's method without a network, from as many more starts as smoothed guidance costs."""
    n = jax.eval_shape(problem_set.family.init, jax.random.key(0)).size
    guided = gradient_calls(GuidanceConfig(("smoothed_gradient",)), SAMPLER_STEPS, budget)
    starts = budget + guided // (NEWTON_STEPS * (1 + n))  # a Hessian is n products
    return many_starts(damped_newton, NEWTON_STEPS, draw=from_centre)(problem_set, starts)


def _one_matrix(problem_set: ProblemSet) -> bool:
    return problem_set.one_matrix


METHODS: dict[str, Method] = {
    "fista": Method(from_start(fista), serves=is_lasso, set_up=EIGENVALUE),
    "fista_restart": Method(from_start(fista, restart=True), serves=is_lasso, set_up=EIGENVALUE),
    "coordinate_descent": Method(from_start(coordinate_descent), serves=is_lasso),
    "lista": Method(_solve_lista, _train_lista, is_lasso, set_up=EIGENVALUE),
    "regression": Method(
        _solve_regression,
        _train_with(train_regression, DENSE_CONFIG),
        _one_matrix,
        set_up=EIGENVALUE,
    ),
    "regression_unrolled": Method(
        _solve_unrolled,
        _train_with(train_regression, DEEP_CONFIG),
        is_lasso,
        set_up=f"{POWER_ITERATION}, {EIGENVALUE}",
    ),
    "diffusion": Method(
        _solve_diffusion_lasso,
        _train_with(train_diffusion, LASSO_CONFIG),
        is_lasso,
        set_up=f"{POWER_ITERATION}, {EIGENVALUE}",
    ),
    "diffusion_deep": Method(
        functools.partial(_solve_diffusion_lasso, rounds=DEEP),
        _train_with(train_diffusion, DEEP_CONFIG),
        is_lasso,
        set_up=f"{POWER_ITERATION}, {EIGENVALUE}",
    ),
    "multistart_newton": Method(
        many_starts(damped_newton, NEWTON_STEPS, draw=from_init), serves=has_wells, random=True
    ),
    "frame_newton": Method(many_starts(damped_newton, NEWTON_STEPS), serves=has_wells, random=True),
    "centre_newton": Method(
        many_starts(damped_newton, NEWTON_STEPS, draw=from_centre), serves=has_wells, random=True
    ),
    "centre_newton_more": Method(_centre_of_as_many_gradients, serves=has_wells, random=True),
    "multistart_lbfgs": Method(
        many_starts(lbfgs, NEWTON_STEPS, draw=from_init), serves=has_wells, random=True
    ),
    "frame_lbfgs": Method(many_starts(lbfgs, NEWTON_STEPS), serves=has_wells, random=True),
    "cma": Method(cma_es, serves=has_wells, random=True, on_host=True),
    "regression_newton": Method(
        _solve_regression, _train_with(train_regression, WELLS_CONFIG), has_wells
    ),
    "diffusion_parameters": _diffusion_of("parameters"),
    "diffusion_gradient": _diffusion_of("gradient"),
    "diffusion_smoothed": _diffusion_of("smoothed_gradient"),
    "diffusion_both": _diffusion_of("parameters", "smoothed_gradient"),
    "adam": Method(solve_adam, tune_adam),
    "l2o_dm": _learned("l2o_dm"),
    "rnnprop": _learned("rnnprop"),
    "l2o_pa": _learned("l2o_pa"),
}
