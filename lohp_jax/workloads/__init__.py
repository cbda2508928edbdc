"""Single tasks that compare optimizers."""

from lohp_jax.networks.ltc import Wiring, auto_ncp, init_ltc, ltc
from lohp_jax.workloads.classification import classification
from lohp_jax.workloads.fine_tuning import fine_tuning, pretrain, transfer_pair
from lohp_jax.workloads.lane_keeping import lane_keeping
from lohp_jax.workloads.oscillating import oscillating
from lohp_jax.workloads.sines import hub_sines, ltc_sine
from lohp_jax.workloads.siren import siren

__all__ = [
    "Wiring",
    "auto_ncp",
    "classification",
    "fine_tuning",
    "hub_sines",
    "init_ltc",
    "lane_keeping",
    "ltc",
    "ltc_sine",
    "oscillating",
    "pretrain",
    "siren",
    "transfer_pair",
]
