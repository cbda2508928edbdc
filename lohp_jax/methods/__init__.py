"""Ways to train a generator of weights, each a `Method`, and the table of their names."""

from collections.abc import Callable

from lohp_jax.methods.cloning import cloning
from lohp_jax.methods.hypernetwork import hypernetwork, hypernetwork_regression
from lohp_jax.methods.lo_di import lo_di
from lohp_jax.methods.lohp import lo_op, lohp, lohp_consolidated, paper_literal
from lohp_jax.methods.lohp_feedback import lohp_feedback
from lohp_jax.methods.weight_diffusion import weight_diffusion
from lohp_jax.types import Method

METHODS: dict[str, Callable[..., Method]] = {
    "lohp": lohp,
    "lohp_consolidated": lohp_consolidated,
    "lohp_feedback": lohp_feedback,
    "cloning": cloning,
    "hypernetwork": hypernetwork,
    "hypernetwork_regression": hypernetwork_regression,
    "weight_diffusion": weight_diffusion,
    "lo_di": lo_di,
    "lo_op": lo_op,
    "paper_literal": paper_literal,
}
"""Factory of each method; only `lohp_jax.runs` and the command line read it."""
