"""One small LSTM that is shared by all coordinates of an iterate."""

from typing import Literal

import haiku as hk
import jax
import jax.numpy as jnp

from lohp_jax.types import PyTree

Kind = Literal["l2o_dm", "rnnprop", "l2o_pa"]
_UNITS = 20
_LAYERS = 2


def make_lstm(kind: Kind) -> hk.Transformed:
    """`(params, seen [n, F], hidden) -> (outputs [n, O], hidden)`; O is 2 for "l2o_pa", otherwise 1.

    "rnnprop" widens what it sees before the LSTM, "l2o_pa" its output after it: twice a sigmoid, times a
    learned scale for each of the two.
    """

    def forward(seen, hidden):
        if kind == "rnnprop":
            seen = jax.nn.elu(hk.Linear(_UNITS, name="input")(seen))
        core = hk.DeepRNN([hk.LSTM(_UNITS, name=f"lstm_{i}") for i in range(_LAYERS)])
        out, hidden = core(seen, hidden)
        if kind != "l2o_pa":
            return hk.Linear(1, name="output")(out), hidden
        out = jax.nn.relu(hk.Linear(_UNITS, name="dense")(out))
        scale = hk.get_parameter("scale", [2], init=jnp.ones)
        return scale[None] * 2.0 * jax.nn.sigmoid(hk.Linear(2, name="output")(out)), hidden

    return hk.without_apply_rng(hk.transform(forward))


def initial_hidden(num_coordinates: int, dtype: jnp.dtype) -> PyTree:
    """State of the LSTM before its first step, leaves `[n, units]` of zeros."""
    zeros = jnp.zeros((num_coordinates, _UNITS), dtype)
    return tuple(hk.LSTMState(zeros, zeros) for _ in range(_LAYERS))
