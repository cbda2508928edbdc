"""Whatever takes parameters apart says clearly which it can take, and that they have changed."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lohp_jax.optimizers.blends import constant_blend, graft
from lohp_jax.optimizers.celo2 import celo2
from lohp_jax.optimizers.hub import block_wise, hub
from lohp_jax.optimizers.lgl2o import lgl2o
from lohp_jax.optimizers.pretrained import pretrained, pretrained_optimizer
from lohp_jax.optimizers.pull import anchor, decay
from lohp_jax.optimizers.reinit import increase_steps, min_loss_reinit
from lohp_jax.optimizers.sam import sam

ADAM, FASTER = optax.adam(0.01), optax.adam(0.03)
MAKERS = {
    **{f"hub {m}": lambda m=m: hub(ADAM, FASTER, mode=m) for m in ("vanilla", "trust", "spike")},
    "hub online": lambda: hub(ADAM, FASTER, mode="online"),
    "constant_blend": lambda: constant_blend(ADAM, FASTER, 0.5),
    "graft": lambda: graft(ADAM, FASTER),
    "lgl2o race": lambda: lgl2o(ADAM, FASTER, mode="race"),
    "lgl2o candidate": lambda: lgl2o(ADAM, FASTER, mode="candidate"),
    "increase_steps": lambda: increase_steps(lambda _: ADAM, 9),
    "min_loss_reinit": lambda: min_loss_reinit(ADAM),
    "sam": lambda: sam(ADAM),
    "anchor": lambda: anchor(0.1),
    "celo2": lambda: celo2(pretrained("small"), 0.1, orthogonalise=False),
    "celo2 that ships": lambda: pretrained_optimizer("small", 100),
}
PARAMS = {"body": {"w": jnp.ones((1, 2))}, "s": jnp.float32(2.0), "e": jnp.zeros((0, 3))}
every = pytest.mark.parametrize("name", MAKERS)


def update(optimizer, gradients, state, params=PARAMS):
    """With all extra arguments that any of them asks for."""
    optimizer = optax.with_extra_args_support(optimizer)
    extra = {"value_fn": optax.tree.sum, "grad_fn": lambda p, i: gradients, "value": 1.0}
    return optimizer.update(gradients, state, params, **extra)


WRAPPERS = {
    **{
        f"hub {m}": lambda arm, m=m: hub(arm, FASTER, mode=m) for m in ("vanilla", "trust", "spike")
    },
    "hub block-wise": lambda arm: hub(arm, FASTER, mode=block_wise(lambda path: path[-1] == "w")),
    "hub guarded": lambda arm: hub(arm, FASTER, guard="finite"),
    "graft": lambda arm: graft(arm, FASTER),
    "lgl2o candidate": lambda arm: lgl2o(arm, FASTER, mode="candidate"),
    "lgl2o race": lambda arm: lgl2o(arm, FASTER, mode="race"),
    "increase_steps": lambda arm: increase_steps(lambda _: arm, 9),
    "min_loss_reinit": min_loss_reinit,
    "sam": sam,
}


def late(optimizer, empty):
    """An optimizer that keeps the last gradient beside its state, where `init` has left nothing."""

    def update(updates, state, params=None):
        moved, state = optimizer.update(updates, state[0], params)
        return moved, (state, {"last": updates} if empty == {} else updates)

    return optax.GradientTransformation(lambda params: (optimizer.init(params), empty), update)


@pytest.mark.parametrize("empty", [None, (), {}], ids=["None", "tuple", "dict"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_an_arm_whose_state_grows_runs_as_one_whose_does_not(name, empty):
    plain, growing = WRAPPERS[name](ADAM), WRAPPERS[name](late(ADAM, empty))
    states, params = [o.init(PARAMS) for o in (plain, growing)], PARAMS
    for _ in range(3):
        gradients = jax.tree.map(lambda p: p + 1.0, params)
        moved = []
        for i, optimizer in enumerate((plain, growing)):
            updates, states[i] = update(optimizer, gradients, states[i], params)
            moved.append(updates)
        chex.assert_trees_all_close(*moved, rtol=1e-6)
        params = optax.apply_updates(params, moved[0])


def test_the_guard_starts_what_has_grown_anew():
    optimizer = hub(late(ADAM, None), FASTER, guard="finite")
    state = optimizer.init(PARAMS)
    good = jax.tree.map(jnp.ones_like, PARAMS)
    bad = good | {"s": jnp.float32(jnp.nan)}
    for gradients in (good, bad, good):
        updates, state = update(optimizer, gradients, state)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, state)))


@pytest.mark.parametrize("name", [*WRAPPERS, "anchor", "celo2", "celo2 that ships"])
def test_optimizers_step_in_an_nnx_optimizer(name):
    """Which shows them boxed variables in `init` and their arrays in `update`."""
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 1, rngs=nnx.Rngs(1)))
    make = WRAPPERS.get(name)
    ours = MAKERS[name]() if make is None else make(ADAM)
    optimizer = nnx.Optimizer(model, optax.with_extra_args_support(ours), wrt=nnx.Param)
    before = jax.tree.map(jnp.array, nnx.state(model, nnx.Param))
    gradients = jax.tree.map(jnp.ones_like, before)
    pure = nnx.to_pure_dict(gradients)
    extra = {"value_fn": optax.tree.sum, "grad_fn": lambda p, i: jax.tree.map(jnp.ones_like, p)}
    for _ in range(2):
        optimizer.update(model, gradients, value=jnp.float32(1.0), **extra)
    params, state = nnx.to_pure_dict(before), ours.init(nnx.to_pure_dict(before))
    for _ in range(2):
        updates, state = optax.with_extra_args_support(ours).update(
            pure, state, params, value=jnp.float32(1.0), **extra
        )
        params = optax.apply_updates(params, updates)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for actual, expected in zip(jax.tree.leaves(after), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["sam", "lgl2o race", "lgl2o candidate"])
def test_what_evaluates_the_loss_stands_around_a_mask_and_not_within(name):
    mask = {"body": True, "s": False, "e": True}
    labels = {"body": "a", "s": "b", "e": "b"}
    ours = MAKERS[name]()
    message = (
        "needs all parameters, and was given some of them by optax.masked .*; put these inside"
    )
    for optimizer in (
        optax.masked(ours, mask),
        optax.multi_transform({"a": ours, "b": optax.sgd(0.1)}, labels),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.init(PARAMS)
    around = WRAPPERS[name](optax.masked(ADAM, mask))
    updates, _ = update(around, PARAMS, around.init(PARAMS))
    chex.assert_trees_all_equal_shapes(updates, PARAMS)


@every
def test_scalar_and_empty_leaves_pass_and_nothing_at_all_does(name):
    optimizer = MAKERS[name]()
    step = jax.jit(lambda params: update(optimizer, params, optimizer.init(params), params)[0])
    updates = step(PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, PARAMS)
    chex.assert_tree_all_finite(updates)
    assert updates["s"] != 0
    assert step({}) == {}


@every
@pytest.mark.parametrize(
    "leaf, message",
    [
        (np.int32([1]), "expected floating-point or complex parameters, got int32 at a/b"),
        (1.0, "expected arrays as parameters, got 1.0 at a/b; use jnp.asarray"),
    ],
)
def test_what_cannot_be_moved_is_refused_by_init(name, leaf, message):
    with pytest.raises(ValueError, match=f"{name.split()[0]}: {message}"):
        MAKERS[name]().init({"a": {"b": leaf}})


@every
@pytest.mark.parametrize(
    "change",
    [
        {"new": jnp.ones(2)},
        {"s": None},
        {"body": {"w": jnp.ones((4, 2))}},
        {"body": [jnp.ones((1, 2))]},
    ],
    ids=["more", "less", "shape", "structure"],
)
def test_parameters_that_change_between_steps_are_refused(name, change):
    optimizer = MAKERS[name]()
    state, changed = jax.eval_shape(optimizer.init, PARAMS), PARAMS | change
    with pytest.raises(
        ValueError, match=r"the parameters have changed .*state at .*call init again"
    ):
        update(optimizer, changed, state, changed)
    with pytest.raises(
        ValueError, match=r"the gradient at .* has shape .*, its parameter .*; expected"
    ):
        update(optimizer, changed, state)


@pytest.mark.parametrize("mode", ["vanilla", "trust", "spike", "online"])
def test_changed_gradients_are_refused_without_parameters_too(mode):
    optimizer = hub(ADAM, FASTER, mode=mode)
    state, changed = (
        jax.eval_shape(optimizer.init, PARAMS),
        PARAMS | {"body": {"w": jnp.ones((4, 2))}},
    )
    with pytest.raises(ValueError, match=r"body/w has shape \(1, 2\), they need \(4, 2\)"):
        update(optimizer, changed, state, None)


def test_new_groups_are_refused_where_no_state_has_shapes():
    optimizer = hub(optax.sgd(0.1), optax.sgd(0.2))
    state, more = optimizer.init(PARAMS), PARAMS | {"new": jnp.ones(2)}
    with pytest.raises(
        ValueError, match=r"have changed .*\(new: \['new'\], gone: \[\]\); call init"
    ):
        update(optimizer, more, state, more)


@pytest.mark.parametrize("nested", [{"b/c": 2.0}, {"b": {"d": 2.0}}], ids=["tensor", "layer"])
def test_names_that_are_not_unique_are_refused(nested):
    params = jax.tree.map(jnp.float32, {"a/b": {"c": 1.0}, "a": nested})
    with pytest.raises(
        ValueError, match=r"hub: expected unique names, got 'a/b(/c)?' for the keys"
    ):
        hub(ADAM, FASTER).init(params)


def test_a_pull_leaves_alone_what_it_does_not_hold():
    """Also integers, and what came later."""
    params = {"w": jnp.ones(2), "steps": jnp.int32(3)}
    for pull in (anchor, decay):
        optimizer = pull(0.5, where=lambda path: path == ("w",))
        state = optimizer.init(params)
        later = params | {"new": jnp.ones(1)}
        updates, _ = optimizer.update(later, state, later)
        assert updates["steps"] == 3 and updates["new"] == 1


def test_an_anchor_is_no_weight_decay_for_what_it_has_not_seen():
    optimizer = anchor(0.5)
    state = optimizer.init({"w": jnp.ones(2)})
    more = {"w": jnp.ones(2), "new": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"anchor: the parameters have changed .*origin/new"):
        optimizer.update(more, state, more)
