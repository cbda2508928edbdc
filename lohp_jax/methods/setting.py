"""What a learned method is trained on: the policy in its frame, the data set, the objective."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.codec import make_codec, standard_scale
from lohp_jax.diffusion.schedule import level_features
from lohp_jax.methods.cloning import cloning_loss
from lohp_jax.methods.hypernetwork import regression_loss, task_loss
from lohp_jax.methods.weight_diffusion import denoising_loss
from lohp_jax.networks.policy import make_policy_network
from lohp_jax.policy.hybrid import PRESETS, Example, HybridConfig, Policy, hybrid_loss
from lohp_jax.runs.config import RunConfig
from lohp_jax.tasks import make_family
from lohp_jax.trajectories.matching import match
from lohp_jax.trajectories.store import Store, take_states
from lohp_jax.types import Params, PyTree, TaskFamily, Trajectory

Objective = Callable[[dict, Example, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


class Frame(NamedTuple):
    """The coordinates in which weights are generated; saved in every checkpoint.

    Attributes:
      theta_0: the shared start, the origin.
      scale: one number per leaf, the unit.
      optimizer: int32 scalar, the kind of trajectory to imitate where nothing else is asked.
    """

    theta_0: Params
    scale: PyTree
    optimizer: jax.Array


class Dataset(NamedTuple):
    """All stored trajectories at their matched states; leading axis R.

    Attributes:
      tokens: `[R, N + 1, length, channels]`.
      optimizer: `[R]` int32.
      data: the tasks, a pytree.
    """

    tokens: jax.Array
    optimizer: jax.Array
    data: PyTree


@functools.lru_cache(maxsize=4)
def family_of(config: RunConfig) -> TaskFamily:
    """The task family of a resolved config; its images are read once for all stages of a run.

    Raises: what `make_family` raises.
    """
    tasks = config.tasks
    return make_family(
        config.family,
        data=tasks.data,
        data_dir=tasks.data_dir,
        network=tasks.network,
        shots=tasks.shots,
        teacher_data=tasks.teacher_data,
        holdout=tasks.holdout,
        batch_size=tasks.batch_size,
        seed=config.seed,
    )


def make_frame(store: Store, theta_0: Params) -> Frame:
    """The frame that fits a store: the unit is how far its trajectories went, root mean square.

    The optimizer to imitate is the one that reached the lowest mean inner loss.
    """
    ends = store.load(
        lambda shard: {
            "end": jax.tree.map(lambda leaf: leaf[:, -1], shard["states"]),
            "loss": shard["losses"][:, -1],
            "teacher": shard["teacher"],
        }
    )
    kinds = np.unique(ends["teacher"])
    final = [ends["loss"][ends["teacher"] == kind].mean() for kind in kinds]
    best = jnp.asarray(kinds[int(np.argmin(final))], jnp.int32)
    return Frame(theta_0, standard_scale(ends["end"], theta_0), best)


def make_policy(config: RunConfig, family: TaskFamily, frame: Frame, method: str) -> Policy:
    """The policy that `method` trains; hypernetworks are policies of a single step.

    The network of `lo_di` is told a noise level in place of a step; it samples with `denoise_from_noise`
    in place of `roll_out`.
    """
    channels = config.network.channels
    codec = make_codec(
        frame.theta_0,
        channels=channels,
        reference=frame.theta_0,
        scale=frame.scale,
        class_axes=family.class_axes,
    )
    unit = jax.tree.map(
        lambda p: p / jnp.maximum(jnp.sqrt(jnp.mean(p**2)), jnp.finfo(p.dtype).tiny), frame.theta_0
    )
    one_step = method.startswith("hypernetwork")
    num_steps = 1 if one_step else config.prepare.num_steps // config.training.compression
    network = make_policy_network(
        codec,
        config.network,
        codec.lay_out(unit),
        num_steps=num_steps,
        num_optimizers=len(config.prepare.optimizers),
        step_features=level_features if method == "lo_di" else None,
    )
    return Policy(network, codec, _balance_of(config, method), num_steps)


def _balance_of(config: RunConfig, method: str) -> HybridConfig:
    """The config's, but for the published form, and for Lo-Op, balance on the policy's states alone."""
    if method == "paper_literal":
        return PRESETS["paper_literal"]
    if method == "lo_op":
        return dataclasses.replace(config.balance, off_policy=0.0, on_policy=1.0)
    return config.balance


def make_dataset(config: RunConfig, store: Store, policy: Policy) -> Dataset:
    """Encodes the matched states of every stored trajectory; reads no others."""
    num_states = config.prepare.num_steps // config.training.compression + 1
    matched = jax.jit(jax.vmap(lambda t: match(t, num_states, how=config.training.matching)))

    def select(shard):
        path_matters = config.training.matching in ("arc_length", "curvature")
        states = shard["states"] if path_matters else {}
        indices = np.asarray(matched(Trajectory(states, shard["losses"], None)))
        return {**shard, "states": take_states(shard["states"], indices)}

    loaded = store.load(select)
    tokens = jax.jit(jax.vmap(jax.vmap(policy.codec.encode)))(loaded["states"])
    return Dataset(
        tokens, jnp.asarray(loaded["teacher"]), jax.tree.map(jnp.asarray, loaded["data"])
    )


def make_objective(config: RunConfig, family: TaskFamily, policy: Policy, method: str) -> Objective:
    """`(params, example, key) -> (loss, info)` of a learned method, for one example."""
    balance = functools.partial(hybrid_loss, policy)
    cloning = functools.partial(cloning_loss, policy)
    task = functools.partial(task_loss, policy, family)
    objectives: dict[str, Objective] = {
        "lohp": _weighted([(1.0, balance), (config.training.anchor, cloning)]),
        "lohp_consolidated": _weighted([(1.0, balance), (config.training.consolidation, task)]),
        "cloning": cloning,
        "hypernetwork": task,
        "hypernetwork_regression": functools.partial(regression_loss, policy),
        "lo_di": functools.partial(denoising_loss, policy),
        "lo_op": balance,
        "paper_literal": balance,
    }
    return objectives[method]


def _weighted(terms: Sequence[tuple[float, Objective]]) -> Objective:
    """Weighted sum of objectives; a term of weight zero is not computed."""
    active = [(weight, objective) for weight, objective in terms if weight]

    def objective(params, example, key):
        results = [
            o(params, example, k)
            for (_, o), k in zip(active, jax.random.split(key, len(active)), strict=True)
        ]
        loss = sum(weight * value for (weight, _), (value, _) in zip(active, results, strict=True))
        return loss, {name: x for _, info in results for name, x in info.items()}

    return objective
