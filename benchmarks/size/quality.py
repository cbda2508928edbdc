"""What windows cost in accuracy: many of them, one, and the network that sees all tokens at once.

    python -m benchmarks.size.quality perceptron [--seeds 3]
    python -m benchmarks.size.quality convolution --data-dir DIRECTORY [--seeds 1]

"perceptron" is the two-class partitions of the 8x8 digits with 1,074 weights: without windows, with
those of 64 tokens, of which one holds nearly all, and of 16, with as many tokens or trajectories an
update. "convolution" is those of MNIST, prepared by TensorFlow Datasets in DIRECTORY, with 97,770
weights, by open and closed loops of windows, with Adam on the same support beside them. Writes
quality.json and the tables of README.md.
"""

import argparse
import functools
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lohp_jax as lj
from benchmarks.size.report import QUALITY, RESULTS, write
from lohp_jax.baselines.adaptation import adam_on_support, tune
from lohp_jax.data import image_set
from lohp_jax.evaluation.scores import draw_tasks, scores
from lohp_jax.files import write_atomically
from lohp_jax.networks.classifiers import Network
from lohp_jax.tasks.images import image_family
from lohp_jax.tasks.partitions import partition_tables
from lohp_jax.trajectories.rollout import over_tasks
from lohp_jax.types import Generator, Params, TaskFamily

TEACHER, NUM_STEPS = "adam:0.003", 60
ALIKE = {"teachers": TEACHER, "num_tasks": 200, "num_steps": NUM_STEPS}
FIT = {
    ("perceptron", "lohp"): {"compression": 30, "record_every": 30, "updates": 1200},
    ("convolution", "lohp"): {
        "compression": 30,
        "record_every": 30,
        "updates": 1500,
        "log_every": 25,
        "checkpoint_every": 500,
    },
    ("convolution", "lohp_feedback"): {
        "compression": 12,
        "record_every": 12,
        "updates": 240,
        "log_every": 20,
        "checkpoint_every": 120,
    },
}
LOOKS = {
    ("perceptron", "lohp"): ((None, 16), (64, 16), (16, 64), (16, 16)),
    ("convolution", "lohp"): ((256, 16),),
    ("convolution", "lohp_feedback"): ((256, 8),),
}
"""Tokens that the network sees at once, None for all, and trajectories per update."""
NUM_TASKS = {"perceptron": 256, "convolution": 64}
ADAM_STEPS = {"perceptron": (), "convolution": (5, 100)}
"""Gradients of Adam on the support, whose rate is picked on `NUM_TUNING` training tasks."""
NUM_TUNING = 16
METHODS = {
    "lohp": lj.lohp,
    "lohp_feedback": functools.partial(lj.lohp_feedback, balance=lj.HybridConfig(on_policy=0.0)),
}
CHANNELS, HIDDEN = 32, 56


