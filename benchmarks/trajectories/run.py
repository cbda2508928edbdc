"""Times the preparation of trajectories of 1,000 tasks against what a user would write first.

`rollout` over all tasks, compiled once (one `jax.vmap`, or `jax.lax.map` over vmapped batches), against
a Python loop of jitted optimizer steps and against eager PyTorch on one thread: the same tasks, starts,
images and optimizers, every state kept. All arms run in turn, on one core and then on all cores that
this process may use; the whole is done in two rounds of fresh processes, to show the noise.
Needs Linux (to bind processes to cores) and the extra `bench`.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import pathlib
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from benchmarks.trajectories.report import write
from lohp_jax.data import image_set
from lohp_jax.optimizers import make_optimizer
from lohp_jax.tasks import make_family
from lohp_jax.trajectories.prepare import perturb
from lohp_jax.trajectories.rollout import rollout
from lohp_jax.types import Params, PyTree, TaskFamily

LOOP_TASKS = 100
"""Tasks that the loop and PyTorch measure, whose time per step does not depend on their number."""
AGREEMENT_TASKS = 20
MAP_BATCHES = (1, 64, 256)
REPEATS = 3
ROUNDS = 2
START_NOISE = 0.01
SAM_RHO = 0.05
TOLERANCE = 1e-6
NOTES = (
    "Ratios are per task, of the same repeat: the median, and the range over repeats.",
    "PyTorch has one thread throughout; only the rows of one core compare equal hardware.",
    "PyTorch is given the drawn batches and the task's images, gathered once; JAX draws and gathers.",
    "float32_difference: largest differences from rollout_vmap. Adam turns rounding errors into steps "
    "where a gradient is close to zero; float64_difference shows that the arms do the same work.",
    "spread: (slowest - fastest) / median of the repeats.",
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """Tasks and the teacher that they get; `network=False` leaves the optimizer on a bare Σ θ²."""

    family: str
    optimizer: str
    num_steps: int
    batch_size: int | None = None
    network: bool = True

    @property
    def name(self) -> str:
        """A short text that identifies the setting."""
        batch = f"batch {self.batch_size}" if self.batch_size else "full batch"
        return f"{self.family}, {self.optimizer}, {batch if self.network else 'no network'}"


SETTINGS = (
    Setting("digits_5way", "adam:0.1", 20),
    Setting("digits_5way", "sgd:1", 20),
    Setting("digits_5way", "sam:1", 20),
    Setting("digits_5way", "adam:0.1", 20, batch_size=64),
    Setting("digits_5way", "adam:0.1", 20, network=False),
    Setting("digits_partitions", "adam:0.01", 40),
)


class Tasks(NamedTuple):
    """What `rollout` maps over, each with a leading axis of tasks."""

    data: PyTree
    params: Params
    key: jax.Array


class Result(NamedTuple):
    """Leaves of the states, `[tasks, T + 1, ...]` each, and losses `[tasks, T + 1]`."""

    states: Sequence[np.ndarray]
    losses: np.ndarray


class Arm(NamedTuple):
    """One way to do the work: `run` does it for `num_tasks` and blocks; `read` makes a `Result`."""

    run: Callable[[], PyTree]
    read: Callable[[PyTree], Result]
    num_tasks: int
    compile_seconds: float = 0.0
    temporary_bytes: int = 0


# The tasks.


def _square(params: Params, data: PyTree, key: jax.Array) -> jax.Array:
    del data, key
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def build_family(setting: Setting) -> TaskFamily:
    """The family of `setting`, with its default network."""
    family = make_family(setting.family, batch_size=setting.batch_size)
    return family if setting.network else dataclasses.replace(family, loss=_square)


def draw_tasks(family: TaskFamily, num_tasks: int) -> Tasks:
    """Training tasks, and starts near one shared theta_0."""
    init_key, *keys = jax.random.split(jax.random.key(0), 4)
    theta_0 = family.init(init_key)
    data_keys, start_keys, loss_keys = (jax.random.split(key, num_tasks) for key in keys)
    starts = jax.vmap(lambda key: perturb(theta_0, key, scale=START_NOISE))(start_keys)
    return Tasks(jax.vmap(family.sample)(data_keys), starts, loss_keys)


def first(tasks: Tasks, count: int) -> Tasks:
    """The first `count` tasks."""
    return jax.tree.map(lambda leaf: leaf[:count], tasks)


# Arm 1: rollout.


def rollout_arm(family: TaskFamily, setting: Setting, tasks: Tasks, batch: int) -> Arm:
    """`rollout` of all tasks in one call, vmapped over `batch` of them at a time."""
    optimizer = make_optimizer(setting.optimizer)

    def one_task(task):
        return rollout(family, optimizer, *task, num_steps=setting.num_steps)

    def all_tasks(tasks):
        if batch == len(tasks.key):
            return jax.vmap(one_task)(tasks)
        return jax.lax.map(one_task, tasks, batch_size=batch)

    start = time.perf_counter()
    compiled = jax.jit(all_tasks).lower(tasks).compile()
    seconds = time.perf_counter() - start
    return Arm(
        lambda: jax.block_until_ready(compiled(tasks)),
        lambda out: Result([*map(np.asarray, jax.tree.leaves(out.states))], np.asarray(out.losses)),
        len(tasks.key),
        seconds,
        compiled.memory_analysis().temp_size_in_bytes,
    )


def threaded_arm(family: TaskFamily, setting: Setting, tasks: Tasks, num_threads: int) -> Arm:
    """As many Python threads as cores, each with one compiled `rollout` over its share of tasks."""
    share = len(tasks.key) // num_threads
    parts = [
        rollout_arm(family, setting, jax.tree.map(lambda leaf, i=i: leaf[i : i + share], tasks), 1)
        for i in range(0, share * num_threads, share)
    ]
    pool = concurrent.futures.ThreadPoolExecutor(num_threads)

    def read(out):
        states, losses = zip(
            *(part.read(o) for part, o in zip(parts, out, strict=True)), strict=True
        )
        return Result([*map(np.concatenate, zip(*states, strict=True))], np.concatenate(losses))

    return parts[0]._replace(
        run=lambda: list(pool.map(lambda part: part.run(), parts)),
        read=read,
        num_tasks=share * num_threads,
        temporary_bytes=sum(part.temporary_bytes for part in parts),
    )


# Arm 2: a loop of jitted steps.


def loop_arm(family: TaskFamily, setting: Setting, tasks: Tasks) -> Arm:
    """One jitted function does a whole step; a Python loop goes over steps and tasks."""
    optimizer = make_optimizer(setting.optimizer)
    loss = jax.jit(family.loss)

    @jax.jit
    def step(params, opt_state, data, key):
        def grad_fn(params, _):
            return jax.grad(family.loss)(params, data, key)

        value, grads = jax.value_and_grad(family.loss)(params, data, key)
        updates, opt_state = optimizer.update(grads, opt_state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), opt_state, value

    def one_task(data, params, keys):
        states, losses, opt_state = [params], [], optimizer.init(params)
        for key in keys[:-1]:
            params, opt_state, value = step(params, opt_state, data, key)
            states.append(params)
            losses.append(value)
        return states, [*losses, loss(params, data, keys[-1])]

    split_tasks = [
        (*(jax.tree.map(lambda leaf, i=i: leaf[i], part) for part in tasks[:2]), [*keys])
        for i, keys in enumerate(step_keys(tasks, setting))
    ]
    start = time.perf_counter()
    jax.block_until_ready(one_task(*split_tasks[0]))
    return Arm(
        lambda: jax.block_until_ready([one_task(*task) for task in split_tasks]),
        _read_loop,
        len(split_tasks),
        time.perf_counter() - start,
    )


def step_keys(tasks: Tasks, setting: Setting) -> jax.Array:
    """`[tasks, T + 1]`: the keys that `rollout` hands to the inner loss."""
    return jax.vmap(lambda key: jax.random.split(key, setting.num_steps + 1))(tasks.key)


def _read_loop(out: PyTree) -> Result:
    trajectories = [jax.tree.leaves(jax.tree.map(lambda *s: np.stack(s), *s)) for s, _ in out]
    return Result([*map(np.stack, zip(*trajectories, strict=True))], np.array([v for _, v in out]))


# Arm 3: PyTorch.


class TorchTask(NamedTuple):
    """A task: start (leaves), images `[N, pixels]`, labels `[N]`, and `[T + 1, batch]` or None."""

    start: list[torch.Tensor]
    classes: torch.Tensor
    labels: torch.Tensor
    batches: torch.Tensor | None


def torch_arm(setting: Setting, tasks: Tasks) -> Arm:
    """Eager PyTorch on one thread, with fused optimizers; it is given the drawn batches."""
    torch.set_num_threads(1)
    dtype = torch.from_numpy(np.array(jax.tree.leaves(tasks.params)[0])).dtype
    pool = torch.from_numpy(image_set("digits").train).flatten(2).to(dtype)
    torch_tasks = _torch_tasks(setting, tasks, pool.shape[1])
    torch_trajectory(setting, torch_tasks[0], pool)
    return Arm(
        lambda: [torch_trajectory(setting, task, pool) for task in torch_tasks],
        _read_torch,
        len(torch_tasks),
    )


def _torch_tasks(setting: Setting, tasks: Tasks, per_class: int) -> list[TorchTask]:
    """Converts `tasks`; batches are drawn with the keys and the call of the family's own loss."""
    leaves, classes, labels = jax.tree.map(
        lambda leaf: torch.from_numpy(np.array(leaf)),
        (jax.tree.leaves(tasks.params), tasks.data["classes"], tasks.data["labels"]),
    )
    batches = [None] * len(tasks.key)
    if setting.batch_size is not None:
        index = jnp.arange(tasks.data["classes"].shape[1] * per_class)
        draw = jax.vmap(jax.vmap(lambda k: jax.random.choice(k, index, (setting.batch_size,))))
        batches = torch.from_numpy(np.array(draw(step_keys(tasks, setting))))
    return [
        TorchTask(list(start), classes[i].long(), labels[i].long(), batches[i])
        for i, start in enumerate(zip(*leaves, strict=True))
    ]


