"""Few-shot regression of sines: generated weights beside MAML, ridge and Adam on the same points.

    python -m benchmarks.sine.run [--parts rivals generators] [--seeds 5]

Every method is scored on the same held-out tasks, by the mean squared error at 100 evenly spaced inputs.
Parts that are not asked for keep their rows. Writes results.json and the table of README.md.
"""

import argparse
import json
import pathlib
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

NETWORK = lj.NetworkConfig(trunk="mlp", widths=(128, 128), embedding=128)
METHODS = {
    "hypernetwork": lj.hypernetwork(network=NETWORK),
    "hypernetwork_regression": lj.hypernetwork_regression(network=NETWORK),
    "lohp": lj.lohp(network=NETWORK),
    "lohp_consolidated": lj.lohp_consolidated(network=NETWORK),
}
FIT = {"num_tasks": 1000, "num_steps": 100, "compression": 50, "updates": 2000}
TEACHER = "adam:0.01"


def rival_rows(shots: int, seeds: int, num_tasks: int, updates: int) -> list[dict[str, Any]]:
    """Rows of all that is not a generator, for one number of points."""
    family = sine_regression(shots=shots, batch_size=shots)
    tuning = rivals.tasks_and_contexts(family, jax.random.key(100), "train", rivals.NUM_TUNING)
    tasks = rivals.tasks_and_contexts(family, jax.random.key(100), "held_out", num_tasks)
    keys = jnp.stack([jax.random.key(seed) for seed in range(seeds)])
    rows = [rivals.constant_row(family, tasks), *rivals.ridge_rows(tuning, tasks, keys)]
    rows += rivals.adam_rows(family, tuning, tasks, keys)
    return rows + rivals.maml_rows(family, tuning, tasks, keys, updates)


def generator_rows(shots: int, seeds: int, num_tasks: int) -> list[dict[str, Any]]:
    """Rows of every method that generates weights, for one number of points."""
    family = sine_regression(shots=shots)
    tasks, contexts = rivals.tasks_and_contexts(family, jax.random.key(100), "held_out", num_tasks)
    rows = []
    for seed in range(seeds):
        for name, method in METHODS.items():
            generator = lj.fit(family, method, key=jax.random.key(seed), teachers=TEACHER, **FIT)
            producer = make_producer(from_generator(generator))
            weights = producer.many(contexts, jax.random.split(jax.random.key(seed), num_tasks))
            objective = scores(family, weights, tasks).mean()
            rows.append(rivals.as_row(name, 0, FIT, seed, objective))
            print(f"K = {shots}, seed {seed}: {name} {objective:.4f}", flush=True)
    return rows


def main() -> None:
    """Runs the parts asked for and writes their rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--parts", nargs="+", choices=("rivals", "generators"), default=("rivals", "generators")
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=30_000, help="of MAML")
    parser.add_argument("--num-tasks", type=int, default=600)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    kept = json.loads(options.results.read_text())["rows"] if options.results.exists() else []
    rows = [row for row in kept if row["part"] not in options.parts]
    for shots in rivals.SHOTS:
        start = time.perf_counter()
        found = {}
        if "rivals" in options.parts:
            sizes = (options.seeds, options.num_tasks, options.updates)
            found["rivals"] = rival_rows(shots, *sizes)
        if "generators" in options.parts:
            found["generators"] = generator_rows(shots, options.seeds, options.num_tasks)
        common = {"shots": shots, "num_tasks": options.num_tasks}
        rows += [common | {"part": part} | row for part, some in found.items() for row in some]
        print(f"K = {shots}: {time.perf_counter() - start:.0f} s", flush=True)
    content = {"schema": 1, "maml_updates": options.updates, "rows": rows}
    write_atomically(options.results, (json.dumps(content, indent=1) + "\n").encode())
    report.write(options.results)


if __name__ == "__main__":
    main()
