"""Follows optimizers down equation 6 of the HUB paper, at several rates of the hand-designed arm.

    python -m benchmarks.hub.equation_6 [--theta celo=PATH]

The function is that of the paper, λ = .01 in 1,000 dimensions; it does not say where its runs start, so
here are two: wide, x uniform in (-1, 1), and narrow, in (-1/1000, 1/1000), which is within the traps.
Nothing is tuned: all rates are reported. Writes equation_6.json; `benchmarks.hub.report` makes the
table and the picture.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.hub import run as hub_run
from benchmarks.hub import tasks as hub_tasks
from lohp_jax.files import write_atomically
from lohp_jax.runs.directory import environment
from lohp_jax.workloads.oscillating import oscillating

RESULTS = pathlib.Path(__file__).with_name("equation_6.json")
DIMENSION = 1000
WIDTHS = {"wide": 1.0, "narrow": 1.0 / DIMENSION}
RATES = {"wide": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "narrow": (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)}
NUM_STEPS, EVERY, LATE = 15000, 100, 7500
NUM_SEEDS = 10
ARMS = ("alone", "lgl2o_race", "lgl2o_candidate", "hub_vanilla", "hub_invert", "hub_trust")
PATH_START, PATH_STEPS, PATH_RATE = (0.9, -0.6), 5000, 1e-3
"""Of the picture in two dimensions."""


def task_of(start: str) -> hub_tasks.Task:
    """The function in 1,000 dimensions, from a start by its name."""
    family = oscillating(DIMENSION, width=WIDTHS[start])
    return hub_tasks.Task(family, NUM_STEPS, rates=RATES[start], num_seeds=NUM_SEEDS)


def arms_of(task: hub_tasks.Task, rules: dict) -> dict[str, hub_run.Arm]:
    """Those that are followed, by name; all take as many steps, whatever gradients they need."""
    wanted = {"hand", *(f"{rule}/{arm}" for rule in rules for arm in ARMS)}
    arms = {k: arm for k, arm in hub_run.all_arms(task, rules).items() if k in wanted}
    return {k: arm._replace(gradients=1) for k, arm in arms.items()}


def follow(task: hub_tasks.Task, arm: hub_run.Arm, rate: jax.Array, key: jax.Array) -> dict:
    """The loss of one run after every `EVERY` steps, its least and its largest between, `[segments]`."""
    loss = task.family.loss
    params = task.family.init(key)
    optimizer, step = hub_run.make_step(task, arm, rate, ())

    def one(carry, step_key):
        carry, _ = step(carry, step_key)
        return carry, loss(carry[0], (), step_key)

    def segment(carry, keys):
        carry, losses = jax.lax.scan(one, carry, keys)
        return carry, {"last": losses[-1], "least": jnp.min(losses), "most": jnp.max(losses)}

    keys = jax.random.split(key, (task.num_steps // EVERY, EVERY))
    return jax.lax.scan(segment, (params, optimizer.init(params)), keys)[1]


def describe(losses: dict[str, np.ndarray]) -> dict[str, Any]:
    """What is kept of the runs of an arm at a rate: `last`, `least` and `most` are `[seeds, segments]`.

    Returns: the median `curve` over seeds, and by seed: the loss `after` some numbers of steps, the
      `least` up to step 7,500, and the `most` from there on.
    """
    late = LATE // EVERY
    return {
        "curve": rounded(np.median(losses["last"], axis=0)),
        "after": {
            str(n): rounded(losses["last"][:, n // EVERY - 1]) for n in (1500, LATE, NUM_STEPS)
        },
        "least": rounded(losses["least"][:, :late].min(axis=1)),
        "most": rounded(losses["most"][:, late:].max(axis=1)),
    }


def rounded(values: np.ndarray) -> list[float | None]:
    """Four significant digits, None for what is not finite."""
    return [float(f"{v:.4g}") if np.isfinite(v) else None for v in values]


def run_start(start: str, rules: dict) -> dict[str, Any]:
    """All arms from one start, by arm and rate."""
    task = task_of(start)
    keys = jax.random.split(jax.random.key(0), NUM_SEEDS)
    found = {}
    for name, arm in arms_of(task, rules).items():
        runs = jax.jit(jax.vmap(lambda rate, key, arm=arm: follow(task, arm, rate, key)))
        found[name] = {}
        for rate in arm.scalars:
            losses = jax.tree.map(np.asarray, runs(jnp.full(NUM_SEEDS, rate), keys))
            found[name][f"{rate:g}"] = row = describe(losses)
            print(start, name, f"{rate:g}", {n: np.median(v) for n, v in row["after"].items()})
    return found


def run_path(rules: dict) -> dict[str, Any]:
    """Where the arms go in two dimensions from one point, every few steps, `[points, 2]`."""
    family = oscillating(len(PATH_START))
    task = hub_tasks.Task(family, PATH_STEPS, rates=(PATH_RATE,) * hub_run.NUM_TRIALS)
    params = {"x": jnp.float32(PATH_START)}
    found = {}
    for name, arm in arms_of(task, rules).items():
        optimizer, step = hub_run.make_step(task, arm, PATH_RATE, ())

        def one(carry, key, step=step):
            return step(carry, key)[0], carry[0]["x"]

        keys = jax.random.split(jax.random.key(0), PATH_STEPS)
        start = params, optimizer.init(params)
        path = np.asarray(jax.jit(lambda s, k, f=one: jax.lax.scan(f, s, k))(start, keys)[1])
        found[name] = [rounded(point) for point in path[sampled(len(path))]]
    return found


def sampled(length: int) -> np.ndarray:
    """Places that are dense at the start of a path and every 20th later."""
    places = np.arange(length)
    return places[(places < 100) | (places % 20 == 0)]


def main() -> None:
    """Runs everything, some minutes on one core."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--theta", nargs="*", default=[], metavar="RULE=PATH")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    rules = hub_run.learned_rules(dict(pair.split("=", 1) for pair in arguments.theta))
    results = {
        "settings": {
            "dimension": DIMENSION,
            "lambda": 0.01,
            "widths": WIDTHS,
            "num_steps": NUM_STEPS,
            "num_seeds": NUM_SEEDS,
            "theta": {rule: theta for rule, (_, theta) in rules.items()},
            "path": {"start": PATH_START, "num_steps": PATH_STEPS, "rate": PATH_RATE},
        },
        "environment": environment(),
        "starts": {start: run_start(start, rules) for start in WIDTHS},
        "path": run_path(rules),
    }
    write_atomically(arguments.results, (json.dumps(results) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
