"""Weights of learned optimizers, of random numbers and as small as they may be."""

import jax
import numpy as np
import pytest

from lohp_jax.optimizers import theta
from lohp_jax.optimizers.theta import expected_shapes


@pytest.fixture
def narrow(monkeypatch):
    """Perceptrons of three hidden units, which compile sooner; no rule depends on how many there are."""
    for rule in theta._HIDDEN:
        monkeypatch.setitem(theta._HIDDEN, rule, 3)


@pytest.fixture
def random_theta():
    """Makes the weights of a rule, a new copy at each call."""

    def make(rule, seed=0, *, scale=0.3, hidden=6, bank=3):
        rng = np.random.default_rng(seed)
        bank = bank if rule == "velo" else 1
        return jax.tree.map(
            lambda shape: np.float32(rng.normal(0, scale, shape)),
            expected_shapes(rule, hidden=hidden, bank=bank),
            is_leaf=lambda node: isinstance(node, tuple),
        )

    return make
