"""Diffusion over the solutions of optimization problems (Diff-L2O)."""

from lohp_jax.diffusion.config import DiffusionConfig
from lohp_jax.diffusion.generator import diffusion_generator, make_denoiser
from lohp_jax.diffusion.guidance import GuidanceConfig
from lohp_jax.diffusion.oracle import OracleConfig
from lohp_jax.diffusion.sampler import Denoiser, sample
from lohp_jax.diffusion.schedule import Schedule
from lohp_jax.diffusion.training import diffusion_params, train_diffusion
from lohp_jax.networks.denoiser import DenoiserConfig

__all__ = [
    "Denoiser",
    "DenoiserConfig",
    "DiffusionConfig",
    "GuidanceConfig",
    "OracleConfig",
    "Schedule",
    "diffusion_generator",
    "diffusion_params",
    "make_denoiser",
    "sample",
    "train_diffusion",
]
