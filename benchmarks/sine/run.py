"""Few-shot regression of sines: generated weights beside MAML, ridge and Adam on the same points.

    python -m benchmarks.sine.run [--parts ridge adam maml hypernetwork ...] [--seeds 5]

Every method is scored on the same held-out tasks, by the mean squared error at 100 evenly spaced inputs.
Parts that are not asked for keep their rows; `lohp_consolidated` comes with a row of the `lohp` that it
starts from. Writes results.json and the table of README.md.
"""

import argparse
import itertools
import json
import pathlib
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp

import lohp_jax as lj
from benchmarks.sine import report, rivals
from benchmarks.sine.report import RESULTS
from lohp_jax.evaluation.scores import from_generator, make_producer, scores
from lohp_jax.files import write_atomically
from lohp_jax.tasks.regression import sine_regression
from lohp_jax.trajectories.rollout import over_tasks

TASK_LOSS = lj.FeedbackConfig(objective="task_loss")
NETWORK = lj.NetworkConfig(trunk="mlp", widths=(128, 128), embedding=128)
METHODS = {
    "hypernetwork": lj.hypernetwork(network=NETWORK),
    "hypernetwork_long": lj.hypernetwork(network=NETWORK),
    "hypernetwork_regression": lj.hypernetwork_regression(network=NETWORK),
    "lohp_consolidated": lj.lohp_consolidated(network=NETWORK),
    "lohp_feedback_5": lj.lohp_feedback(network=NETWORK),
    "lohp_feedback_10": lj.lohp_feedback(network=NETWORK),
    "lohp_feedback_task_loss_5": lj.lohp_feedback(network=NETWORK, loop=TASK_LOSS),
    "lohp_feedback_task_loss_10": lj.lohp_feedback(network=NETWORK, loop=TASK_LOSS),
}
FIT = {
    "num_tasks": 500,
    "num_steps": 100,
    "compression": 50,
    "updates": 1000,
    "learning_rate": 1e-3,
}
LONG = {"num_tasks": 2000, "updates": 4000}
LONGER = {"hypernetwork_long": LONG} | {
    name: LONG | {"compression": FIT["num_steps"] // int(name.rpartition("_")[2])}
    for name in METHODS
    if "feedback" in name
}
"""Settings of closed loops, which spend a gradient in each of their 5 or 10 steps and whose rule learns
to descend only after some 1,500 updates, and of a hypernetwork with as many."""
TEACHER = "adam:0.01"


RIVALS = ("constant", "ridge", "adam", "maml")


def rival_rows(
    part: str, shots: int, seeds: int, num_tasks: int, updates: int
) -> list[dict[str, Any]]:
    """Rows of one of `RIVALS`, for one number of points."""
    family = sine_regression(shots=shots, batch_size=shots)
    tuning = rivals.tasks_and_contexts(family, jax.random.key(100), "train", rivals.NUM_TUNING)
    tasks = rivals.tasks_and_contexts(family, jax.random.key(100), "held_out", num_tasks)
    keys = jnp.stack([jax.random.key(seed) for seed in range(seeds)])
    if part == "constant":
        return [rivals.constant_row(family, tasks)]
    if part == "ridge":
        return rivals.ridge_rows(tuning, tasks, keys)
    if part == "adam":
        return rivals.adam_rows(family, tuning, tasks, keys)
    return rivals.maml_rows(family, tuning, tasks, keys, updates)


def teacher_rows(shots: int, seeds: int, num_tasks: int) -> list[dict[str, Any]]:
    """Rows of what generators learn from, which sees all training points of the new task."""
    family, num_steps = sine_regression(shots=shots), FIT["num_steps"]
    tasks, _ = rivals.tasks_and_contexts(family, jax.random.key(100), "held_out", num_tasks)
    optimizer = lj.make_optimizer(TEACHER)

    @jax.jit
    def score(key):
        def objective(data):
            run = lj.rollout(family, optimizer, data, family.init(key), key, num_steps=num_steps)
            end = jax.tree.map(lambda leaf: leaf[-1], run.states)
            return family.evaluate(end, data)["objective"]

        return jnp.mean(over_tasks(objective)(tasks))

    return [
        rivals.as_row(
            "teacher", num_steps, {"optimizer": TEACHER}, seed, score(jax.random.key(seed))
        )
        for seed in range(seeds)
    ]


def generator_rows(name: str, shots: int, seeds: int, num_tasks: int) -> list[dict[str, Any]]:
    """Rows of a method that generates weights, and of what it starts from, for one number of points."""
    family = sine_regression(shots=shots)
    tasks, contexts = rivals.tasks_and_contexts(family, jax.random.key(100), "held_out", num_tasks)
    rows = []
    settings = FIT | LONGER.get(name, {})
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as directory:
            key = jax.random.key(seed)
            fitting = {"teachers": TEACHER, "directory": directory, **settings}
            generator = lj.fit(family, METHODS[name], key=key, **fitting)
            generators = {name: generator}
            if METHODS[name].starts_from is not None:
                before = METHODS[name].starts_from.name
                generators[before] = lj.load(directory, before, family)
        for method, generator in generators.items():
            producer = make_producer(from_generator(generator))
            weights = producer.many(contexts, jax.random.split(key, num_tasks))
            objective = scores(family, weights, tasks).mean()
            rows.append(rivals.as_row(method, generator.gradients, settings, seed, objective))
            print(f"K = {shots}, seed {seed}: {method} {objective:.4f}", flush=True)
    return rows


def main() -> None:
    """Runs the parts asked for and writes their rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parts = (*RIVALS, "teacher", *METHODS)
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=30_000, help="of MAML")
    parser.add_argument("--num-tasks", type=int, default=600)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    sizes = (options.seeds, options.num_tasks)
    for part, shots in itertools.product(options.parts, rivals.SHOTS):
        start = time.perf_counter()
        if part in RIVALS:
            rows = rival_rows(part, shots, *sizes, options.updates)
        elif part == "teacher":
            rows = teacher_rows(shots, *sizes)
        else:
            rows = generator_rows(part, shots, *sizes)
        common = {"part": part, "shots": shots, "num_tasks": options.num_tasks}
        keep(options.results, part, shots, [common | row for row in rows])
        print(f"{part}, K = {shots}: {time.perf_counter() - start:.0f} s", flush=True)
    report.write(options.results)


def keep(results: pathlib.Path, part: str, shots: int, rows: list[dict[str, Any]]) -> None:
    """Writes rows in place of those of the same part and number of points."""
    there = json.loads(results.read_text())["rows"] if results.exists() else []
    there = [row for row in there if (row["part"], row["shots"]) != (part, shots)]
    content = {"schema": 1, "rows": there + rows}
    write_atomically(results, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
