"""Generate the weights of neural networks instead of training them, in JAX.

    data -> tasks -> trajectories -> policy | diffusion -> generation -> evaluation
                         ^ optimizers

Every stage is a pure function over pytrees that `jax.jit` and `jax.vmap` accept. The names below are
grouped by stage; the modules they come from hold the rest.
"""

from lohp_jax.codec import Codec, make_codec, standard_scale
from lohp_jax.data import image_set
from lohp_jax.data.folders import folder_images
from lohp_jax.data.images import ImageSet
from lohp_jax.data.lane import Drive, read_drive, render_drive
from lohp_jax.data.volume import read_volume, resample_volume, synthetic_volume
from lohp_jax.diffusion.config import DiffusionConfig
from lohp_jax.diffusion.generator import diffusion_generator
from lohp_jax.diffusion.guidance import GuidanceConfig
from lohp_jax.diffusion.oracle import OracleConfig
from lohp_jax.diffusion.sampler import Denoiser, sample
from lohp_jax.diffusion.schedule import Schedule
from lohp_jax.diffusion.training import diffusion_params, train_diffusion
from lohp_jax.generation import generate, load, policy_generator
from lohp_jax.learned_solvers.lista import train_lista
from lohp_jax.learned_solvers.recurrent import run_learned_solver, train_learned_solver
from lohp_jax.learned_solvers.regression import train_regression
from lohp_jax.methods.setting import (
    Dataset,
    Frame,
    make_dataset,
    make_frame,
    make_objective,
    make_policy,
)
from lohp_jax.methods.step import TrainState, draw_batches, make_update
from lohp_jax.methods.training import train
from lohp_jax.networks.denoiser import DenoiserConfig
from lohp_jax.networks.ltc import Wiring, auto_ncp, init_ltc, ltc
from lohp_jax.networks.policy import NetworkConfig, make_policy_network
from lohp_jax.optimizers import make_optimizer
from lohp_jax.optimizers.blends import constant_blend, graft
from lohp_jax.optimizers.celo2 import celo2
from lohp_jax.optimizers.hub import block_wise, hand_shares, hub, hub_diagnostics
from lohp_jax.optimizers.lgl2o import lgl2o
from lohp_jax.optimizers.online import hub_online
from lohp_jax.optimizers.pretrained import meta_trained_optimizer, pretrained, pretrained_optimizer
from lohp_jax.optimizers.pull import anchor, decay
from lohp_jax.optimizers.reinit import increase_steps, min_loss_reinit
from lohp_jax.optimizers.sam import sam
from lohp_jax.optimizers.spike import hub_spike
from lohp_jax.optimizers.theta import load_theta, save_theta
from lohp_jax.optimizers.trust import hub_trust
from lohp_jax.optimizers.velo import celo, celo_adam, velo
from lohp_jax.policy.hybrid import PRESETS, HybridConfig, Policy, hybrid_loss
from lohp_jax.problems import make_problem
from lohp_jax.problems.ackley import ackley
from lohp_jax.problems.family import read_problems
from lohp_jax.problems.fit_mlp import fit_mlp
from lohp_jax.problems.lasso import duality_gap, lasso, lasso_patches
from lohp_jax.problems.rastrigin import rastrigin
from lohp_jax.runs.config import RunConfig, resolve
from lohp_jax.runs.solve import load_solver
from lohp_jax.solvers.descent import lbfgs, run_optax
from lohp_jax.solvers.multistart import gaussian_starts, multistart
from lohp_jax.solvers.newton import damped_newton
from lohp_jax.solvers.proximal import coordinate_descent, fista, ista
from lohp_jax.solvers.refine import refine
from lohp_jax.tasks import make_family
from lohp_jax.training.distributed import compile_update
from lohp_jax.trajectories.matching import match
from lohp_jax.trajectories.prepare import prepare
from lohp_jax.trajectories.rollout import over_tasks, rollout
from lohp_jax.trajectories.store import open_store
from lohp_jax.types import Generator, ProblemFamily, TaskFamily, Trajectory
from lohp_jax.version import __version__
from lohp_jax.workloads.classification import classification
from lohp_jax.workloads.fine_tuning import fine_tuning, pretrain, transfer_pair
from lohp_jax.workloads.lane_keeping import lane_keeping
from lohp_jax.workloads.ltc_sine import ltc_sine
from lohp_jax.workloads.oscillating import oscillating
from lohp_jax.workloads.siren import siren

__all__ = [
    # types
    "TaskFamily",
    "Trajectory",
    "Generator",
    # data and tasks
    "ImageSet",
    "image_set",
    "folder_images",
    "make_family",
    # tasks that compare optimizers
    "oscillating",
    "ltc_sine",
    "auto_ncp",
    "init_ltc",
    "ltc",
    "Wiring",
    "siren",
    "synthetic_volume",
    "read_volume",
    "resample_volume",
    "lane_keeping",
    "Drive",
    "read_drive",
    "render_drive",
    "classification",
    "fine_tuning",
    "pretrain",
    "transfer_pair",
    # optimization problems and their solvers
    "ProblemFamily",
    "make_problem",
    "read_problems",
    "lasso",
    "lasso_patches",
    "duality_gap",
    "rastrigin",
    "ackley",
    "fit_mlp",
    "ista",
    "fista",
    "coordinate_descent",
    "damped_newton",
    "lbfgs",
    "run_optax",
    "multistart",
    "gaussian_starts",
    "train_lista",
    "train_regression",
    "train_learned_solver",
    "run_learned_solver",
    # optimizers
    "make_optimizer",
    "sam",
    "hub",
    "hub_trust",
    "hub_spike",
    "hub_online",
    "block_wise",
    "hand_shares",
    "hub_diagnostics",
    "decay",
    "anchor",
    "constant_blend",
    "graft",
    "lgl2o",
    "increase_steps",
    "min_loss_reinit",
    "velo",
    "celo",
    "celo_adam",
    "celo2",
    "pretrained",
    "pretrained_optimizer",
    "meta_trained_optimizer",
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
    # diffusion over solutions
    "Schedule",
    "Denoiser",
    "sample",
    "DiffusionConfig",
    "DenoiserConfig",
    "GuidanceConfig",
    "OracleConfig",
    "train_diffusion",
    "diffusion_params",
    "diffusion_generator",
    "refine",
    "load_solver",
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
    "compile_update",
    "train",
    # generation
    "generate",
    "load",
    "policy_generator",
    "__version__",
]
