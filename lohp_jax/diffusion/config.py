"""Settings of a training of Diff-L2O: frozen dataclasses, checked when made."""

import dataclasses
from typing import Literal

from lohp_jax.checks import check_option
from lohp_jax.diffusion.guidance import GuidanceConfig
from lohp_jax.diffusion.oracle import OracleConfig
from lohp_jax.diffusion.sampler import SAMPLERS
from lohp_jax.diffusion.schedule import PREDICTIONS, Prediction, Schedule
from lohp_jax.networks.denoiser import DenoiserConfig


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """Everything that decides a training, its key apart.

    The Diff-L2O paper predicts "eps", has an `alpha` of .5, and takes 100 steps in training and in
    sampling; the other defaults are ours.
    """

    prediction: Prediction = "x0"
    """What the denoiser predicts: "x0", "eps" or "v"."""
    schedule: Schedule = Schedule()
    network: DenoiserConfig = DenoiserConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    oracle: OracleConfig = OracleConfig()
    training: Literal["stateless", "rollout"] = "stateless"
    """"stateless" denoises at random levels; "rollout" follows a sampler's own states and feeds the
    denoiser with its x_0 of the step before."""
    rollout_steps: int = 10
    """Steps of a roll-out in training."""
    window: int = 2
    """Steps of a roll-out that a gradient runs through."""
    alpha: float = 0.5
    """Weight of the reconstruction in the loss; the objective has the rest."""
    gap_unit: Literal["start", "optimum"] = "start"
    """Unit of the objective's gap in the loss: the gap of the family's start, or for objectives that are
    positive the optimum, where relative gaps are to be small."""
    warm_start: bool = False
    """Whether to train a regression first, as the mean of the solution, and diffuse what it leaves."""
    pool: int = 4096
    """Training problems, solved at the start; 0 draws and solves new ones in every update."""
    batch_size: int = 128
    """Problems per update."""
    updates: int = 2000
    """Updates of the denoiser, and as many of the regression of a warm start."""
    learning_rate: float = 1e-3
    """Peak of the schedule: a linear warm-up, then a cosine down to a hundredth."""
    clip_norm: float = 1.0
    """Largest global norm of a gradient."""
    ema: float = 0.999
    """Decay of the running mean of the weights, which is what is kept; 0 keeps the last ones."""
    log_every: int = 100
    """Updates per compiled chunk, and per call of `on_progress`."""
    sampler: str = "ddim"
    """Default sampler of the generator."""
    num_steps: int = 10
    """Default number of steps of the generator."""

    def __post_init__(self):
        check_option("DiffusionConfig", "prediction", self.prediction, PREDICTIONS)
        check_option("DiffusionConfig", "training", self.training, ("stateless", "rollout"))
        check_option("DiffusionConfig", "gap_unit", self.gap_unit, ("start", "optimum"))
        check_option("DiffusionConfig", "sampler", self.sampler, SAMPLERS)
        for name in ("rollout_steps", "batch_size", "updates", "log_every", "num_steps", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.window > self.rollout_steps:
            raise ValueError(
                f"window must be at most rollout_steps={self.rollout_steps}, got {self.window}."
            )
        if self.pool < 0:
            raise ValueError(f"pool must be at least 0, got {self.pool}.")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}.")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}.")
        for name in ("learning_rate", "clip_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and positive, got {getattr(self, name)}.")
        if self.network.kind == "lasso" and self.prediction != "x0":
            raise ValueError(
                f"prediction must be 'x0' with network.kind='lasso', got {self.prediction!r}."
            )
