"""The blend is what the HUB paper's equations say, and what follows from them holds."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from lohp_jax.optimizers.hub import HubState, block_wise, hand_shares, hub, hub_diagnostics
from lohp_jax.workloads.oscillating import oscillation

eager_and_jit = pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
PARAMS = {
    "body": {"w": np.ones((3, 4), np.float32), "b": np.zeros(4, np.float32)},
    "head": {"w": np.full((4, 2), -0.5, np.float32), "b": np.zeros(2, np.float32)},
}
SIZES = {"body/w": 12, "body/b": 4, "head/w": 8, "head/b": 2}


def normal(seed=0, scale=1.0, like=PARAMS):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: np.float32(rng.normal(0, scale, p.shape)), like)


def constant(value):
    """An optimizer that always proposes the same number."""
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda u: jnp.full_like(u, value), updates)
    )


HAND, LEARNED = optax.sgd(0.1), optax.sgd(3.0)


def blend(gradients, params=PARAMS, hand=HAND, learned=LEARNED, **options):
    optimizer = hub(hand, learned, **options)
    return optimizer.update(gradients, optimizer.init(params), params)[0]


def softmax(values):
    weights = np.exp(np.float64(np.abs(values)) - np.abs(values).max())
    return weights / weights.sum()


# --- the equations


@eager_and_jit
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("mode", ["vanilla", "invert"])
def test_the_update_equals_its_definition(mode, scale, transform):
    gradients = normal(scale=scale)
    optimizer = hub(optax.sgd(0.1), optax.sgd(3.0), mode=mode)
    state = optimizer.init(PARAMS)
    updates, _ = transform(optimizer.update)(gradients, state, PARAMS)

    def expected(g):
        s = softmax(g) if mode == "vanilla" else 1 - softmax(g)
        return s * (-0.1 * g) + (1 - s) * (-3.0 * g)

    jax.tree.map(
        lambda u, g: np.testing.assert_allclose(u, expected(np.float64(g)), rtol=1e-5, atol=1e-7),
        updates,
        gradients,
    )


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_the_mean_share_is_one_over_the_number_of_entries(scale):
    shares = hand_shares(normal(scale=scale))
    for share in jax.tree.leaves(shares):
        np.testing.assert_allclose(np.sum(share), 1.0, rtol=1e-5)


def test_small_gradients_give_a_constant_blend():
    for share in jax.tree.leaves(hand_shares(normal(scale=1e-6))):
        np.testing.assert_allclose(share, 1 / share.size, rtol=1e-4)


@pytest.mark.parametrize("count", [100, 10_000])
@pytest.mark.parametrize("beyond, share", [(-4.0, 0.018), (0.0, 0.5), (4.0, 0.982)])
def test_an_entry_wins_where_it_stands_out_by_more_than_log_k(count, beyond, share):
    """Of one with the others at 0: s = e^g / (e^g + K - 1)."""
    gradient = np.zeros(count, np.float32)
    gradient[3] = np.log(count - 1) + beyond
    np.testing.assert_allclose(hand_shares(gradient)[3], share, rtol=2e-3)


def test_equal_gradients_share_evenly_and_a_dominant_one_takes_all():
    np.testing.assert_allclose(hand_shares(np.float32([2, -2, 2, -2])), 0.25, rtol=1e-6)  # eq. 10
    np.testing.assert_allclose(hand_shares(np.float32([1, -60, 9])), [0, 1, 0], atol=1e-6)  # eq. 9


def test_the_share_follows_permutations_ignores_signs_and_depends_on_scale():
    g = np.float32([0.5, -1.0, 2.0, 0.1])
    order = np.array([2, 0, 3, 1])
    np.testing.assert_allclose(hand_shares(g[order]), hand_shares(g)[order], rtol=1e-6)
    np.testing.assert_array_equal(hand_shares(-g), hand_shares(g))
    assert np.abs(hand_shares(10 * g) - hand_shares(g)).max() > 0.3


def test_vanilla_and_invert_add_up_to_both_updates_and_lie_between_them():
    gradients = normal()
    vanilla, invert = (blend(gradients, mode=mode) for mode in ("vanilla", "invert"))
    both = jax.tree.map(lambda g: -3.1 * g, gradients)
    chex.assert_trees_all_close(jax.tree.map(jnp.add, vanilla, invert), both, rtol=1e-5)
    for update, g in zip(jax.tree.leaves(vanilla), jax.tree.leaves(gradients), strict=True):
        low, high = np.minimum(-0.1 * g, -3.0 * g), np.maximum(-0.1 * g, -3.0 * g)
        assert np.all(update >= low - 1e-6) and np.all(update <= high + 1e-6)


@pytest.mark.parametrize("mode, rate", [("vanilla", 0.1), ("invert", 3.0)])
def test_one_entry_goes_to_one_optimizer(mode, rate):
    gradient = np.float32([0.7])
    np.testing.assert_allclose(blend(gradient, gradient, mode=mode), -rate * gradient, rtol=1e-6)


def test_bounds_clip_the_share():
    gradients = normal()
    plain = blend(gradients)
    chex.assert_trees_all_equal(blend(gradients, clip=(0.0, 1.0)), plain)
    half = jax.tree.map(lambda g: -(0.1 + 3.0) / 2 * g, gradients)
    chex.assert_trees_all_close(blend(gradients, clip=(0.5, 0.5)), half, rtol=1e-5)
    shares = hand_shares(gradients, clip_of=lambda path: (0.1, 0.3))
    for share, g in zip(jax.tree.leaves(shares), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(share, np.clip(softmax(g), 0.1, 0.3), rtol=1e-5)


def test_the_slope_of_a_share_is_s_times_one_minus_s():
    g = jnp.float32([0.5, 1.0, 2.0])
    slopes = np.diagonal(jax.jacobian(hand_shares)(g))
    s = softmax(np.asarray(g))
    np.testing.assert_allclose(slopes, s * (1 - s), rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=9),
    st.sampled_from([0.0, 0.3, 0.5]),
)
def test_shares_of_any_gradient(values, low):
    g = np.float32(values)
    share = np.asarray(jax.jit(hand_shares)(g))
    np.testing.assert_allclose(share.sum(), 1.0, rtol=1e-5)  # so the mean is 1 / K
    np.testing.assert_allclose(share, softmax(g), rtol=1e-4, atol=1e-7)
    inverted = hand_shares(g, mode_of=lambda path: "invert")
    np.testing.assert_allclose(share + inverted, 1.0, rtol=1e-6)
    clipped = hand_shares(g, clip_of=lambda path: (low, 0.6))
    np.testing.assert_allclose(clipped, np.clip(share, low, 0.6), rtol=1e-6)


def test_the_test_function_of_the_paper_gives_the_gate_nothing_to_choose_from():
    """Eq. 6 depends on the sum of |x_i| alone: all |g_i| are equal. Not so in its separable form."""
    x = normal(3, like=np.zeros(50, np.float32))
    of_norm = jax.grad(lambda x: oscillation(jnp.sum(jnp.abs(x))))(x)
    np.testing.assert_allclose(hand_shares(of_norm), 1 / 50, rtol=1e-5)
    separable = jax.grad(lambda x: jnp.sum(oscillation(jnp.abs(x))))(x)
    assert np.max(hand_shares(separable)) > 3 / 50


def test_a_vanishing_gradient_ends_in_a_vanishing_update_because_of_epsilon():
    """Appendix B.2: with eps = 0 Adam's step stays of the order of its learning rate."""
    decay, num_steps = 0.999, 25_000  # to 1e-11

    def last(eps):
        optimizer = hub(optax.adam(0.1, b2=0.99, eps=eps), constant(0.0))
        params = np.float32([0.0])

        def step(carry, index):
            gradient = jnp.full(1, 1.0, jnp.float32) * decay**index
            updates, state = optimizer.update(gradient, carry, params)
            return state, updates[0]

        return np.abs(jax.lax.scan(step, optimizer.init(params), jnp.arange(num_steps))[1][-1])

    assert last(1e-8) < 0.02 and last(0.0) > 0.05


