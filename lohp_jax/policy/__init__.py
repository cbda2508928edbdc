"""The Gaussian policy, its kernels, and the balance objectives that train it."""

from lohp_jax.policy.config import PAPER_LITERAL, FeedbackConfig, HybridConfig
from lohp_jax.policy.hybrid import hybrid_loss
from lohp_jax.policy.kernels import Policy, make_policy, roll_out

__all__ = [
    "PAPER_LITERAL",
    "FeedbackConfig",
    "HybridConfig",
    "Policy",
    "hybrid_loss",
    "make_policy",
    "roll_out",
]
