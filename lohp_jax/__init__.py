"""Generate the weights of neural networks instead of training them, in JAX.

    data -> tasks -> trajectories -> policy -> generation -> evaluation
                         ^ optimizers

Every stage is a pure function over pytrees that `jax.jit` and `jax.vmap` accept. The names below are
grouped by stage; the modules they come from hold the rest.
"""

from lohp_jax.codec import Codec, make_codec, standard_scale
from lohp_jax.data import image_set
from lohp_jax.data.images import ImageSet
from lohp_jax.generation import generate, load, policy_generator
from lohp_jax.optimizers import make_optimizer
from lohp_jax.optimizers.celo2 import celo2
from lohp_jax.optimizers.hub import block_wise, hub, hub_diagnostics
from lohp_jax.optimizers.lgl2o import lgl2o
from lohp_jax.optimizers.sam import sam
from lohp_jax.optimizers.theta import load_theta, save_theta
from lohp_jax.optimizers.velo import celo, celo_adam, velo
from lohp_jax.policy.hybrid import PRESETS, HybridConfig, Policy, hybrid_loss
from lohp_jax.policy.network import NetworkConfig, make_policy_network
from lohp_jax.tasks import make_family
from lohp_jax.training.config import RunConfig, resolve
from lohp_jax.training.distributed import compile_update
from lohp_jax.training.loop import train
from lohp_jax.training.problem import (
    Dataset,
    Frame,
    make_dataset,
    make_frame,
    make_objective,
    make_policy,
)
from lohp_jax.training.step import TrainState, draw_batches, make_update, scan_updates
from lohp_jax.trajectories.matching import match
from lohp_jax.trajectories.prepare import prepare
from lohp_jax.trajectories.rollout import over_tasks, rollout
from lohp_jax.trajectories.store import open_store
from lohp_jax.types import Generator, TaskFamily, Trajectory
from lohp_jax.version import __version__

__all__ = [
    # types
    "TaskFamily",
    "Trajectory",
    "Generator",
    # data and tasks
    "ImageSet",
    "image_set",
    "make_family",
    # optimizers
    "make_optimizer",
    "sam",
    "hub",
    "block_wise",
    "hub_diagnostics",
    "lgl2o",
    "velo",
    "celo",
    "celo_adam",
    "celo2",
    "load_theta",
    "save_theta",
    # trajectories
    "rollout",
    "over_tasks",
    "match",
    "prepare",
    "open_store",
    # weights as tokens
    "Codec",
    "make_codec",
    "standard_scale",
    # policy
    "HybridConfig",
    "PRESETS",
    "NetworkConfig",
    "Policy",
    "make_policy_network",
    "hybrid_loss",
    # training
    "RunConfig",
    "resolve",
    "Frame",
    "Dataset",
    "make_frame",
    "make_policy",
    "make_dataset",
    "make_objective",
    "TrainState",
    "make_update",
    "draw_batches",
    "scan_updates",
    "compile_update",
    "train",
    # generation
    "generate",
    "load",
    "policy_generator",
    "__version__",
]