@pytest.mark.parametrize("group, names", [("layer", ["body", "head"]), ("global", ["all"])])
def test_groups_share_one_softmax(group, names):
    gradients = normal(scale=2.0)
    shares = hand_shares(gradients, group=group)
    parts = {"layer": [["body"], ["head"]], "global": [["body", "head"]]}[group]
    for modules in parts:
        flat = [
            np.concatenate([np.ravel(tree[m][leaf]) for m in modules for leaf in ("w", "b")])
            for tree in (gradients, shares)
        ]
        np.testing.assert_allclose(flat[1], softmax(flat[0]), rtol=1e-5)
    optimizer = hub(optax.sgd(0.1), optax.sgd(1.0), group=group)
    _, state = optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)
    assert list(state.mean_weight) == names


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    """A module whose tensors are attributes, as in Equinox."""

    weight: jax.Array
    bias: jax.Array


def two_linear():
    """The first has entries of sizes 1, 2 and 3, the second of 4 and 0."""
    return (
        Linear(np.float32([[1.0, -2.0]]), np.float32([3.0])),
        Linear(np.float32([[-4.0]]), np.float32([0.0])),
    )


LAYERS = {
    "haiku": (
        lambda a, b: {
            "mlp/~/linear_0": {"w": a.weight, "b": a.bias},
            "mlp/~/linear_1": {"w": b.weight, "b": b.bias},
        },
        ["mlp/~/linear_0", "mlp/~/linear_1"],
    ),
    "nested": (
        lambda a, b: {"mlp": [vars(a), {"out": vars(b)}]},
        ["mlp/0", "mlp/1/out"],
    ),
    "attributes": (lambda a, b: {"layers": (a, b)}, ["layers/0", "layers/1"]),
    "nnx": (
        lambda a, b: {
            "layers": {i: jax.tree.map(nnx.Param, vars(it)) for i, it in enumerate((a, b))}
        },
        ["layers/0", "layers/1"],
    ),
}


