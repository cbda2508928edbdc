"""Evolution strategies descend; the estimate itself is tested with `optimizers.meta`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lohp_jax.optimizers.meta import Unroll, start_pairs
from lohp_jax.training.pes import MetaState, make_meta_update

KEY = jax.random.key(0)


def unroll_towards(goal):
    """Without a state that matters; the loss is the distance of one coordinate from 1."""

    def start(meta, key, portion):
        return jax.random.normal(key)

    def advance(meta, state, key, step_key):
        return state, jnp.sum(((meta - 1) * goal) ** 2), jnp.array(False)

    return Unroll(start, advance)


def test_update_descends_on_every_kind():
    """Two kinds of unroll pull at one coordinate each."""
    unrolls = [unroll_towards(goal) for goal in jnp.eye(2)]
    optimizer, meta = optax.sgd(0.1), jnp.zeros(2)
    pairs = tuple(start_pairs(unroll, meta, KEY, 64) for unroll in unrolls)
    state = MetaState(meta, optimizer.init(meta), pairs, jnp.zeros((), jnp.int32))
    update = jax.jit(make_meta_update(unrolls, optimizer, sigma=0.01))
    state, metrics = update(state, jax.random.split(jax.random.key(1), 64))
    assert int(state.step) == 1 and metrics["losses"].shape == (2,)
    np.testing.assert_allclose(metrics["losses"], [1.0, 1.0], atol=0.05)
    np.testing.assert_allclose(metrics["loss"], metrics["losses"].mean())
    for i in range(60):
        state = state._replace(pairs=pairs)  # each step from the start: no memory, no drift
        state, metrics = update(state, jax.random.split(jax.random.key(i), 64))
    np.testing.assert_allclose(state.meta, [1.0, 1.0], atol=0.2)
