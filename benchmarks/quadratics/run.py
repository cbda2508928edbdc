"""What Lo-Hp's objective learns where every optimal trajectory is known in closed form.

    python -m benchmarks.quadratics.run [--seeds 3]

A task is a quadratic with a minimum of its own and curvatures that all share; its optimal trajectory is
gradient flow, θ(t) = c + exp(-H t) (θ_0 - c). The policy is given c and trained on trajectories of other
minima by the well-posed objective, by the published one and by cloning, with k steps of the flow to one
of its own, at each of `RATES`. A run that is in results.json is not repeated. Writes the table and the
picture of README.md.
"""

import argparse
import functools
import itertools
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.linalg
import numpy as np
import optax

import lohp_jax as lj
from benchmarks.quadratics import report
from benchmarks.quadratics.report import NUM_STEPS, RESULTS
from lohp_jax.files import write_atomically
from lohp_jax.fitting import FitConfig, Gathered, gather
from lohp_jax.methods.training import make_training
from lohp_jax.policy import gaussian
from lohp_jax.policy.config import PAPER_LITERAL, HybridConfig
from lohp_jax.policy.kernels import (
    Policy,
    backward_kernel,
    kernels_along,
    make_policy,
    real_weights,
    roll_out,
    widths,
)
from lohp_jax.runs.directory import environment
from lohp_jax.training import engine
from lohp_jax.training.engine import DivergedError
from lohp_jax.trajectories.prepare import prepare
from lohp_jax.trajectories.teachers import make_teachers
from lohp_jax.types import Example, PyTree, TaskFamily

DIMENSION, STEP = 8, 0.25
CURVATURES = np.geomspace(0.1, 2.0, DIMENSION)
NETWORK = lj.NetworkConfig(trunk="mlp", widths=(64, 64), embedding=64)
METHODS = {
    "lohp": (lj.lohp(network=NETWORK), HybridConfig()),
    "paper_literal": (lj.paper_literal(network=NETWORK), PAPER_LITERAL),
    "cloning": (lj.cloning(network=NETWORK), HybridConfig()),
}
COMPRESSIONS = (1, 2, 4)
RATES = (1e-3, 3e-3)
UPDATES, LOG_EVERY = 600, 50
NUM_TASKS = 256
"""Tasks that a policy is measured on, of either split."""


def hessian() -> np.ndarray:
    """`[D, D]` of every task: `CURVATURES` along random orthogonal axes."""
    normal = np.random.default_rng(0).normal(size=(DIMENSION, DIMENSION))
    axes, _ = np.linalg.qr(normal)
    return (axes * CURVATURES) @ axes.T


def flowed(start: jax.Array, minimum: jax.Array, time: jax.Array) -> jax.Array:
    """`[D]` where gradient flow from `start` is after some time."""
    decay = jax.scipy.linalg.expm(-jnp.asarray(hessian(), jnp.float32) * time)
    return minimum + decay @ (start - minimum)


def gradient_flow() -> optax.GradientTransformation:
    """The optimizer whose steps on these tasks are exactly `STEP` of gradient flow."""
    matrix = hessian()
    way = np.eye(DIMENSION) - jax.device_get(jax.scipy.linalg.expm(-matrix * STEP))
    step = jnp.asarray(way @ np.linalg.inv(matrix), jnp.float32)
    return optax.stateless(lambda updates, params: jax.tree.map(lambda g: -step @ g, updates))


def family() -> TaskFamily:
    """Quadratics (θ - c)ᵀ H (θ - c) / 2 with c standard normal; the context is the task itself."""
    matrix = jnp.asarray(hessian(), jnp.float32)

    def sample(key, split="train"):
        key = jax.random.fold_in(key, split == "held_out")
        return {"minimum": jax.random.normal(key, (DIMENSION,))}

    def loss(params, data, key=None):
        away = params["theta"] - data["minimum"]
        return 0.5 * away @ matrix @ away

    def evaluate(params, data):
        value = loss(params, data)
        return {"objective": value, "loss": value}

    return TaskFamily(
        sample,
        lambda key: {"theta": jnp.zeros(DIMENSION)},
        loss,
        evaluate,
        lambda data, key: data,
        name="quadratics",
    )


def measure(policy: Policy, params: PyTree, examples: Example, key: jax.Array) -> dict[str, Any]:
    """How far a policy is from the exact trajectories, and its bounds of log Z.

    Args:
      policy: the policy.
      params: of its network.
      examples: the exact trajectories, leading axis R.
      key: of the sampled walks.

    Returns: `end_error` and `path_error`, distances of walks along the means over the length of the
      trajectory, and `elbo` and `eubo` less log Z, in nats per weight.
    """

    def one(example, key):
        walk_key, back_key = jax.random.split(key)
        embedding = policy.network.encode(params, example.context, 1.0)
        walk = functools.partial(roll_out, policy, params, embedding, example.teacher)
        away = jnp.linalg.norm(walk(key, temperature=0.0) - example.tokens, axis=(1, 2))
        away /= jnp.linalg.norm(example.tokens[-1] - example.tokens[0])
        forth = walk(walk_key, temperature=1.0)
        back = walk_back(policy, params, embedding, example, back_key)
        weigh = functools.partial(log_weight, policy, params, embedding, example)
        return {
            "end_error": away[-1],
            "path_error": away[1:].mean(),
            "elbo": weigh(forth) / DIMENSION,
            "eubo": weigh(back) / DIMENSION,
        }

    keys = jax.random.split(key, len(examples.tokens))
    return jax.tree.map(jnp.mean, jax.vmap(one)(examples, keys))