@pytest.mark.parametrize("build, names", LAYERS.values(), ids=LAYERS)
def test_a_layer_is_what_holds_a_tensor(build, names):
    """Its softmax is over sizes 1, 2, 3, the other's over 4, 0: weights of e^1 .. e^3 over their sum."""
    gradients = build(*two_linear())
    shares = jax.tree.leaves(hand_shares(gradients, group="layer"))
    layers = ([1, 2, 3], [4, 0])
    expected = {size: np.exp(size) / np.exp(it).sum() for it in layers for size in it}
    for share, leaf in zip(shares, jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(share, np.vectorize(expected.get)(np.abs(leaf)), rtol=1e-5)
    optimizer = hub(optax.sgd(0.1), optax.sgd(3.0), group="layer")
    _, state = optimizer.update(gradients, optimizer.init(gradients), gradients)
    assert list(state.mean_weight) == names
    np.testing.assert_allclose(list(state.mean_weight.values()), [1 / 3, 1 / 2], rtol=1e-6)


def test_tensors_at_the_top_are_one_layer():
    """Beside a module: sizes 1 and 2 share a softmax, 5 has its own; an array by itself is a layer."""
    gradients = {"a": np.float32([1.0]), "b": np.float32([-2.0]), "head": {"w": np.float32([5.0])}}
    shares = hand_shares(gradients, group="layer")
    np.testing.assert_allclose(shares["a"], 1 / (1 + np.e), rtol=1e-6)
    np.testing.assert_allclose(shares["b"], np.e / (1 + np.e), rtol=1e-6)
    np.testing.assert_allclose(shares["head"]["w"], 1.0)
    bare = np.float32([1.0, -2.0])
    np.testing.assert_allclose(hand_shares(bare, group="layer"), softmax(bare), rtol=1e-6)


@pytest.mark.parametrize("literal", [False, True])
def test_block_wise_follows_the_words_or_the_equations(literal):
    gradients = normal()
    mode = block_wise(lambda path: path[0] == "head", literal=literal)
    updates = blend(gradients, mode=mode)
    vanilla, invert = (blend(gradients, mode=name) for name in ("vanilla", "invert"))
    new, old = (invert, vanilla) if literal else (vanilla, invert)
    chex.assert_trees_all_equal(updates["head"], new["head"])
    chex.assert_trees_all_equal(updates["body"], old["body"])


def test_modes_and_bounds_by_path_are_static_arguments_of_injected_hyperparameters():
    options = {
        "mode": block_wise(lambda path: path[0] == "head"),
        "clip": lambda path: (0.2, 0.4) if path[0] == "head" else None,
    }
    arms = optax.sgd(0.1), optax.sgd(3.0)
    injected = optax.inject_hyperparams(hub, static_args=("mode", "clip"))(*arms, **options)
    updates, _ = injected.update(normal(), injected.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal(updates, blend(normal(), **options))
    taken_for_a_schedule = optax.inject_hyperparams(hub)(*arms, mode=options["mode"])
    with pytest.raises(ValueError, match=r'block_wise: .*without static_args=\("mode", "clip"\)'):
        taken_for_a_schedule.init(PARAMS)


def test_modes_and_bounds_compose_by_path():
    gradients = normal()
    updates = blend(
        gradients,
        mode=lambda path: "invert" if path == ("body", "w") else "vanilla",
        clip=lambda path: (0.2, 0.4) if path[-1] == "w" else None,
    )
    s = 1 - np.clip(softmax(gradients["body"]["w"]), 0.2, 0.4)
    expected = -(s * 0.1 + (1 - s) * 3.0) * gradients["body"]["w"]
    np.testing.assert_allclose(updates["body"]["w"], expected, rtol=1e-5)
    chex.assert_trees_all_equal(updates["head"]["b"], blend(gradients)["head"]["b"])


def test_vanilla_leaves_one_part_in_k_of_the_weight_decay():
    params = {"w": np.ones(5, np.float32)}
    zeros = jax.tree.map(np.zeros_like, params)
    updates = blend(zeros, params, hand=optax.adamw(0.1, weight_decay=0.5), learned=constant(0.0))
    np.testing.assert_allclose(updates["w"], -0.1 * 0.5 / 5, rtol=1e-5)


# --- as a part of optax


def test_one_gradient_serves_both_and_extra_arguments_reach_both():
    seen = []

    def spy(name):
        def update(updates, state, params=None, *, value, value_fn, **_):
            seen.append((name, float(value), value_fn))
            return updates, state

        return optax.GradientTransformationExtraArgs(lambda params: (), update)

    optimizer = hub(spy("hand"), spy("learned"))
    gradients = normal()
    optimizer.update(gradients, optimizer.init(PARAMS), PARAMS, value=2.5, value_fn="f", other=1)
    assert seen == [("hand", 2.5, "f"), ("learned", 2.5, "f")]


def test_both_states_advance():
    optimizer = hub(optax.adam(0.1), optax.adam(0.2))
    state = optimizer.init(PARAMS)
    for seed in range(3):
        _, state = optimizer.update(normal(seed), state, PARAMS)
    for arm in (state.hand_designed, state.learned):
        assert int(optax.tree.get(arm, "count")) == 3


def test_what_the_gate_did_can_be_read():
    optimizer = optax.chain(optax.clip_by_global_norm(100.0), hub(optax.sgd(0.1), optax.sgd(1.0)))
    gradients = normal()
    _, state = optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)
    read = hub_diagnostics(state)
    assert read["mean_weight"].keys() == SIZES.keys() and read["guard_events"] == 0
    for name, size in SIZES.items():
        module, leaf = name.split("/")
        np.testing.assert_allclose(read["mean_weight"][name], 1 / size, rtol=1e-5)
        largest = softmax(gradients[module][leaf]).max()
        np.testing.assert_allclose(read["max_weight"][name], largest, rtol=1e-5)


def test_diagnostics_need_one_hub():
    state = hub(optax.adam(0.1), optax.sgd(1.0)).init(PARAMS)
    for states, count in (((optax.EmptyState(),), 0), ((state, {"second": state}), 2)):
        with pytest.raises(ValueError, match=f"expected one HubState in the state, got {count}"):
            hub_diagnostics(states)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_large_gradients_do_not_overflow(dtype):
    params = {"w": jnp.ones(3, dtype)}
    gradients = {"w": jnp.array([1e4, -1e4, 1.0], dtype)}
    updates = blend(gradients, params, hand=optax.adam(0.1), learned=optax.sgd(1e-4))
    assert updates["w"].dtype == dtype and np.isfinite(np.float32(updates["w"])).all()
    shares = hand_shares(gradients)["w"]
    np.testing.assert_allclose(shares, [0.5, 0.5, 0.0], atol=1e-6)


def test_masked_none_and_empty_leaves_stay_out():
    params = {"a": np.ones(2, np.float32), "b": None, "c": np.zeros((0, 3), np.float32)}
    gradients = {"a": np.float32([1, 2]), "b": None, "c": np.zeros((0, 3), np.float32)}
    updates = blend(gradients, params, group="global")
    np.testing.assert_allclose(
        hand_shares(gradients, group="global")["a"], softmax(gradients["a"]), rtol=1e-6
    )
    assert updates["b"] is None and updates["c"].shape == (0, 3)
    masked = optax.masked(
        hub(optax.sgd(0.1), optax.sgd(3.0), group="global"), {"a": True, "d": False}
    )
    two = {"a": np.float32([1, 2]), "d": np.float32([50.0])}
    out, _ = masked.update(two, masked.init(two), two)
    chex.assert_trees_all_equal(out["a"], updates["a"])
    chex.assert_trees_all_equal(out["d"], two["d"])


def test_scalars_and_complex_numbers():
    params = {"s": np.float32(2.0), "z": np.complex64([1 + 1j, 2.0])}
    gradients = {"s": np.float32(-3.0), "z": np.complex64([3 + 4j, 5.0])}
    shares = hand_shares(gradients)
    np.testing.assert_allclose(shares["s"], 1.0)
    np.testing.assert_allclose(shares["z"], 0.5, rtol=1e-6)  # |3 + 4i| = 5
    updates = blend(gradients, params)
    assert updates["z"].dtype == np.complex64


def test_vmap_over_seeds_equals_a_loop():
    optimizer = hub(optax.adam(0.1), optax.sgd(1.0))
    stacked = jax.tree.map(lambda *x: np.stack(x), *(normal(seed) for seed in range(3)))

    def step(gradients):
        return optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)[0]

    together = jax.vmap(step)(stacked)
    for seed in range(3):
        alone = jax.tree.map(lambda leaf, i=seed: leaf[i], together)
        chex.assert_trees_all_close(alone, step(normal(seed)), rtol=1e-6)


