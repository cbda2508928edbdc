"""Optimizers; each is an optax transformation."""

from lohp_jax.optimizers.blends import constant_blend, graft
from lohp_jax.optimizers.celo2 import celo2
from lohp_jax.optimizers.extra_args import with_extra_args
from lohp_jax.optimizers.hub import block_wise, hand_shares, hub, hub_diagnostics
from lohp_jax.optimizers.lgl2o import lgl2o
from lohp_jax.optimizers.names import OPTIMIZERS, make_optimizer
from lohp_jax.optimizers.online import hub_online
from lohp_jax.optimizers.pretrained import meta_trained_optimizer, pretrained, pretrained_optimizer
from lohp_jax.optimizers.pull import anchor, decay
from lohp_jax.optimizers.reinit import increase_steps, min_loss_reinit
from lohp_jax.optimizers.sam import sam
from lohp_jax.optimizers.spike import hub_spike
from lohp_jax.optimizers.theta import load_theta, save_theta
from lohp_jax.optimizers.trust import hub_trust
from lohp_jax.optimizers.velo import celo, celo_adam, velo

__all__ = [
    "OPTIMIZERS",
    "anchor",
    "block_wise",
    "celo",
    "celo2",
    "celo_adam",
    "constant_blend",
    "decay",
    "graft",
    "hand_shares",
    "hub",
    "hub_diagnostics",
    "hub_online",
    "hub_spike",
    "hub_trust",
    "increase_steps",
    "lgl2o",
    "load_theta",
    "make_optimizer",
    "meta_trained_optimizer",
    "min_loss_reinit",
    "pretrained",
    "pretrained_optimizer",
    "sam",
    "save_theta",
    "velo",
    "with_extra_args",
]
