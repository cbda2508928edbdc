"""Memory and time of networks of 1e3 to 1e7 weights: trajectories, training in windows, generation.

    python -m benchmarks.size.run [--sizes 1000 10000 ...] [--window 64 | --window 0]

Every stage of every size runs in a process of its own, whose peak resident memory is the row's; a
window of 0 stands for the network that sees all tokens at once. Rows that are not measured anew are
kept. Writes results.json and the tables of README.md.
"""

import argparse
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.size.report import RESULTS, write
from lohp_jax.files import write_atomically

SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
STAGES = ("prepare", "train", "generate")
INPUTS, NUM_TASKS, NUM_EXAMPLES, SHOTS = 8, 20, 32, 8
FIT = {
    "num_tasks": 16,
    "num_steps": 10,
    "compression": 5,
    "record_every": 5,
    "updates": 40,
    "log_every": 10,
    "checkpoint_every": 40,
}
TEACHER = "adam:0.00001"


def hidden_units(size: int) -> int:
    """h, so that a perceptron INPUTS-h-h-1 has about `size` weights: h² + (INPUTS + 3) h + 1."""
    half = (INPUTS + 3) / 2
    return round((half**2 + size - 1) ** 0.5 - half)


def make_family(size: int):
    """Regression to random waves by a perceptron of about `size` weights; a cheap context."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import lohp_jax as lj

    units = hidden_units(size)
    widths = (INPUTS, units, units, 1)

    def init(key):
        keys = jax.random.split(key, len(widths) - 1)
        return [
            {"w": jax.random.normal(k, (a, b)) / np.sqrt(a), "b": jnp.zeros(b)}
            for k, a, b in zip(keys, widths[:-1], widths[1:], strict=True)
        ]

    def apply(params, x):
        for layer in params[:-1]:
            x = jnp.tanh(x @ layer["w"] + layer["b"][None])
        return x @ params[-1]["w"] + params[-1]["b"][None]

    rng = np.random.default_rng(0)
    x = rng.normal(size=(NUM_TASKS, NUM_EXAMPLES, INPUTS)).astype(np.float32)
    direction = rng.normal(size=(NUM_TASKS, INPUTS, 1)).astype(np.float32)
    return lj.supervised_family(init, apply, x, np.sin(x @ direction), shots=SHOTS)


class Setting:
    """What the stages of one size share, made as `lj.fit` makes it."""

    def __init__(self, size: int, window: int | None):
        import jax

        import lohp_jax as lj
        from lohp_jax.fitting import FitConfig
        from lohp_jax.trajectories.teachers import make_teachers

        self.family, self.config = make_family(size), FitConfig(**FIT)
        self.method = lj.lohp(network=lj.NetworkConfig(window=window))
        self.theta_0 = jax.jit(self.family.init)(jax.random.key(0))
        self.teachers = make_teachers(TEACHER, self.config.num_steps, self.theta_0)


def prepare(setting: Setting, folder: pathlib.Path) -> dict[str, Any]:
    """Runs the teacher; seconds with compilation."""
    import jax

    import lohp_jax as lj

    start = time.perf_counter()
    sizes = {name: FIT[name] for name in ("num_tasks", "num_steps", "record_every")}
    store = lj.prepare(
        setting.family,
        setting.teachers,
        theta_0=setting.theta_0,
        key=jax.random.key(1),
        directory=folder / "trajectories",
        **sizes,
    )
    return {"seconds": time.perf_counter() - start, "num_dropped": store.num_dropped}


def train(setting: Setting, folder: pathlib.Path) -> dict[str, Any]:
    """Trains from the store; seconds of an update, the first chunk with its compilation apart."""
    import jax

    from lohp_jax.fitting import gather, saving_of
    from lohp_jax.methods.training import train_method
    from lohp_jax.tasks.door import describe_family
    from lohp_jax.trajectories.prepare import template
    from lohp_jax.trajectories.store import open_store

    steps = setting.config.num_steps, setting.config.record_every
    store = open_store(
        folder / "trajectories", template(setting.family, setting.theta_0, *steps), verify=False
    )
    parts = setting.theta_0, setting.teachers, setting.config
    gathered = gather(setting.family, store, *parts, setting.method.window)
    described = describe_family(setting.family)._asdict()
    rates = []
    train_method(
        setting.method,
        gathered.space,
        gathered.dataset,
        setting.config.updating(),
        jax.random.key(2),
        saving=saving_of(folder, gathered, described, setting.teachers, setting.config),
        on_progress=lambda progress: rates.append(progress.updates_per_second),
    )
    chunk = FIT["log_every"]
    return {"seconds": 1 / statistics.median(rates[1:]), "first_chunk_seconds": chunk / rates[0]}


def generate(setting: Setting, folder: pathlib.Path) -> dict[str, Any]:
    """Generates one network into a file; seconds of the second call, which compiles nothing."""
    import jax

    import lohp_jax as lj

    generator = lj.load(folder, family=setting.family)
    context = setting.family.context(setting.family.sample(jax.random.key(3)), jax.random.key(4))
    path, seconds = folder / "weights.safetensors", []
    for _ in range(2):
        start = time.perf_counter()
        if setting.method.window is None:
            weights = lj.generate(generator, context, jax.random.key(5))
            lj.write_weights(path, jax.tree.map(lambda leaf: leaf[0], weights))
        else:
            lj.stream_weights(generator, context, jax.random.key(5), path)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[1], "first_call_seconds": seconds[0]}


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # that of the program, where getrusage may count what it was forked from
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_stage(stage: str, size: int, window: int | None, folder: pathlib.Path) -> dict[str, Any]:
    """One stage in this process; its row."""
    import jax

    setting = Setting(size, window)
    floor = peak_bytes()
    row = {"prepare": prepare, "train": train, "generate": generate}[stage](setting, folder)
    weights = sum(leaf.size for leaf in jax.tree.leaves(setting.theta_0))
    sizes = {"size": size, "num_weights": weights, "window": window, "stage": stage}
    return sizes | row | {"peak_bytes": peak_bytes(), "before_bytes": floor}


def measure(size: int, window: int | None, scratch: pathlib.Path, results: pathlib.Path) -> None:
    """All stages of one size, each in a process of its own."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        for stage in STAGES:
            own = ["--stage", stage, "--folder", folder, "--sizes", str(size)]
            command = [
                sys.executable,
                "-m",
                "benchmarks.size.run",
                *own,
                "--window",
                str(window or 0),
            ]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            keep(results, row)
            print(row, flush=True)


def keep(results: pathlib.Path, row: dict[str, Any]) -> None:
    """Writes a row in place of that of the same size, window and stage."""

    def place(row):
        return row["size"], row["window"] or 0, STAGES.index(row["stage"])

    there = json.loads(results.read_text())["rows"] if results.exists() else []
    rows = sorted([r for r in there if place(r) != place(row)] + [row], key=place)
    content = {"schema": 1, "settings": FIT | {"teacher": TEACHER}, "rows": rows}
    write_atomically(results, (json.dumps(content, indent=1) + "\n").encode())


def main() -> None:
    """Measures the sizes asked for and writes their rows; with `--stage`, prints one row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--window", type=int, default=64, help="tokens; 0 for all at once")
    parser.add_argument("--scratch", type=pathlib.Path, help="folder for trajectories")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    window = options.window or None
    if options.stage:
        print(json.dumps(run_stage(options.stage, options.sizes[0], window, options.folder)))
        return
    for size in options.sizes:
        measure(size, window, options.scratch, options.results)
    write(options.results)


if __name__ == "__main__":
    main()