def test_it_composes_with_multi_steps_and_inject_hyperparams():
    accumulated = optax.MultiSteps(hub(optax.sgd(0.1), optax.sgd(3.0)), 2)
    state = accumulated.init(PARAMS)
    _, state = accumulated.update(normal(0), state, PARAMS)
    updates, _ = accumulated.update(normal(1), state, PARAMS)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, normal(0), normal(1))
    chex.assert_trees_all_close(updates, blend(mean), rtol=1e-5)

    @optax.inject_hyperparams
    def with_rate(learning_rate):
        return hub(optax.sgd(learning_rate), optax.sgd(3.0))

    injected = with_rate(0.1)
    updates, _ = injected.update(normal(0), injected.init(PARAMS), PARAMS)
    chex.assert_trees_all_close(updates, blend(normal(0)), rtol=1e-6)


# --- what cannot be blended


def broken(learned=np.nan):
    """A learned optimizer whose update of `body/w` is not finite."""

    def update(updates, state, params=None, **_):
        bad = jnp.full_like(updates["body"]["w"], learned)
        state = jax.tree.map(lambda s: s + 1.0, state)
        state["seen"]["body"]["w"] *= learned
        return updates | {"body": updates["body"] | {"w": bad}}, state

    def init(params):
        return {"seen": jax.tree.map(jnp.zeros_like, params), "shared": jnp.zeros(3)}

    return optax.GradientTransformationExtraArgs(init, update)


