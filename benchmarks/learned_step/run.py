"""Times one step of every learned optimizer against one of Adam, on one core.

A step is `update` and `optax.apply_updates`, compiled together, with parameters and state donated.
Weights of the rules are random, of the published sizes (VeLO: hidden 512, bank 256; Celo: 64 and 1).
The arms take turns in one process. Needs Linux (to bind the process to a core).
"""

import argparse
import json
import os
import pathlib
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.learned_step.report import write
from lohp_jax.optimizers import features
from lohp_jax.optimizers.blends import constant_blend
from lohp_jax.optimizers.celo2 import scale_by_celo2
from lohp_jax.optimizers.hub import Mode, hub
from lohp_jax.optimizers.theta import expected_shapes, load_theta, save_theta
from lohp_jax.optimizers.velo import celo, celo_adam, velo
from lohp_jax.types import Params, PyTree

SIZES = {"velo": (512, 256), "celo": (64, 1), "celo_adam": (64, 1), "celo2": (1, 1)}
"""Hidden state and bank of the published weights."""
NUM_STEPS = 10_000
MANY = 400
PARTICLES = (32, 256)
MEASURED_SECONDS = 0.02
"""Steps in a row are timed together until they last this long."""
NOTES = (
    "times_adam: of the same repeat, by the wall clock; the median and the range over repeats.",
    "times_adam_cpu: the same by the processor's time for this process, which other processes disturb "
    "less: of one thread on one core it differs from the wall clock by the time it had to wait.",
    "temporary: XLA's temporary memory over the bytes of the parameters; state: of the optimizer.",
    "hub_overhead: (hub - both_arms) / adam, by repeat, wall clock; hub_overhead_cpu by processor; "
    "both_arms runs the same two Adams and takes half of each update.",
    "exponential: jnp.exp of as many numbers, which the softmax of HUB cannot do without.",
    "arithmetic_bound: multiply-adds of the perceptron at the rate of one large matrix product; no "
    "arrangement of the same float32 arithmetic is faster. What is above it: the mean squares of 30 "
    "channels, the accumulators, a root and (VeLO, Celo) an exponential for each parameter.",
    "VeLO's recurrent network costs the same for each tensor whatever its size (fixed_milliseconds is "
    "a step of one 2 x 2 tensor): it decides where tensors are many and small.",
    "Orthogonalisation is 15 products of matrices a step, some 30 n flops for each entry of [n, n].",
)


class Arm(NamedTuple):
    """`run(count)` does so many steps and blocks."""

    run: Callable[[int], None]
    compile_seconds: float
    temporary_bytes: int
    state_bytes: int


# What is timed.


def random_theta(rule: str) -> Params:
    """Random weights of a rule, of the published size."""
    hidden, bank = SIZES[rule]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: np.float32(rng.normal(0, 0.1, shape)),
        expected_shapes(rule, hidden=hidden, bank=bank),
        is_leaf=lambda node: isinstance(node, tuple),
    )


def optimizers() -> dict[str, optax.GradientTransformation]:
    """The arms by name; "adam" is what all are compared with."""
    return {
        "adam": optax.adam(1e-3),
        "velo": velo(random_theta("velo"), NUM_STEPS),
        "celo": celo(random_theta("celo"), NUM_STEPS),
        "celo_adam": celo_adam(random_theta("celo_adam"), NUM_STEPS),
        "celo2": scale_by_celo2(random_theta("celo2"), orthogonalise=False),
        "celo2_orthogonal": scale_by_celo2(random_theta("celo2")),
    }


def hubs() -> dict[str, optax.GradientTransformation]:
    """HUB in every mode, and what it costs to run its arms; two Adams, so that it does not drown."""
    adam, other = optax.adam(1e-3), optax.adam(1e-3, b1=0.8, b2=0.99)
    modes = {f"hub_{mode}": hub(adam, other, mode=mode) for mode in get_args(Mode)}
    half = {"both_arms": constant_blend(adam, other, 0.5)}
    return half | modes | {"hub_vanilla_guarded": hub(adam, other, guard="finite")}


def mlp(size: int) -> PyTree:
    """Shapes of three square layers with biases."""
    width = int((size / 3) ** 0.5)
    return {f"layer{i}": {"w": (width, width), "b": (width,)} for i in range(3)}


def many(size: int) -> PyTree:
    """Shapes of 400 equal square matrices."""
    width = int((size / MANY) ** 0.5)
    return {f"w{i:03d}": (width, width) for i in range(MANY)}


