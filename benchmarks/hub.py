"""Compares HUB with its two arms, its rivals and what a user would pick instead.

Every optimizer gets the same number of gradients, the same starts and mini-batches, and five trials of
its one scalar (most often a learning rate) on seeds that are not reported:

    python benchmarks/hub.py [--tasks NAME ...] [--arms NAME ...] [--theta celo=PATH] [--data DIR]

Seeds and trials run in one vmapped call. Each finished task and arm is written to
benchmarks/results/hub.json at once and not repeated; `benchmarks/hub_report.py` turns it into tables
and plots.
"""

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import hub_tasks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

import lohp_jax as lj
from lohp_jax.files import write_atomically
from lohp_jax.runs import environment

RESULTS = pathlib.Path(__file__).parent / "results" / "hub.json"
NUM_TRIALS = 5
NUM_RECORDS = 50
MEASURED_SECONDS = 0.5
"""A run is timed again until all have lasted this long; the fastest counts."""
_WEIGHTS = (0.1, 0.25, 0.5, 0.75, 0.9)

Make = Callable[[jax.Array, int], optax.GradientTransformation]


class Arm(NamedTuple):
    """One optimizer.

    Attributes:
      make: `(scalar, num_steps) -> optimizer`; the scalar is what is tuned.
      scalars: the five values tried; one where there is nothing to tune.
      gradients: gradients of one step.
      read: parameters to be judged, from the optimizer's state and those it was handed.
    """

    make: Make
    scalars: tuple[float, ...]
    gradients: int = 1
    read: Callable[[optax.OptState, Any], Any] = lambda state, params: params