def test_without_a_guard_nan_stays():
    updates = blend(normal(), learned=broken())
    assert np.isnan(updates["body"]["w"]).all()
    assert np.isfinite(updates["head"]["w"]).all()


@eager_and_jit
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_guard_takes_the_other_optimizer_and_starts_the_learned_state_anew(value, transform):
    optimizer = hub(optax.sgd(0.1), broken(value), guard="finite")
    gradients, state = normal(), optimizer.init(PARAMS)
    update = transform(functools.partial(optimizer.update))
    for step in (1, 2):
        updates, state = update(gradients, state, PARAMS)
        np.testing.assert_allclose(updates["body"]["w"], -0.1 * gradients["body"]["w"], rtol=1e-6)
        plain = blend(gradients, learned=constant(0.0))
        assert not np.allclose(updates["head"]["w"], plain["head"]["w"])
        assert state.guard_events == step
    np.testing.assert_array_equal(state.learned["seen"]["body"]["w"], 0.0)
    np.testing.assert_array_equal(state.learned["seen"]["head"]["w"], 2.0)
    np.testing.assert_array_equal(state.learned["shared"], 2.0)


def test_where_neither_is_finite_nothing_moves():
    gradients = normal()
    gradients["body"]["w"][0, 0] = np.nan
    updates = blend(gradients, guard="finite")
    np.testing.assert_array_equal(updates["body"]["w"], 0.0)
    chex.assert_trees_all_equal(updates["head"], blend(gradients)["head"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "inverted"}, "mode must be one of .*, got 'inverted'; did you mean 'invert'"),
        ({"group": "layers"}, "group must be one of .*, got 'layers'; did you mean 'layer'"),
        ({"guard": "nan"}, r"guard must be one of \('finite',\), got 'nan'"),
        ({"clip": (0.5, 0.2)}, r"0 <= low <= high <= 1, got \(0.5, 0.2\)"),
        ({"clip": (-0.1, 0.2)}, "0 <= low <= high <= 1"),
        ({"clip": (0.0, float("nan"))}, "0 <= low <= high <= 1"),
        ({"clip": 0.3}, r"clip must be \(low, high\) .*, got 0.3"),
        ({"clip": (0.1, 0.2, 0.3)}, r"clip must be \(low, high\) .*, got \(0.1, 0.2, 0.3\)"),
    ],
)
def test_bad_options_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=f"hub: .*{message}"):
        hub(optax.sgd(0.1), optax.sgd(1.0), **options)