def random_arrays(shapes: PyTree, seed: int) -> PyTree:
    """Normal entries, standard deviation 0.1."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(0, 0.1, shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def step_arm(optimizer: optax.GradientTransformation, shapes: PyTree) -> Arm:
    """Compiled steps of an optimizer."""
    optimizer = optax.with_extra_args_support(optimizer)
    params, grads = random_arrays(shapes, 0), random_arrays(shapes, 1)
    state = jax.jit(optimizer.init)(params)

    def step(params, state, grads, value):
        updates, state = optimizer.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    return compiled_arm(step, (params, state), (grads, jnp.float32(1.0)), num_bytes(state))


def particle_arm(learned: bool, count: int) -> Arm:
    """Steps of Celo2, each particle with its own weights, or of Adam, on networks for the digits."""
    shapes = {"l1": {"w": (64, 32), "b": (32,)}, "l2": {"w": (32, 10), "b": (10,)}}
    batched = jax.tree.map(lambda s: (count, *s), shapes, is_leaf=lambda s: isinstance(s, tuple))
    params, grads = random_arrays(batched, 0), random_arrays(batched, 1)
    theta = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), random_theta("celo2"))

    def make(theta):
        return scale_by_celo2(theta, orthogonalise=False) if learned else optax.adam(1e-3)

    def step(params, state, grads, theta):
        updates, state = make(theta).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.vmap(lambda theta, params: make(theta).init(params))(theta, params)
    return compiled_arm(jax.vmap(step), (params, state), (grads, theta), num_bytes(state))


def compiled_arm(step: Callable, carry: tuple, fixed: tuple, state_bytes: int) -> Arm:
    """Compiles `carry = step(*carry, *fixed)`, the carry donated."""
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, *fixed).compile()
    seconds = time.perf_counter() - start
    held = [*carry]

    def run(count):
        for _ in range(count):
            held[:] = compiled(*held, *fixed)
        jax.block_until_ready(held)

    temporary = compiled.memory_analysis().temp_size_in_bytes
    return Arm(run, seconds, temporary, state_bytes)


def num_bytes(tree: PyTree) -> int:
    """Bytes of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def parts(shape: tuple[int, int]) -> dict[str, Arm]:
    """Compiled alone, for one matrix: the accumulators, and both passes of each perceptron."""
    param, gradient = (random_arrays(shape, seed) for seed in (0, 1))
    accumulators = features.init_accumulators(param)

    def accumulate(accumulators, param, gradient):
        return features.update_accumulators(accumulators, gradient), param

    def perceive(rule):
        weights = random_theta(rule)["ff_mod_stack"]["~"]
        if rule == "celo":
            weights = jax.tree.map(lambda bank: bank[0], weights)

        def step(accumulators, param, gradient):
            direction, magnitude, _ = features.perceptron(
                accumulators, gradient, param, weights, rms_floor=1e-6, axes=(0, 1), mean_floor=1e-5
            )
            if rule == "celo":
                direction *= jnp.exp(1e-3 * magnitude)
            return accumulators, param - 1e-6 * direction

        return step

    def exponential(accumulators, param, gradient):
        return accumulators, jnp.exp(-param)

    steps = {"accumulators": accumulate, "exponential": exponential}
    steps |= {f"perceptron_{rule}": perceive(rule) for rule in ("celo", "celo2")}
    return {
        name: compiled_arm(step, jax.tree.map(jnp.copy, (accumulators, param)), (gradient,), 0)
        for name, step in steps.items()
    }


# Measuring.


