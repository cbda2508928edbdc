"""Compares HUB with its two arms, its rivals and what a user would pick instead.

Every optimizer gets the same number of gradients, the same starts and mini-batches, and five trials of
its one scalar (most often a learning rate), each on two seeds that are not reported. Where a task has
but one data set (images, a recorded drive), trials are judged on the examples that are reported, too,
for all arms alike:

    python -m benchmarks.hub.run [--tasks NAME ...] [--arms NAME ...] [--theta celo=PATH] [--data DIR]
    python -m benchmarks.hub.run --clock [...]

The first runs what is missing, seeds and trials in vmapped calls; the second times a step of what is
there. Each finished task and arm is written to results.json at once and not repeated
unless its settings, or the weights of the learned optimizer, have changed; `benchmarks.hub.report`
turns it into tables and plots.
"""

import argparse
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from benchmarks.hub import tasks as hub_tasks
from lohp_jax.files import write_atomically
from lohp_jax.optimizers.blends import constant_blend, graft
from lohp_jax.optimizers.hub import block_wise, hub
from lohp_jax.optimizers.lgl2o import lgl2o
from lohp_jax.optimizers.pretrained import pretrained, pretrained_optimizer
from lohp_jax.optimizers.reinit import increase_steps, min_loss_reinit
from lohp_jax.optimizers.theta import load_theta
from lohp_jax.optimizers.trust import hub_trust
from lohp_jax.optimizers.velo import celo, velo
from lohp_jax.runs.directory import environment

RESULTS = pathlib.Path(__file__).with_name("results.json")
NUM_TRIALS = 5
TUNING_SEEDS = 2
LONG = 4
"""How much longer the tuned hand-designed arm runs once more, for what is slower than it."""
CLOCK_STEPS = 20
CLOCK_REPEATS = 7
_BLOCKS = {"block_wise": False, "block_wise_literal": True}
_WEIGHTS = (0.1, 0.25, 0.5, 0.75, 0.9)

Make = Callable[[jax.Array, int], optax.GradientTransformation]


class Arm(NamedTuple):
    """One optimizer.

    Attributes:
      make: `(scalar, num_steps) -> optimizer`; the scalar is what is tuned.
      scalars: the five values tried; one where there is nothing to tune.
      gradients: gradients of one step.
      length: how many times as long as all others it runs.
      read: parameters to be judged, from the optimizer's state and those it was handed.
      theta: digest of the weights of the learned optimizer; empty without one.
    """

    make: Make
    scalars: tuple[float, ...]
    gradients: int = 1
    length: int = 1
    read: Callable[[optax.OptState, Any], Any] = lambda state, params: params
    theta: str = ""


