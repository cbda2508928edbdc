"""Generate the weights of neural networks instead of training them, in JAX.

    data -> tasks -> trajectories -> method -> generator -> evaluation
                         ^ optimizers

`fit` goes all the way; every stage is also a pure function over pytrees that `jax.jit` and `jax.vmap`
accept. The names below are grouped by stage; `data`, `diffusion`, `learned_solvers`, `optimizers`,
`policy`, `problems`, `solvers` and `workloads` hold the rest.
"""

from lohp_jax import (
    data,
    diffusion,
    learned_solvers,
    optimizers,
    policy,
    problems,
    solvers,
    workloads,
)
from lohp_jax.codec import make_codec
from lohp_jax.diffusion.training import train_diffusion
from lohp_jax.evaluation.scores import evaluate
from lohp_jax.export import stream_weights, write_weights
from lohp_jax.fitting import FitConfig, fit
from lohp_jax.generation import familiarity, generate, make_generator
from lohp_jax.methods.cloning import cloning
from lohp_jax.methods.hypernetwork import hypernetwork, hypernetwork_regression
from lohp_jax.methods.lo_di import lo_di
from lohp_jax.methods.lohp import lo_op, lohp, lohp_consolidated, paper_literal
from lohp_jax.methods.lohp_feedback import lohp_feedback
from lohp_jax.methods.weight_diffusion import weight_diffusion
from lohp_jax.networks.policy import NetworkConfig
from lohp_jax.optimizers import (
    celo,
    celo2,
    hub,
    hub_trust,
    lgl2o,
    load_theta,
    make_optimizer,
    pretrained_optimizer,
    sam,
    velo,
)
from lohp_jax.policy.config import FeedbackConfig, HybridConfig
from lohp_jax.problems import make_problem
from lohp_jax.runs.config import RunConfig
from lohp_jax.runs.loading import load
from lohp_jax.runs.lohp import run
from lohp_jax.runs.solve import load_solver
from lohp_jax.solvers.refine import refine
from lohp_jax.tasks import make_family
from lohp_jax.tasks.backbone import Backbone, kept_backbone, train_backbone
from lohp_jax.tasks.domains import domain_family
from lohp_jax.tasks.omniglot import omniglot_backbone, omniglot_family
from lohp_jax.tasks.regression import sine_regression
from lohp_jax.tasks.supervised import supervised_family
from lohp_jax.tasks.support import ImageSupport
from lohp_jax.tasks.transfer import transfer_family
from lohp_jax.trajectories.matching import match
from lohp_jax.trajectories.prepare import prepare
from lohp_jax.trajectories.rollout import rollout
from lohp_jax.trajectories.store import open_store
from lohp_jax.types import Example, Generator, Method, Space, Support, TaskFamily, Trajectory
from lohp_jax.version import __version__

__all__ = [
    # types
    "TaskFamily",
    "Support",
    "Trajectory",
    "Method",
    "Space",
    "Example",
    "Generator",
    # families of tasks
    "make_family",
    "supervised_family",
    "sine_regression",
    "omniglot_family",
    "transfer_family",
    "Backbone",
    "train_backbone",
    "kept_backbone",
    "omniglot_backbone",
    "domain_family",
    "ImageSupport",
    # optimizers: teachers of the stages below, and useful alone
    "make_optimizer",
    "sam",
    "hub",
    "hub_trust",
    "lgl2o",
    "velo",
    "celo",
    "celo2",
    "pretrained_optimizer",
    "load_theta",
    # trajectories
    "rollout",
    "match",
    "prepare",
    "open_store",
    "make_codec",
    # methods
    "lohp",
    "lohp_consolidated",
    "lohp_feedback",
    "lo_di",
    "lo_op",
    "paper_literal",
    "cloning",
    "hypernetwork",
    "hypernetwork_regression",
    "weight_diffusion",
    "NetworkConfig",
    "HybridConfig",
    "FeedbackConfig",
    # from a family to weights, and what they are worth
    "fit",
    "FitConfig",
    "make_generator",
    "generate",
    "familiarity",
    "evaluate",
    "write_weights",
    "stream_weights",
    "run",
    "RunConfig",
    "load",
    # diffusion over the solutions of optimization problems
    "make_problem",
    "train_diffusion",
    "refine",
    "load_solver",
    # the rest
    "data",
    "diffusion",
    "learned_solvers",
    "optimizers",
    "policy",
    "problems",
    "solvers",
    "workloads",
    "__version__",
]