def alone(task: hub_tasks.Task) -> dict[str, Arm]:
    """What a user would pick without a learned optimizer."""
    rates = task.rates
    return {
        "hand": Arm(lambda rate, _: task.hand(rate), rates),
        "hand_default": Arm(lambda rate, _: task.hand(rate), (1e-3,)),
        "hand_cosine": Arm(
            lambda rate, n: task.hand(optax.cosine_decay_schedule(rate, n)),
            rates,
        ),
        "adamw": Arm(lambda rate, _: optax.adamw(rate), rates),
        "schedule_free_adamw": Arm(
            lambda rate, n: optax.contrib.schedule_free_adamw(rate, warmup_steps=n // 20),
            rates,
            read=optax.contrib.schedule_free_eval_params,
        ),
        "prodigy": Arm(lambda rate, _: optax.contrib.prodigy(rate), (0.1, 0.3, 1.0, 3.0, 10.0)),
        "muon": Arm(lambda rate, _: optax.contrib.muon(rate), rates),
    }


def with_learned(task: hub_tasks.Task, learned: Callable[[int], Any]) -> dict[str, Arm]:
    """The learned optimizer alone, and every way to put it together with the hand-designed one."""

    def both(combine, *options, **kinds) -> Make:
        return lambda rate, n: combine(task.hand(rate), learned(n), *options, **kinds)

    rates = task.rates
    default = task.hand(rates[NUM_TRIALS // 2])
    return {
        "alone": Arm(lambda _, n: learned(n), (1.0,)),
        "lgl2o_race": Arm(both(lj.lgl2o, mode="race", num_steps=10), rates, gradients=2),
        "lgl2o_candidate": Arm(both(lj.lgl2o, mode="candidate"), rates),
        "increase_steps": Arm(lambda _, n: lj.increase_steps(learned, n), (1.0,)),
        "min_loss_reinit": Arm(lambda _, n: lj.min_loss_reinit(learned(n)), (1.0,)),
        "constant_1_over_K": Arm(both(lj.constant_blend, "size"), rates),
        "constant_half": Arm(both(lj.constant_blend, 0.5), rates),
        "constant_best": Arm(
            lambda weight, n: lj.constant_blend(default, learned(n), weight), _WEIGHTS
        ),
        "graft": Arm(both(lj.graft), rates),
        "hub_vanilla": Arm(both(lj.hub, mode="vanilla"), rates),
        "hub_invert": Arm(both(lj.hub, mode="invert"), rates),
        "hub_clipped": Arm(both(lj.hub, mode="vanilla", clip=(0.1, 0.9)), rates),
        "hub_trust": Arm(both(lj.hub, mode="trust"), rates),
        "hub_spike": Arm(both(lj.hub, mode="spike"), rates),
        "hub_online": Arm(both(lj.hub, mode="online"), rates),
    }


def train(task: hub_tasks.Task, arm: Arm, scalar: jax.Array, key: jax.Array) -> jax.Array:
    """One run: `[NUM_RECORDS + 1]` scores; `jax.vmap` over scalars and keys gives many."""
    family, num_steps = task.family, task.num_steps // arm.gradients
    data_key, init_key, loss_key = jax.random.split(key, 3)
    data, params = family.sample(data_key), family.init(init_key)
    optimizer = optax.with_extra_args_support(arm.make(scalar, num_steps))
    if task.clip is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(task.clip), optimizer)

    def step(carry, step_key):
        params, state = carry

        def loss_fn(params):
            return family.loss(params, data, step_key)

        value, gradient = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(
            gradient,
            state,
            params,
            value=value,
            value_fn=loss_fn,
            grad_fn=lambda params, _: jax.grad(loss_fn)(params),
        )
        return (optax.apply_updates(params, updates), state), None

    def judge(carry):
        params, state = carry
        if task.clip is not None:
            state = state[1]
        return family.evaluate(arm.read(state, params), data)[task.metric]

    def segment(carry, keys):
        carry, _ = jax.lax.scan(step, carry, keys)
        return carry, judge(carry)

    start = params, optimizer.init(params)
    keys = jax.random.split(loss_key, (NUM_RECORDS, num_steps // NUM_RECORDS))
    _, scores = jax.lax.scan(segment, start, keys)
    return jnp.append(judge(start), scores)


def compare(task: hub_tasks.Task, arm: Arm, num_seeds: int) -> dict:
    """Tunes an arm on seeds of its own, then runs it with the winner."""
    runs = jax.jit(jax.vmap(lambda scalar, key: train(task, arm, scalar, key)))
    keys = jax.random.split(jax.random.key(0), num_seeds)
    began = time.perf_counter()
    runs = runs.lower(jnp.zeros(num_seeds), keys).compile()
    compile_seconds = time.perf_counter() - began
    best, trials = tune(runs, arm.scalars, num_seeds, task.metric)
    seconds: list[float] = []
    while sum(seconds) < MEASURED_SECONDS:
        began = time.perf_counter()
        scores = jax.block_until_ready(runs(jnp.full(num_seeds, best), keys))
        seconds.append(time.perf_counter() - began)
    return {
        "scalar": best,
        "trials": trials,
        "gradients_per_step": arm.gradients,
        "steps": task.num_steps // arm.gradients,
        "compile_seconds": round(compile_seconds, 2),
        "seconds": float(f"{min(seconds):.3g}"),
        "scores": [_rounded(row) for row in np.asarray(scores)],
    }


def tune(
    runs: Callable, scalars: tuple[float, ...], num_seeds: int, metric: str
) -> tuple[float, dict[str, list]]:
    """The scalar of the least mean cost on seeds of its own, and the scores of each."""
    if len(scalars) == 1:
        return scalars[0], {}
    repeats = num_seeds // len(scalars)
    keys = jax.random.split(jax.random.key(1), repeats)
    scores = runs(jnp.repeat(jnp.float32(scalars), repeats), jnp.tile(keys, len(scalars)))
    final = np.asarray(scores[:, -1], np.float64).reshape(len(scalars), repeats)
    cost = np.where(np.isfinite(final), hub_tasks.cost_of(metric)(final), np.inf).mean(1)
    trials = {f"{scalar:g}": _rounded(row) for scalar, row in zip(scalars, final, strict=True)}
    return scalars[int(np.argmin(cost))], trials


def _rounded(values: Iterable[float]) -> list[float | None]:
    """Four significant digits, None for what is not finite."""
    return [float(f"{v:.4g}") if np.isfinite(v) else None for v in values]


def learned_rules(thetas: dict[str, str]) -> dict[str, Callable[[int], Any]]:
    """The learned optimizers: what ships, and Celo's or VeLO's published weights where given."""
    rules = {"celo": lj.celo, "velo": lj.velo}
    loaded = {name: lj.load_theta(path) for name, path in thetas.items()}
    return {"small": lambda n: lj.pretrained_optimizer("small", n)} | {
        name: lambda n, name=name: rules[name](loaded[name], n) for name in loaded
    }


def main() -> None:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=hub_tasks.TASKS)
    parser.add_argument("--arms", nargs="+", help="only these, e.g. hand celo/hub_trust")
    parser.add_argument("--theta", nargs="*", default=[], metavar="RULE=PATH")
    parser.add_argument("--data", type=pathlib.Path, help="folder of data sets that do not ship")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    rules = learned_rules(dict(pair.split("=", 1) for pair in arguments.theta))
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    possible = [t for t in hub_tasks.TASKS if arguments.data or t not in hub_tasks.NEEDS_DATA]
    for name in arguments.tasks or possible:
        task = hub_tasks.TASKS[name](arguments.data)
        arms = alone(task)
        for rule, learned in rules.items():
            arms |= {f"{rule}/{arm}": it for arm, it in with_learned(task, learned).items()}
        arms["small/alone_tuned"] = Arm(
            lambda rate, n: lj.pretrained_optimizer("small", n, learning_rate=rate), task.rates
        )
        found = results.setdefault(name, {"arms": {}})
        found |= {"metric": task.metric, "num_steps": task.num_steps, "environment": environment()}
        for arm in arguments.arms or arms:
            if arm in found["arms"]:
                continue
            found["arms"][arm] = row = compare(task, arms[arm], task.num_seeds)
            write_atomically(arguments.results, (json.dumps(results) + "\n").encode())
            final = [scores[-1] for scores in row["scores"]]
            print(name, arm, f"{row['scalar']:g}", sorted(final, key=lambda x: (x is None, x)))


if __name__ == "__main__":
    sys.exit(main())