def alone(task: hub_tasks.Task) -> dict[str, Arm]:
    """What a user would pick without a learned optimizer."""
    rates = task.rates
    return {
        "hand": Arm(task.hand_designed, rates),
        "hand_long": Arm(task.hand_designed, rates[:1], length=LONG),
        "hand_default": Arm(task.hand_designed, (1e-3,)),
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
        return lambda rate, n: combine(task.hand_designed(rate, n), learned(n), *options, **kinds)

    rates, middle = task.rates, task.rates[NUM_TRIALS // 2]
    blocks = {}
    if task.is_new:
        modes = {f"hub_{k}": block_wise(task.is_new, literal=v) for k, v in _BLOCKS.items()}
        blocks = {name: Arm(both(hub, mode=mode), rates) for name, mode in modes.items()}
    return blocks | {
        "alone": Arm(lambda _, n: learned(n), (1.0,)),
        "lgl2o_race": Arm(both(lgl2o, mode="race", num_steps=10), rates, gradients=2),
        "lgl2o_candidate": Arm(both(lgl2o, mode="candidate"), rates),
        "increase_steps": Arm(lambda _, n: increase_steps(learned, n), (1.0,)),
        "min_loss_reinit": Arm(lambda _, n: min_loss_reinit(learned(n)), (1.0,)),
        "constant_1_over_K": Arm(both(constant_blend, "size"), rates),
        "constant_half": Arm(both(constant_blend, 0.5), rates),
        "constant_best": Arm(
            lambda weight, n: constant_blend(task.hand_designed(middle, n), learned(n), weight),
            _WEIGHTS,
        ),
        "graft": Arm(both(graft), rates),
        "hub_vanilla": Arm(both(hub, mode="vanilla"), rates),
        "hub_invert": Arm(both(hub, mode="invert"), rates),
        "hub_vanilla_layer": Arm(both(hub, mode="vanilla", group="layer"), rates),
        "hub_invert_layer": Arm(both(hub, mode="invert", group="layer"), rates),
        "hub_clipped": Arm(both(hub, mode="vanilla", clip=(0.1, 0.9)), rates),
        "hub_trust": Arm(both(hub, mode="trust"), rates),
        "hub_trust_optimistic": Arm(both(hub_trust, optimism=0.3), rates),
        "hub_spike": Arm(both(hub, mode="spike"), rates),
        "hub_online": Arm(both(hub, mode="online"), rates),
    }


def make_step(task: hub_tasks.Task, arm: Arm, scalar: jax.Array, data: Any) -> tuple:
    """The optimizer of a run, and its step `((params, state), key) -> ((params, state), None)`."""
    loss = task.family.loss
    optimizer = optax.with_extra_args_support(arm.make(scalar, num_steps(task, arm)))

    def step(carry, key):
        params, state = carry

        def loss_fn(params):
            return loss(params, data, key)

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

    return optimizer, step


def num_steps(task: hub_tasks.Task, arm: Arm) -> int:
    """Steps of a run."""
    return task.num_steps * arm.length // arm.gradients


def train(task: hub_tasks.Task, arm: Arm, scalar: jax.Array, key: jax.Array) -> tuple:
    """One run: scores `[num_records + 1]` and all that is measured at the end."""
    family = task.family
    data_key, init_key, loss_key = jax.random.split(key, 3)
    data, params = family.sample(data_key), family.init(init_key)
    optimizer, step = make_step(task, arm, scalar, data)

    def judge(carry):
        params, state = carry
        return family.evaluate(arm.read(state, params), data)

    def segment(carry, keys):
        carry, _ = jax.lax.scan(step, carry, keys)
        return carry, judge(carry)

    start = params, optimizer.init(params)
    keys = jax.random.split(loss_key, (task.num_records, num_steps(task, arm) // task.num_records))
    _, measured = jax.lax.scan(segment, start, keys)
    scores = jnp.append(judge(start)[task.metric], measured[task.metric])
    return scores, jax.tree.map(lambda values: values[-1], measured)


def compare(task: hub_tasks.Task, arm: Arm) -> dict:
    """Tunes an arm on seeds of its own, then runs it with the winner."""
    runs = jax.jit(jax.vmap(lambda scalar, key: train(task, arm, scalar, key)))
    keys = jax.random.split(jax.random.key(0), task.num_seeds)
    began = time.perf_counter()
    runs = runs.lower(jnp.zeros(task.num_seeds), keys).compile()
    compile_seconds = time.perf_counter() - began
    best, trials = tune(runs, arm.scalars, task)
    scores, final = runs(jnp.full(task.num_seeds, best), keys)
    return {
        "scalar": best,
        "trials": trials,
        "gradients_per_step": arm.gradients,
        "compile_seconds": round(compile_seconds, 2),
        "scores": [_rounded(row) for row in np.asarray(scores)],
        "final": {name: _rounded(values) for name, values in final.items()},
    }


def tune(runs: Callable, scalars: tuple[float, ...], task: hub_tasks.Task) -> tuple[float, dict]:
    """The scalar of the least mean cost on seeds of its own, and the costs of each.

    A run that fails costs what its start does.
    """
    if len(scalars) == 1:
        return scalars[0], {}
    keys = jax.random.split(jax.random.key(1), TUNING_SEEDS)
    pairs = [(scalar, key) for key in keys for scalar in scalars]
    costs = []
    for first in range(0, len(pairs), task.num_seeds):
        batch = pairs[first : first + task.num_seeds]
        values, batch_keys = zip(*batch, strict=True)
        scores, final = runs(jnp.float32(values), jnp.stack(batch_keys))
        cost = hub_tasks.cost_of(task.metric)(np.asarray(scores, np.float64)[:, [0, -1]])
        fails = ~np.isfinite(cost[:, 1]) | ~np.isfinite(np.asarray(final["loss"]))
        costs.append(np.where(fails, cost[:, 0], np.minimum(*cost.T)))
    costs = np.concatenate(costs).reshape(TUNING_SEEDS, len(scalars)).T
    trials = {f"{scalar:g}": _rounded(row) for scalar, row in zip(scalars, costs, strict=True)}
    return scalars[int(np.argmin(costs.mean(1)))], trials


def clock(task: hub_tasks.Task, arm: Arm, scalar: float) -> Callable[[], float]:
    """Compiles steps of one run, as a user's loop has them; calling the result times them."""
    key = jax.random.key(0)
    data, params = task.family.sample(key), task.family.init(key)
    optimizer = optax.with_extra_args_support(arm.make(scalar, num_steps(task, arm)))

    def steps(carry, data, key):
        keys = jax.random.split(key, CLOCK_STEPS)
        return jax.lax.scan(make_step(task, arm, scalar, data)[1], carry, keys)[0]

    carry = params, optimizer.init(params)
    compiled = jax.jit(steps).lower(carry, data, key).compile()
    carry = jax.block_until_ready(compiled(carry, data, key))

    def timed():
        began = time.perf_counter()
        jax.block_until_ready(compiled(carry, data, key))
        return time.perf_counter() - began

    return timed


def add_clocks(
    task: hub_tasks.Task, arms: dict[str, Arm], names: Iterable[str], rows: dict[str, dict]
) -> Iterable[str]:
    """Times a gradient's worth of arms beside one of the tuned hand-designed arm, in turn."""
    hand = clock(task, arms["hand"], rows["hand"]["scalar"])
    for name in [name for name in names if name in rows and "times_hand" not in rows[name]]:
        timed = clock(task, arms[name], rows[name]["scalar"])
        ratios = np.array([timed() / hand() for _ in range(CLOCK_REPEATS)]) / arms[name].gradients
        rows[name]["times_hand"] = float(f"{np.median(ratios):.3g}")
        rows[name]["times_hand_range"] = _rounded([ratios.min(), ratios.max()])
        yield name


def _rounded(values: Iterable[float]) -> list[float | None]:
    """Four significant digits, None for what is not finite."""
    return [float(f"{v:.4g}") if np.isfinite(v) else None for v in values]


RULES = {"celo": celo, "velo": velo}


def learned_rules(thetas: dict[str, str]) -> dict[str, tuple[Callable[[int], Any], str]]:
    """The learned optimizers with digests: what ships, and Celo's or VeLO's weights where given."""
    loaded = {name: load_theta(path) for name, path in thetas.items()}
    made = {"small": (lambda n: pretrained_optimizer("small", n), digest(pretrained("small")))}
    return made | {
        name: (lambda n, name=name: RULES[name](loaded[name], n), digest(loaded[name]))
        for name in loaded
    }


def digest(theta: Any) -> str:
    """Of all entries, in the order of the tree."""
    entries = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(theta))
    return hashlib.sha256(entries).hexdigest()[:16]


def describe(task: hub_tasks.Task) -> dict[str, Any]:
    """What the report needs to know of a task."""
    keys = jax.random.split(jax.random.key(0), task.num_seeds)
    data = [task.family.sample(jax.random.split(key, 3)[0]) for key in keys]
    examples = {"num_query": len(data[0]["query"][1])} if task.metric == "accuracy" else {}
    trivial = [task.trivial(it) for it in data] if task.trivial else []
    return {
        "metric": task.metric,
        "num_steps": task.num_steps,
        "trivial": {k: [float(f"{it[k]:.4g}") for it in trivial] for k in (trivial or [{}])[0]},
    } | examples


def all_arms(
    task: hub_tasks.Task, rules: dict[str, tuple[Callable[[int], Any], str]]
) -> dict[str, Arm]:
    """Every optimizer by name; those with a learned rule are called "RULE/NAME"."""
    arms = alone(task)
    for rule, (learned, theta) in rules.items():
        found = with_learned(task, learned).items()
        arms |= {f"{rule}/{arm}": it._replace(theta=theta) for arm, it in found}
    return arms | {
        "small/alone_tuned": Arm(
            lambda rate, n: pretrained_optimizer("small", n, learning_rate=rate),
            task.rates,
            theta=rules["small"][1],
        ),
        "small/hub_trust_untuned": arms["small/hub_trust"]._replace(scalars=(1e-3,)),
    }


def run_missing(
    task: hub_tasks.Task, arms: dict[str, Arm], names: Iterable[str], rows: dict[str, dict]
) -> Iterable[str]:
    """Runs arms of which there is no row, or one of other settings; yields their names."""
    for name in names:
        arm = arms[name]
        if name == "hand_long":
            arm = arm._replace(scalars=(rows["hand"]["scalar"],))
        settings = {
            "num_steps": num_steps(task, arm),
            "scalars": list(arm.scalars),
            "num_seeds": task.num_seeds,
            "tuning_seeds": TUNING_SEEDS,
        } | dict(task.settings)
        settings |= {"theta": arm.theta} if arm.theta else {}
        if name not in rows or rows[name]["settings"] != settings:
            rows[name] = {"settings": settings, "environment": environment(), **compare(task, arm)}
            yield name


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=hub_tasks.TASKS)
    parser.add_argument("--arms", nargs="+", help="only these, e.g. hand celo/hub_trust")
    parser.add_argument("--theta", nargs="*", default=[], metavar="RULE=PATH")
    parser.add_argument("--data", type=pathlib.Path, help="folder of data sets that do not ship")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--clock", action="store_true", help="time the steps of what has been run")
    arguments = parser.parse_args()
    for pair in arguments.theta:
        if pair.partition("=")[0] not in RULES or "=" not in pair:
            parser.error(f"--theta: expected {' or '.join(RULES)}, then =PATH; got {pair!r}")
    needy = set(arguments.tasks or ()) & set(hub_tasks.NEEDS_DATA)
    if needy and not arguments.data:
        parser.error(f"--tasks: {', '.join(sorted(needy))} need --data")
    return arguments


def main() -> None:
    """Runs what is missing, or times what is there."""
    arguments = parse_args()
    rules = learned_rules(dict(pair.split("=", 1) for pair in arguments.theta))
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    possible = [t for t in hub_tasks.TASKS if arguments.data or t not in hub_tasks.NEEDS_DATA]
    for name in arguments.tasks or possible:
        task = hub_tasks.TASKS[name](arguments.data)
        arms = all_arms(task, rules)
        if unknown := set(arguments.arms or ()) - set(arms):
            sys.exit(f"--arms: {name} has {', '.join(arms)}; got {', '.join(sorted(unknown))}.")
        found = results.setdefault(name, {"arms": {}})
        found |= describe(task)
        work = add_clocks if arguments.clock else run_missing
        for arm in work(task, arms, arguments.arms or arms, found["arms"]):
            write_atomically(arguments.results, (json.dumps(results) + "\n").encode())
            row = found["arms"][arm]
            final = [scores[-1] for scores in row["scores"]]
            print(name, arm, row.get("times_hand"), f"{row['scalar']:g}", final, flush=True)


if __name__ == "__main__":
    sys.exit(main())