def take_turns(arms: dict[str, Arm], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of a step by wall clock and by processor, one for each repeat; the arms in turn."""
    counts = {}
    for name, arm in arms.items():
        arm.run(2)
        start = time.perf_counter()
        arm.run(1)
        seconds = time.perf_counter() - start
        counts[name] = int(np.clip(MEASURED_SECONDS / seconds, 1, 200))
    times = {name: {"wall": [], "cpu": []} for name in arms}
    for _ in range(repeats):
        for name, arm in arms.items():
            wall, cpu = time.perf_counter(), time.process_time()
            arm.run(counts[name])
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            times[name]["wall"].append(wall / counts[name])
            times[name]["cpu"].append(cpu / counts[name])
    return times


def compare(arms: dict[str, Arm], param_bytes: int, repeats: int) -> dict[str, dict]:
    """What is reported of every arm."""
    times = take_turns(arms, repeats)
    out = {}
    for name, arm in arms.items():
        row = {
            "milliseconds": 1e3 * float(np.median(times[name]["wall"])),
            "milliseconds_cpu": 1e3 * float(np.median(times[name]["cpu"])),
            "compile_seconds": arm.compile_seconds,
            "temporary": arm.temporary_bytes / param_bytes,
            "state": arm.state_bytes / param_bytes,
        }
        for clock, suffix in (("wall", ""), ("cpu", "_cpu")):
            own, adam = (np.array(times[arm][clock]) for arm in (name, "adam"))
            row |= summarise(f"times_adam{suffix}", own / adam)
            if name.startswith("hub"):
                rest = own - np.array(times["both_arms"][clock])
                row |= summarise(f"hub_overhead{suffix}", rest / adam)
        out[name] = row
    return out


def summarise(name: str, values: np.ndarray) -> dict:
    """Median and range."""
    return {name: float(np.median(values)), f"{name}_range": [values.min(), values.max()]}


def measure(name: str, shapes: PyTree, repeats: int) -> dict:
    """One set of parameters."""
    chosen = optimizers() | hubs()
    leaves = jax.tree.leaves(shapes, is_leaf=lambda node: isinstance(node, tuple))
    size = sum(int(np.prod(shape)) for shape in leaves)
    arms = {arm: step_arm(optimizer, shapes) for arm, optimizer in chosen.items()}
    return {
        "set": name,
        "parameters": size,
        "leaves": len(leaves),
        "arms": compare(arms, 4 * size, repeats),
    }


def measure_parts(size: int, repeats: int) -> dict:
    """Where the time of one large matrix goes, and a bound on it."""
    width = int(size**0.5)
    arms = {"adam": step_arm(optax.adam(1e-3), {"w": (width, width)})} | parts((width, width))
    arms["velo_fixed"] = step_arm(optimizers()["velo"], {"w": (2, 2)})
    times = take_turns(arms, repeats)
    rate = gemm_gigaflops()
    bound = {
        rule: 1e-6 * width**2 * 2 * (17 * hidden + hidden**2 + outputs * hidden) / rate
        for rule, hidden, outputs in (("celo", 4, 2), ("celo2", 8, 1))
    }
    return {
        "parameters": width**2,
        "milliseconds": {arm: 1e3 * float(np.median(t["wall"])) for arm, t in times.items()},
        "milliseconds_cpu": {arm: 1e3 * float(np.median(t["cpu"])) for arm, t in times.items()},
        "gemm_gigaflops": rate,
        "arithmetic_bound_milliseconds": bound,
    }


def measure_particles(repeats: int) -> list[dict]:
    """Meta-training: many tiny networks at once."""
    rows = []
    for count in PARTICLES:
        arms = {"adam": particle_arm(False, count), "celo2": particle_arm(True, count)}
        rows.append({"particles": count} | compare(arms, 4 * 2410 * count, repeats))
    return rows


def measure_theta() -> dict:
    """How long the published weights take to load, and an optimizer to be made of them."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "theta"
        save_theta(file, random_theta("velo"))
        start = time.perf_counter()
        theta = load_theta(file)
        loaded = time.perf_counter()
        optimizer = velo(theta, NUM_STEPS)
        made = time.perf_counter()
        jax.block_until_ready(optimizer.init(random_arrays(mlp(10**5), 0)))
        return {
            "bytes": file.stat().st_size,
            "load_seconds": loaded - start,
            "construct_seconds": made - loaded,
            "init_seconds": time.perf_counter() - made,
        }


def gemm_gigaflops(size: int = 1000) -> float:
    """What this process reaches in one large matrix product."""
    x = jnp.ones((size, size))
    product = jax.jit(jnp.matmul).lower(x, x).compile()
    jax.block_until_ready(product(x, x))
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(product(x, x))
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e9


# Reporting.


def format_row(row: dict) -> str:
    """One line per arm."""
    lines = [f"\n{row['set']}: {row['parameters']} parameters in {row['leaves']} tensors"]
    for name, arm in row["arms"].items():
        text = (
            f"  {name:17s}{arm['milliseconds']:9.2f} ms {arm['times_adam']:7.1f}x Adam "
            f"(processor {arm['times_adam_cpu']:6.1f}x)  temporary {arm['temporary']:6.2f}, "
            f"state {arm['state']:5.2f}  compile {arm['compile_seconds']:5.1f} s"
        )
        if "hub_overhead" in arm:
            text += (
                f"  overhead {arm['hub_overhead']:5.2f} (processor {arm['hub_overhead_cpu']:5.2f})"
            )
        lines.append(text)
    return "\n".join(lines)


def machine(core: int) -> dict:
    """The processor, and what else it was doing."""
    info = pathlib.Path("/proc/cpuinfo").read_text()
    model = next(line for line in info.splitlines() if line.startswith("model name"))
    return {
        "cpu": model.partition(":")[2].strip(),
        "cpus": os.cpu_count(),
        "cpu_used": core,
        "python": platform.python_version(),
        "load_average_before": os.getloadavg(),
    }


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    sizes = [10**5, 10**6, 10**7]
    parser.add_argument("--sizes", type=int, nargs="+", default=sizes, help="parameters, about")
    parser.add_argument("--repeats", type=int, default=7, help="of every arm, in turn")
    default = pathlib.Path(__file__).with_name("results.json")
    parser.add_argument("--out", type=pathlib.Path, default=default, help="where the result goes")
    return parser.parse_args()


def main():
    """Runs the benchmark."""
    args = parse_args()
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})  # before the first computation: XLA starts as many threads
    report = {
        "schema": 1,
        "command": shlex.join(["python", *sys.argv]),
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "optax")},
        "machine": machine(core),
        "notes": NOTES,
        "repeats": args.repeats,
        "theta": measure_theta(),
        "particles": measure_particles(args.repeats),
        "parts": measure_parts(10**6, args.repeats),
        "rows": [],
    }
    print(json.dumps({k: report[k] for k in ("theta", "parts", "particles")}, indent=1), flush=True)
    for size in args.sizes:
        for name, shapes in (("mlp", mlp(size)), ("many", many(size))):
            report["rows"].append(measure(name, shapes, args.repeats))
            print(format_row(report["rows"][-1]), flush=True)
    report["machine"]["load_average_after"] = os.getloadavg()
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    write(args.out)


if __name__ == "__main__":
    main()