def torch_trajectory(
    setting: Setting, task: TorchTask, pool: torch.Tensor
) -> tuple[list[list[torch.Tensor]], list[torch.Tensor]]:
    """States and losses of one task; `pool` is `[classes, images, pixels]`."""
    images, labels = pool[task.classes].flatten(0, 1), task.labels.repeat_interleave(pool.shape[1])
    params = [leaf.clone().requires_grad_() for leaf in task.start]
    kind, _, rate = setting.optimizer.partition(":")
    factory = torch.optim.Adam if kind == "adam" else torch.optim.SGD
    optimizer = factory(params, lr=float(rate), fused=True)
    states, losses = [], []

    def loss_of_step(step):
        if not setting.network:
            return sum(torch.sum(p**2) for p in params)
        if task.batches is None:
            return cross_entropy(params, images, labels)
        return cross_entropy(params, images[task.batches[step]], labels[task.batches[step]])

    def backward(step):
        optimizer.zero_grad()
        loss = loss_of_step(step)
        loss.backward()
        return loss.detach()

    for step in range(setting.num_steps):
        states.append([p.detach().clone() for p in params])
        losses.append(backward(step))
        if kind == "sam":
            with sharpest_neighbour(params, states[-1]):
                backward(step)
        optimizer.step()
    with torch.no_grad():
        losses.append(loss_of_step(setting.num_steps))
    return [*states, [p.detach() for p in params]], losses