def convolution() -> Network:
    """Images 28x28 -> 4x4 patches, a 3x3 convolution, a hidden layer, two labels; 97,770 weights.

    Convolutions are products with the pixels under the kernel, which is fast where many networks run at
    once on a CPU.
    """
    flat = 7 * 7 * CHANNELS
    shapes = {
        "patches": (4, 4, 1, CHANNELS),
        "convolution": (3, 3, CHANNELS, CHANNELS),
        "hidden": (flat, HIDDEN),
        "labels": (HIDDEN, 2),
    }

    def init(key):
        keys = jax.random.split(key, len(shapes))
        return {
            name: {
                "w": np.sqrt(2 / np.prod(shape[:-1])) * jax.random.normal(k, shape),
                "b": jnp.zeros(shape[-1]),
            }
            for k, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    def dense(layer, x):
        return x @ layer["w"].reshape(x.shape[-1], -1) + layer["b"]

    def apply(params, images):
        x = images.reshape(-1, 7, 4, 7, 4).transpose(0, 1, 3, 2, 4).reshape(-1, 7, 7, 16)
        x = jnp.pad(jax.nn.relu(dense(params["patches"], x)), ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifted = [x[:, i : i + 7, j : j + 7] for i in range(3) for j in range(3)]
        x = jax.nn.relu(dense(params["convolution"], jnp.concatenate(shifted, axis=-1)))
        x = jax.nn.relu(dense(params["hidden"], x.reshape(len(images), flat)))
        return dense(params["labels"], x)

    axes = {name: {"w": -1, "b": -1} for name in shapes} | {"labels": {"w": 1, "b": 0}}
    return Network(init, apply, axes)


def make_family(name: str, data_dir: str | None, seed: int) -> TaskFamily:
    """The tasks of a part."""
    if name == "perceptron":
        return lj.make_family("digits_partitions", seed=seed)
    images = image_set("tfds:mnist", data_dir=data_dir, train_per_class=200, query_per_class=50)
    return image_family(
        "mnist_partitions",
        images,
        partition_tables(10, seed=seed),
        network=convolution(),
        shots=50,
        batch_size=64,
    )


def teacher(family: TaskFamily, theta_0: Params) -> Generator:
    """What generators learn from, as one that sees all training images; its context is the task."""
    optimizer = lj.make_optimizer(TEACHER)

    def apply(theta_0, data, key, **_):
        sizes = {"num_steps": NUM_STEPS, "record_every": NUM_STEPS}
        run = lj.rollout(family, optimizer, data, theta_0, key, **sizes)
        return jax.tree.map(lambda leaf: leaf[-1], run.states)

    return Generator(apply, theta_0, gradients=NUM_STEPS)


def run(name: str, methods: Sequence[str], data_dir: str | None, seed: int) -> list[dict[str, Any]]:
    """Rows of a part and a seed."""
    family, key = make_family(name, data_dir, seed), jax.random.key(seed)
    theta_0 = jax.jit(family.init)(jax.random.split(key, 3)[0])  # of `fit`
    tasks = draw_tasks(family, jax.random.key(100 + seed), NUM_TASKS[name], "held_out")
    rows = []

    def add(method, generator, seen, **more):
        one = jax.jit(over_tasks(lambda seen, key: generator.apply(generator.params, seen, key)))
        accuracy = np.asarray(scores(family, one(seen, tasks.keys), tasks.data))
        row = {"part": name, "method": method, "seed": seed, "gradients": generator.gradients}
        row |= {"window": None, "batch_size": None, "seconds": None} | more
        row |= {"accuracy": float(accuracy.mean()), "accuracy_min": float(accuracy.min())}
        rows.append(row)
        print(row, flush=True)

    if "teacher" in methods:
        add("teacher", teacher(family, theta_0), tasks.data)
    for num_steps in ADAM_STEPS[name] if "adam" in methods else ():
        tuning = draw_tasks(family, jax.random.key(200 + seed), NUM_TUNING, "train")
        tuned = tune(family, theta_0, tuning.data, tuning.contexts, num_steps=num_steps)
        add(f"adam_{num_steps}", adam_on_support(family, theta_0, tuned), tasks.contexts)
    for method in set(methods) & {method for part, method in FIT if part == name}:
        for window, batch_size in LOOKS[name, method]:
            start = time.perf_counter()
            generator, rate = fit(family, key, name, method, window, batch_size)
            told = {"window": window, "batch_size": batch_size, "updates_per_second": rate}
            add(method, generator, tasks.contexts, seconds=time.perf_counter() - start, **told)
    return rows


def fit(
    family: TaskFamily,
    key: jax.Array,
    name: str,
    method: str,
    window: int | None,
    batch_size: int,
) -> tuple[Generator, float]:
    """A generator, and the median of the updates per second of its chunks."""
    rates = []
    generator = lj.fit(
        family,
        METHODS[method](network=lj.NetworkConfig(window=window)),
        key=key,
        on_progress=lambda progress: rates.append(progress.updates_per_second),
        batch_size=batch_size,
        **ALIKE,
        **FIT[name, method],
    )
    return generator, float(np.median(rates))


def keep(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows in place of those of the same part, method, window and seed."""

    def place(row):
        look = row["window"] or 0, row["batch_size"] or 0
        return row["part"], row["method"], *look, row["seed"]

    there = json.loads(path.read_text())["rows"] if path.exists() else []
    new = {place(row) for row in rows}
    rows = sorted([row for row in there if place(row) not in new] + rows, key=place)
    settings = {" ".join(of): ALIKE | fitted for of, fitted in FIT.items()}
    content = {"schema": 1, "settings": settings, "rows": rows}
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def main() -> None:
    """Measures a part and writes its rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=NUM_TASKS)
    rows = ("teacher", "adam", *METHODS)
    parser.add_argument("--methods", nargs="+", choices=rows, default=rows)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data-dir", help="of TensorFlow Datasets")
    parser.add_argument("--quality", type=pathlib.Path, default=QUALITY)
    options = parser.parse_args()
    for seed in range(options.seeds):
        keep(options.quality, run(options.part, options.methods, options.data_dir, seed))
    write(RESULTS)


if __name__ == "__main__":
    sys.exit(main())