def test_bounds_of_a_path_are_checked_too():
    clip = lambda path: (0.5, 0.2) if path[0] == "head" else None  # noqa: E731
    optimizer = hub(optax.sgd(0.1), optax.sgd(1.0), clip=clip)
    with pytest.raises(ValueError, match=r"0 <= low <= high <= 1, got \(0.5, 0.2\)"):
        optimizer.init(PARAMS)


def test_a_mode_of_a_path_is_checked_too():
    optimizer = hub(optax.sgd(0.1), optax.sgd(1.0), mode=lambda path: "other")
    with pytest.raises(ValueError, match="mode must be one of"):
        optimizer.update(normal(), optimizer.init(PARAMS), PARAMS)


def test_integer_parameters_are_refused():
    optimizer = hub(optax.sgd(0.1), optax.sgd(1.0))
    with pytest.raises(ValueError, match=r"got int32 at a/steps; leave it out with optax\.masked"):
        optimizer.init({"a": {"steps": np.int32([1])}})


def test_a_user_can_train_with_it():
    """Least squares: the blend of two descending optimizers descends."""
    optimizer = hub(optax.adam(0.05), optax.sgd(0.02), mode="invert")
    target = normal(7)

    def loss_fn(params):
        return optax.tree.norm(optax.tree.sub(params, target), squared=True)

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(gradients, state, params, value=value)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, optimizer.init(PARAMS)
    assert isinstance(state, HubState)
    start = loss_fn(params)
    for _ in range(100):
        params, state = step(params, state)
    assert loss_fn(params) < 0.05 * start
