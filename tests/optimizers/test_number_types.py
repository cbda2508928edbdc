"""Every public optimizer, in every wrapper of optax, on every type of number: right, or one sentence.

Eagerly, where every operation is checked for NaN, with gradients of which some are always zero, as those
of dead units are.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax import optimizers

DTYPES = {
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "float16": jnp.float16,
    "complex64": jnp.complex64,
}
PARAMS = {"a": np.array([[1.0, -2.0], [0.5, 0.0]]), "b": np.array([0.5, 0.0]), "s": np.array(1.0)}
GRADIENTS = {"a": np.array([[1.0, 0.0], [0.5, 1e-4]]), "b": np.zeros(2), "s": np.zeros(())}
MASK = {"a": True, "b": False, "s": True}
LABELS = {"a": "own", "b": "other", "s": "own"}
OPTIMIZERS = (
    *("hub", "hub_invert", "hub_finite", "hub_trust", "hub_spike", "hub_online", "graft", "blend"),
    *("lgl2o", "sam", "velo", "celo", "celo_adam", "celo2", "decay", "anchor", "increase_steps"),
    "min_loss_reinit",
)
WRAPPERS = {
    "alone": lambda o: o,
    "chain": lambda o: optax.chain(optax.scale(1.0), o),
    "masked": lambda o: optax.masked(o, MASK),
    "multi_transform": lambda o: optax.multi_transform({"own": o, "other": optax.sgd(0.1)}, LABELS),
    "multi_steps": lambda o: optax.MultiSteps(o, 2),
    "inject_hyperparams": lambda o: optax.inject_hyperparams(
        lambda rate: optax.chain(o, optax.scale(rate))
    )(rate=1.0),
    "apply_if_finite": lambda o: optax.apply_if_finite(o, 2),
}
LEARNED = {"velo", "celo", "celo_adam", "celo2"}
SEE_THE_LOSS = {"lgl2o", "sam"}
SOON = {  # the rest takes minutes
    *(("hub", "alone", dtype) for dtype in DTYPES),
    *((name, "alone", "float32") for name in ("hub_spike", "graft", "hub_online")),
    ("hub_trust", "alone", "float16"),
    ("celo2", "alone", "float16"),
    ("celo2", "alone", "complex64"),
    ("sam", "masked", "float32"),
    ("sam", "alone", "complex64"),
}


def make(name, dtype, random_theta):
    hand = optax.adam(0.1, eps=1e-4)  # float16 has no 1e-8
    if name in LEARNED:
        last = 0.1 if name == "celo2" else 10
        return getattr(optimizers, name)(random_theta(name), last)
    learned = optax.sgd(0.1)
    if dtype != "complex64":
        learned = optimizers.celo2(random_theta("celo2"), 0.1)
    modes = {"hub": {}, "hub_invert": {"mode": "invert"}, "hub_finite": {"guard": "finite"}}
    if name in modes:
        return optimizers.hub(hand, learned, **modes[name])
    if name == "blend":
        return optimizers.constant_blend(hand, learned, weight=0.5)
    if name in ("decay", "anchor"):
        return optax.chain(getattr(optimizers, name)(0.1), hand)
    if name == "sam":
        return optimizers.sam(hand)
    if name == "increase_steps":
        return optimizers.increase_steps(lambda num_steps: learned, 10)
    if name == "min_loss_reinit":
        return optimizers.min_loss_reinit(learned)
    return getattr(optimizers, name)(hand, learned)


def value_fn(params):
    return sum(jnp.sum(jnp.abs(x).astype(jnp.float32) ** 2) for x in jax.tree.leaves(params))


def types(tree):
    return [leaf.dtype for leaf in jax.tree.leaves(tree)]


def step_thrice(optimizer, params, gradients):
    """Checks every update and the last state."""
    optimizer = optimizers.with_extra_args(optimizer)
    state = optimizer.init(params)
    kept = types(state)
    extra = {
        "value_fn": value_fn,
        "grad_fn": lambda p, _: jax.tree.map(jnp.conj, jax.grad(value_fn)(p)),
    }
    for scale in (0.0, 1.0, 1.0):  # a gradient of zero at first, as with momenta of zero
        scaled = jax.tree.map(lambda g, scale=scale: (scale * g).astype(g.dtype), gradients)
        updates, state = optimizer.update(scaled, state, params, value=value_fn(params), **extra)
        assert types(updates) == types(params)
        for leaf in jax.tree.leaves(updates):
            assert np.isfinite(np.asarray(leaf, np.complex128)).all()
        params = optax.apply_updates(params, updates)
    assert types(state) == kept


@pytest.mark.parametrize(
    "name, wrapper, dtype",
    [
        pytest.param(name, wrapper, dtype, marks=() if cell in SOON else pytest.mark.slow)
        for name in OPTIMIZERS
        for wrapper in WRAPPERS
        for dtype in DTYPES
        for cell in [(name, wrapper, dtype)]
    ],
)
def test_every_optimizer_in_every_wrapper(name, wrapper, dtype, random_theta, narrow):
    params, gradients = (
        jax.tree.map(lambda x: jnp.asarray(x, DTYPES[dtype]), tree) for tree in (PARAMS, GRADIENTS)
    )
    optimizer = WRAPPERS[wrapper](make(name, dtype, random_theta))
    refusal = None
    if name in LEARNED and dtype == "complex64":
        refusal = rf"{name}: expected floating-point parameters .* got complex64.*; leave it out"
    elif name in SEE_THE_LOSS and wrapper in ("masked", "multi_transform"):
        refusal = rf"{name}: it evaluates the loss, which needs all parameters, .* put these inside"
    with jax.debug_nans(True):
        if refusal is None:
            step_thrice(optimizer, params, gradients)
            return
        with pytest.raises(ValueError, match=refusal):
            step_thrice(optimizer, params, gradients)
