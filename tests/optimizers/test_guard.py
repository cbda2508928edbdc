"""What `hub` calls not finite, against NumPy entry by entry."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax.optimizers.guard import not_finite
from lohp_jax.optimizers.hub import hub
from lohp_jax.optimizers.lgl2o import lgl2o
from lohp_jax.optimizers.online import hub_online
from lohp_jax.optimizers.spike import hub_spike
from lohp_jax.optimizers.trust import hub_trust

LARGEST = float(np.finfo(np.float32).max)
CASES = {
    "finite": [1.0, -2.0, 0.0],
    "nan": [1.0, np.nan, 0.0],
    "infinite": [1.0, -np.inf, 0.0],
    "infinities that cancel": [np.inf, -np.inf, 0.0],
    "a sum that overflows": [LARGEST, LARGEST, LARGEST],
    "an overflow and a nan": [LARGEST, LARGEST, np.nan],
    "empty": [],
}


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
def test_not_finite_is_what_numpy_finds_entry_by_entry(dtype, transform):
    tensors = {
        name: jnp.asarray(values, jnp.float32).astype(dtype) for name, values in CASES.items()
    }
    found = transform(lambda tensors: not_finite(tensors, list(tensors)))(tensors)
    expected = {
        name: not np.isfinite(np.asarray(x.astype(jnp.complex64))).all()
        for name, x in tensors.items()
    }
    assert {name: bool(flag) for name, flag in found.items()} == expected
    assert expected["nan"] and not expected["finite"]


def test_under_vmap_each_seed_is_looked_at_alone():
    batch = jnp.array([[1.0, 2.0], [jnp.nan, 2.0], [LARGEST, LARGEST]])
    found = jax.vmap(lambda x: not_finite({"w": x}, ["w"])["w"])(batch)
    assert found.tolist() == [False, True, False]


def test_a_sum_of_half_precision_does_not_overflow():
    """The largest float16 twice: exact looks are for what float32 cannot hold."""
    assert not not_finite({"w": jnp.full(4, 6e4, jnp.float16)}, ["w"])["w"]


def test_nothing_guarded_is_nothing_flagged():
    assert not_finite({"w": jnp.array([jnp.nan])}, []) == {}


@pytest.mark.parametrize(
    "optimizer",
    [
        hub(optax.sgd(0.1), optax.adam(0.1), guard="finite"),
        hub_trust(optax.sgd(0.1), optax.adam(0.1)),
        hub_spike(optax.sgd(0.1), optax.adam(0.1)),
        optax.inject_hyperparams(hub_online)(optax.sgd(0.1), optax.adam(0.1), rate=0.1),
        lgl2o(optax.sgd(0.1), optax.adam(0.1), mode="candidate"),
    ],
    ids=["hub", "trust", "spike", "injected", "lgl2o"],
)
def test_a_loop_without_jit_compiles_in_its_first_steps_only(optimizer):
    """Neither where the guard has nothing to do nor where it has."""
    params, compiled = {"w": jnp.ones(3)}, []
    state, extra = optimizer.init(params), {"value": 1.0, "value_fn": optax.tree.sum}
    steps = [params, {"w": jnp.full(3, jnp.nan)}]

    def count(event, duration, **_):
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            compiled.append(duration)

    for gradients in 2 * steps:
        _, state = optimizer.update(gradients, state, params, **extra)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for gradients in steps:
            _, state = optimizer.update(gradients, state, params, **extra)
        assert not compiled
        jax.jit(lambda x: x + 1)(1.0)
        assert compiled  # or the event has another name
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


@pytest.mark.parametrize("wrap", [lambda inner, _: inner, optax.masked], ids=["plain", "masked"])
def test_a_masked_state_starts_anew_where_it_is_not_finite(wrap):
    """And a plain one in all of the tensor that failed; neither in the others."""
    params = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)}
    adam = wrap(optax.adam(0.1), {"a": True, "b": True, "c": False})
    learned = optax.chain(adam, optax.stateless(lambda u, _: u | {"a": u["a"] * jnp.nan}))
    optimizer = hub(optax.sgd(0.1), learned, guard="finite")
    _, state = optimizer.update(params, optimizer.init(params), params)
    moments = optax.tree.get(state.learned, "mu")
    assert np.all(moments["b"] > 0) and np.all(moments["a"] > 0) == (wrap is optax.masked)