def cross_entropy(
    leaves: Sequence[torch.Tensor], images: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Loss of a linear or one-hidden-layer classifier; the leaves as JAX orders them."""
    head_bias, head_weight, *hidden = leaves
    if hidden:
        images = torch.relu(torch.addmm(hidden[0], images, hidden[1]))
    logits = torch.addmm(head_bias, images, head_weight)
    return torch.nn.functional.cross_entropy(logits, labels)


@contextlib.contextmanager
def sharpest_neighbour(params: Sequence[torch.Tensor], state: Sequence[torch.Tensor]):
    """Moves `params` by `SAM_RHO` along their gradients, and back to `state` on leaving."""
    with torch.no_grad():
        norm = torch.nn.utils.get_total_norm([p.grad for p in params])
        for p in params:
            p.add_(p.grad * (SAM_RHO / norm))
    yield
    with torch.no_grad():
        for p, s in zip(params, state, strict=True):
            p.copy_(s)


def _read_torch(out: PyTree) -> Result:
    leaves = [[torch.stack(s).numpy() for s in zip(*states, strict=True)] for states, _ in out]
    losses = np.array([[loss.item() for loss in losses] for _, losses in out])
    return Result([*map(np.stack, zip(*leaves, strict=True))], losses)


# Measuring.


def measure(setting: Setting, num_tasks: int) -> dict:
    """Times every arm `REPEATS` times, in turn, and compares what they return."""
    family = build_family(setting)
    tasks = draw_tasks(family, num_tasks)
    few = first(tasks, LOOP_TASKS)
    batches = [b for b in MAP_BATCHES if b < num_tasks]
    arms = {"rollout_vmap": rollout_arm(family, setting, tasks, num_tasks)}
    arms |= {f"rollout_map_{b}": rollout_arm(family, setting, tasks, b) for b in batches}
    if (num_cores := len(os.sched_getaffinity(0))) > 1:
        arms["rollout_threads"] = threaded_arm(family, setting, tasks, num_cores)
    arms |= {"loop": loop_arm(family, setting, few), "torch": torch_arm(setting, few)}
    results = {name: arm.read(arm.run()) for name, arm in arms.items()}
    seconds = collections.defaultdict(list)
    for _ in range(REPEATS):
        for name, arm in arms.items():
            start = time.perf_counter()
            arm.run()
            seconds[name].append(time.perf_counter() - start)
    return {
        "setting": setting.name,
        "num_steps": setting.num_steps,
        "dimension": sum(leaf[0].size for leaf in jax.tree.leaves(tasks.params)),
        "megaflop_per_step": _flop_per_step(family, setting, tasks) / 1e6,
        "arms": {name: _describe(arm, seconds[name], setting) for name, arm in arms.items()},
        "float32_difference": differences(results),
    }


def _describe(arm: Arm, seconds: list[float], setting: Setting) -> dict:
    per_step = float(np.median(seconds)) / (arm.num_tasks * setting.num_steps)
    return {
        "tasks_measured": arm.num_tasks,
        "seconds": seconds,
        "microseconds_per_step": 1e6 * per_step,
        "spread": (max(seconds) - min(seconds)) / float(np.median(seconds)),
        "compile_seconds": arm.compile_seconds,
        "temporary_megabytes": arm.temporary_bytes / 1e6,
    }


def _flop_per_step(family: TaskFamily, setting: Setting, tasks: Tasks) -> float:
    """What XLA counts for the gradients of one step of one task."""
    one = jax.tree.map(lambda leaf: leaf[0], tasks)
    gradient = jax.jit(jax.value_and_grad(family.loss)).lower(one.params, one.data, one.key)
    gradients = 2 if setting.optimizer.startswith("sam") else 1
    return gradients * gradient.compile().cost_analysis()["flops"]


def differences(results: dict[str, Result]) -> dict[str, dict[str, float]]:
    """Largest absolute difference of each arm's states and losses from the first arm's."""
    reference, *_ = results.values()

    def largest(xs, ys):
        return max(
            float(np.abs(x[: len(y)] - y[: len(x)]).max()) for x, y in zip(xs, ys, strict=True)
        )

    return {
        name: {
            "states": largest(reference.states, result.states),
            "losses": largest([reference.losses], [result.losses]),
        }
        for name, result in results.items()
        if result is not reference
    }


def float64_differences(setting: Setting) -> dict[str, dict[str, float]]:
    """`differences` on a few tasks in float64, where rounding does not hide a difference in the work.

    Raises: RuntimeError, if the arms do not do the same work.
    """
    with jax.enable_x64(True):
        family = build_family(setting)
        tasks = draw_tasks(family, AGREEMENT_TASKS)
        arms = {
            "rollout_vmap": rollout_arm(family, setting, tasks, AGREEMENT_TASKS),
            "rollout_map_1": rollout_arm(family, setting, tasks, 1),
            "loop": loop_arm(family, setting, tasks),
            "torch": torch_arm(setting, tasks),
        }
        found = differences({name: arm.read(arm.run()) for name, arm in arms.items()})
    if max(value for pair in found.values() for value in pair.values()) > TOLERANCE:
        raise RuntimeError(f"{setting.name}: arms differ by more than {TOLERANCE}: {found}")
    return found


def gemm_gigaflops(size: int = 1000) -> float:
    """What this process reaches in one large matrix product, an upper bound for the arms."""
    x = jnp.ones((size, size))
    product = jax.jit(jnp.matmul).lower(x, x).compile()
    jax.block_until_ready(product(x, x))
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(product(x, x))
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e9


def on_cores(cores: set[int], function: Callable, *args):
    """`function(*args)` in a fresh process, bound to `cores` from its first instruction."""
    inherited = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as process:
            return process.submit(function, *args).result()
    finally:
        os.sched_setaffinity(0, inherited)


# Reporting.


def add_ratios(row: dict) -> dict:
    """`row` with each rollout's speed relative to the loop and to PyTorch, by repeat, and GFLOP/s."""
    arms = row["arms"]

    def per_task(name):
        return np.array(arms[name]["seconds"]) / arms[name]["tasks_measured"]

    for name, arm in arms.items():
        arm["gigaflops"] = 1e3 * row["megaflop_per_step"] / arm["microseconds_per_step"]
        if name.startswith("rollout"):
            for other in ("loop", "torch"):
                ratios = per_task(other) / per_task(name)
                arm[f"times_{other}"] = float(np.median(ratios))
                arm[f"times_{other}_range"] = [float(ratios.min()), float(ratios.max())]
    return row


def format_row(row: dict) -> str:
    """One line per arm: time per task and step, speed relative to the loop and PyTorch."""
    head = (
        f"\n{row['setting']}: D={row['dimension']}, {row['num_steps']} steps, "
        f"{row['megaflop_per_step']:.3f} MFLOP a step; {row['cores']} core(s), round {row['round']}"
    )
    lines = [
        f"  {name:16s}{arm['microseconds_per_step']:8.1f} us/step {arm['gigaflops']:6.1f} GFLOP/s"
        + (
            f" {arm['times_loop']:6.1f}x loop {arm['times_torch']:6.1f}x torch"
            f"   compile {arm['compile_seconds']:4.1f} s, {arm['temporary_megabytes']:6.0f} MB"
            if name.startswith("rollout")
            else ""
        )
        for name, arm in row["arms"].items()
    ]
    return "\n".join([head, *lines])


def noise(rows: list[dict]) -> dict[str, float]:
    """How far repeats of an arm in one process, and its medians in two rounds, lie apart."""
    spreads = [arm["spread"] for row in rows for arm in row["arms"].values()]
    rounds = collections.defaultdict(list)
    for row in rows:
        for name, arm in row["arms"].items():
            rounds[row["setting"], row["cores"], name].append(arm["microseconds_per_step"])
    between = [max(times) / min(times) - 1 for times in rounds.values()]
    return {
        "spread_median": float(np.median(spreads)),
        "spread_max": max(spreads),
        "between_rounds_median": float(np.median(between)),
        "between_rounds_max": max(between),
    }


def machine(cores: set[int]) -> dict:
    """The processor, and what else it was doing."""
    info = pathlib.Path("/proc/cpuinfo").read_text()
    model = next(line for line in info.splitlines() if line.startswith("model name"))
    return {
        "cpu": model.partition(":")[2].strip(),
        "cpus": os.cpu_count(),
        "cpus_used": sorted(cores),
        "python": platform.python_version(),
        "load_average_before": os.getloadavg(),
    }


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--tasks", type=int, default=1000, help="tasks that rollout does at once")
    default = pathlib.Path(__file__).with_name("results.json")
    parser.add_argument("--out", type=pathlib.Path, default=default, help="where the result goes")
    return parser.parse_args()


def main():
    """Runs the benchmark."""
    args = parse_args()
    all_cores = os.sched_getaffinity(0)
    core_sets = [{max(all_cores)}] + ([all_cores] if len(all_cores) > 1 else [])
    report = {
        "schema": 1,
        "command": shlex.join(["python", *sys.argv]),
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "optax", "torch")},
        "machine": machine(all_cores),
        "gemm_gigaflops": {len(cores): on_cores(cores, gemm_gigaflops) for cores in core_sets},
        "float64_difference": {
            setting.name: on_cores(all_cores, float64_differences, setting) for setting in SETTINGS
        },
        "notes": NOTES,
        "rows": [],
    }
    for number in range(1, ROUNDS + 1):
        for setting in SETTINGS:
            for cores in core_sets:
                row = add_ratios(on_cores(cores, measure, setting, args.tasks))
                report["rows"].append({"round": number, "cores": len(cores)} | row)
                print(format_row(report["rows"][-1]), flush=True)
    report["machine"]["load_average_after"] = os.getloadavg()
    report["noise"] = noise(report["rows"])
    print(f"\n{report['noise']}")
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    write(args.out)


if __name__ == "__main__":
    main()