def log_weight(
    policy: Policy, params: PyTree, embedding: PyTree, example: Example, states: jax.Array
) -> jax.Array:
    """Log of R(s_N) Π P_B / (Z p_0(s_0) Π P_F), whose mean is at most 0 on walks of the policy.

    R is the reward of the last step, exp(-|s - z_N|² / (2 τ_N²)).
    """
    forward, backward = kernels_along(policy, params, embedding, example, states)
    ratio = gaussian.log_ratio_per_dimension(states[:-1], states[1:], *forward, *backward)
    log_std = jnp.log(widths(policy))
    start = gaussian.log_prob(states[0], jnp.zeros_like(states[0]), log_std[0])
    end = gaussian.log_prob(states[-1], example.tokens[-1], log_std[-1])  # log R - log Z
    terms = jnp.concatenate([end[None], -start[None], -ratio])
    return real_weights(policy, terms).sum()


def walk_back(
    policy: Policy, params: PyTree, embedding: PyTree, example: Example, key: jax.Array
) -> jax.Array:
    """`[N + 1, length, channels]` states drawn from the target and then by P_B."""
    keys = jax.random.split(key, policy.num_steps + 1)
    tokens, mask = example.tokens, policy.codec.mask
    log_std = jnp.log(widths(policy)[-1])
    last = jnp.where(mask, gaussian.sample(keys[-1], tokens[-1], log_std), 0.0)

    def step(state, m):
        heads = policy.network.heads(params, embedding, example.teacher, m, state)
        kernel = backward_kernel(policy, heads, m, state, tokens[m], tokens[m + 1])
        before = jnp.where(mask, gaussian.sample(keys[m], *kernel), 0.0)
        return before, before

    _, states = jax.lax.scan(step, last, jnp.arange(policy.num_steps), reverse=True)
    return jnp.concatenate([states, last[None]])


def exact(gathered: Gathered, split: str, compression: int) -> Example:
    """The exact trajectories of `NUM_TASKS` tasks, every `compression` steps, leading axis R."""
    space = gathered.space
    times = STEP * compression * jnp.arange(space.num_steps + 1)
    start = space.theta_0["theta"]

    def one(key):
        data = space.family.sample(key, split)
        path = jax.vmap(lambda time: flowed(start, data["minimum"], time))(times)
        tokens = jax.vmap(lambda theta: space.codec.encode({"theta": theta}))(path)
        return Example(tokens, jnp.zeros((), jnp.int32), data, data)

    return jax.vmap(one)(jax.random.split(jax.random.key(100), NUM_TASKS))


def run(method: str, compression: int, rate: float, seed: int) -> dict[str, Any]:
    """Errors of one training on tasks of both splits, every `LOG_EVERY` updates."""
    tasks, (made, config) = family(), METHODS[method]
    settings = FitConfig(
        num_steps=NUM_STEPS,
        compression=compression,
        updates=UPDATES,
        learning_rate=rate,
        log_every=LOG_EVERY,
        start_noise=0.0,
        channels=DIMENSION,
    )
    prepare_key, train_key, measure_key = jax.random.split(jax.random.key(seed), 3)
    theta_0 = tasks.init(prepare_key)
    teachers = make_teachers([("gradient_flow", gradient_flow())], NUM_STEPS, theta_0)
    sizes = {name: getattr(settings, name) for name in ("num_tasks", "num_steps", "start_noise")}
    store = prepare(tasks, teachers, theta_0=theta_0, key=prepare_key, **sizes)
    gathered = gather(tasks, store, theta_0, teachers, settings)
    policy = make_policy(gathered.space, NETWORK, config)
    examples = {split: exact(gathered, split, compression) for split in ("train", "held_out")}
    measured = jax.jit(functools.partial(measure, policy))
    curve = []

    def keep(state):
        errors = {s: measured(state.params, some, measure_key) for s, some in examples.items()}
        curve.append({"updates": int(state.step)} | jax.tree.map(float, jax.device_get(errors)))

    row = {"method": method, "compression": compression, "rate": rate, "seed": seed}
    training = make_training(made, gathered.space, gathered.dataset, settings.updating(), train_key)
    try:
        engine.train(training, on_state=keep)
    except DivergedError as error:
        row["diverged"] = str(error)
    return row | {"curve": curve}


def main() -> None:
    """Runs what is missing and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    rows = json.loads(options.results.read_text())["rows"] if options.results.exists() else []
    asked = itertools.product(range(options.seeds), METHODS, COMPRESSIONS, RATES)
    for seed, method, compression, rate in asked:
        place = {"method": method, "compression": compression, "rate": rate, "seed": seed}
        if any(place.items() <= row.items() for row in rows):
            continue
        row = run(**place)
        print(place, row["curve"][-1:], row.get("diverged", ""), flush=True)
        rows.append(row)
        content = {"schema": 1, "environment": environment(), "rows": rows}
        write_atomically(options.results, (json.dumps(content, indent=1) + "\n").encode())
    report.write(options.results)


if __name__ == "__main__":
    sys.exit(main())
