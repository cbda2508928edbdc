"""VeLO, Celo and Celo2 give the numbers of the published implementations."""

import hashlib
import pathlib

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax.optimizers.celo2 import celo2, newton_schulz, scale_by_celo2
from lohp_jax.optimizers.hub import hub
from lohp_jax.optimizers.theta import check_theta, expected_shapes, load_theta, rule_of, save_theta
from lohp_jax.optimizers.velo import celo, celo_adam, velo

ORACLES = pathlib.Path(__file__).parents[2].parent / "shared" / "oracles"
needs_oracles = pytest.mark.skipif(
    not ORACLES.exists(), reason=f"the reference numbers are not here ({ORACLES})"
)
RULES = {"velo": velo, "celo": celo, "celo_adam": celo_adam}
PARAMS = {
    "w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3),
    "b": np.zeros(3, np.float32),
    "s": np.float32(0.5),
}


def is_shape(node):
    return isinstance(node, tuple)


@pytest.fixture
def make(random_theta, narrow):
    """Makes a rule with weights of random numbers."""

    def make(rule):
        theta = random_theta(rule)
        return scale_by_celo2(theta) if rule == "celo2" else RULES[rule](theta, 20)

    return make


def gradients(seed=0, like=PARAMS):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: np.float32(rng.normal(size=np.shape(p))), like)


# --- against the published implementations


def theta_of(arrays, prefix):
    """Weights nested as in a checkpoint, from the flat names of the reference."""
    theta = {}
    for name in (name for name in arrays.files if name.startswith(prefix)):
        top, rest = name.removeprefix(prefix).split("/", 1)
        module, _, leaf = rest.rpartition("/")
        node = theta.setdefault(top, {})
        (node.setdefault(module, {}) if module else node)[leaf] = arrays[name]
    return theta


def full_size_theta():
    """Case C at H = 512 and P = 256, from its seed."""
    shapes = expected_shapes("velo", hidden=512, bank=256)
    flat = {
        "/".join(key.key for key in path): shape
        for path, shape in jax.tree.leaves_with_path(shapes, is_leaf=is_shape)
    }
    rng, leaves = np.random.RandomState(4321), {}
    for name in sorted(flat):
        shape, leaf = flat[name], name.rpartition("/")[2]
        if name.startswith("ff_mod_stack"):
            scale = 0.1 if leaf.startswith("b") else 30**-0.5 if leaf.startswith("w0") else 0.5
        elif name.startswith("lstm_init_state") or leaf == "b":
            scale = 0.1
        else:
            scale = shape[0] ** -0.5
        leaves[name] = (rng.standard_normal(shape) * scale).astype(np.float32)
    leaves["rnn_params/step_size/b"] += 1
    digest = hashlib.sha256(b"".join(leaves[name].tobytes() for name in sorted(leaves))).digest()
    names = {
        "/".join(key.key for key in path)
        for path, _ in jax.tree.leaves_with_path(shapes, is_leaf=is_shape)
    }
    assert names == leaves.keys()
    theta = jax.tree.map_with_path(
        lambda path, _: leaves["/".join(key.key for key in path)], shapes, is_leaf=is_shape
    )
    return theta, digest


def replay(optimizer, arrays, case):
    """Parameters after each of the five recorded steps, and the reference's."""
    names = ("b", "w")
    params = {k: jnp.asarray(arrays[f"{case}/params0/{k}"]) for k in names}
    state = optimizer.init(params)
    update = jax.jit(lambda g, s, p, value: optimizer.update(g, s, p, value=value))
    for t in range(5):
        grads = {k: arrays[f"{case}/step{t}/grad/{k}"] for k in names}
        updates, state = update(grads, state, params, arrays[f"{case}/losses"][t])
        params = optax.apply_updates(params, updates)
        yield t, params, {k: arrays[f"{case}/step{t}/params/{k}"] for k in names}


@needs_oracles
@pytest.mark.parametrize(
    "rule, file, prefix, case, later",
    [
        ("velo", "velo", "theta/", "A", 2e-5),
        ("celo", "celo", "celo/theta/", "celo/A", 1e-6),
        ("celo_adam", "celo", "celo_adam/theta/", "celo_adam/A", 1e-6),
    ],
)
def test_five_steps_equal_the_reference(rule, file, prefix, case, later):
    with np.load(ORACLES / f"{file}.npz", allow_pickle=False) as arrays:
        optimizer = RULES[rule](theta_of(arrays, prefix), int(arrays[f"{case}/num_steps"]))
        for t, actual, expected in replay(optimizer, arrays, case):
            chex.assert_trees_all_close(actual, expected, rtol=0, atol=1e-6 if t == 0 else later)


@needs_oracles
def test_velo_at_its_published_size_equals_the_reference(tmp_path):
    """From a file of the official layout."""
    theta, digest = full_size_theta()
    file = tmp_path / "checkpoint"
    official = {"params": theta, "gen_id": "x", "step": 3}
    file.write_bytes(flax.serialization.msgpack_serialize(official))
    loaded = load_theta(file)
    with np.load(ORACLES / "velo.npz", allow_pickle=False) as arrays:
        assert digest == bytes(arrays["C/theta_sha256_of_concat"])
        optimizer = velo(loaded, int(arrays["C/num_steps"]))
        for _, actual, expected in replay(optimizer, arrays, "C"):
            chex.assert_trees_all_close(actual, expected, rtol=0, atol=1e-6)


@needs_oracles
def test_celo2_equals_the_reference():
    with np.load(ORACLES / "celo.npz", allow_pickle=False) as arrays:
        optimizer = scale_by_celo2(theta_of(arrays, "celo2/theta/"))
        names = ("conv", "u", "w")
        params = {k: jnp.asarray(arrays[f"celo2/ortho/params0/{k}"]) for k in names}
        state = optimizer.init(params)
        for t in range(4):
            grads = {k: arrays[f"celo2/ortho/step{t}/grad/{k}"] for k in names}
            expected = {k: arrays[f"celo2/ortho/step{t}/update/{k}"] for k in names}
            updates, state = jax.jit(optimizer.update)(grads, state, params)
            chex.assert_trees_all_close(updates, expected, rtol=0, atol=2e-5)
            params = jax.tree.map(lambda p, u: p - 0.01 * u, params, expected)


@needs_oracles
def test_real_celo_weights_load_and_train():
    optimizer = celo(load_theta(ORACLES / "celo_theta.state"), 200)
    target = gradients(3)

    def loss_fn(params):
        return optax.tree.norm(optax.tree.sub(params, target), squared=True)

    @jax.jit
    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(grads, state, params, value=value)
        return (optax.apply_updates(params, updates), state), value

    start = jax.tree.map(jnp.ones_like, PARAMS)
    _, losses = jax.lax.scan(step, (start, optimizer.init(start)), None, 200)
    assert losses[-1] < 0.1 * losses[0]


# --- as a part of optax


@pytest.mark.parametrize("rule", [*RULES, "celo2"])
def test_updates_keep_structure_and_dtype_and_states_their_shape(rule, make):
    params = PARAMS | {"h": np.ones((2, 2), jnp.bfloat16)}
    optimizer = make(rule)
    state = optimizer.init(params)
    grads = gradients(like=params) | {"h": np.ones((2, 2), jnp.bfloat16)}
    updates, new = (
        jax.jit(lambda g, s, p: optimizer.update(g, s, p, value=1.0))(grads, state, params)
        if rule != "celo2"
        else jax.jit(optimizer.update)(grads, state, params)
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    assert all(np.isfinite(np.float32(u)).all() for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("rule", RULES)
def test_the_loss_and_the_parameters_are_needed(rule, make):
    optimizer = make(rule)
    state = optimizer.init(PARAMS)
    with pytest.raises(ValueError, match=rf"{rule}: update needs the training loss.*value=loss"):
        optimizer.update(gradients(), state, PARAMS)
    if rule != "celo_adam":
        with pytest.raises(ValueError, match=f"{rule}: update needs the parameters"):
            optimizer.update(gradients(), state, value=1.0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_steps", [0, -3, 2.5, 100.0, "100", None])
def test_a_plan_has_steps(rule, num_steps, random_theta):
    message = f"{rule}: num_steps must be a positive whole number, got {num_steps!r}"
    with pytest.raises(ValueError, match=message):
        RULES[rule](random_theta(rule), num_steps)


@pytest.mark.parametrize("rule, num_steps", [("velo", 1), ("celo", 2), ("celo_adam", np.int64(3))])
def test_beyond_the_plan_updates_stay_finite(rule, num_steps, random_theta):
    params = {"w": PARAMS["w"]}
    optimizer = RULES[rule](random_theta(rule), num_steps)
    state = optimizer.init(params)
    update = jax.jit(lambda g, s, value: optimizer.update(g, s, params, value=value))
    for step in range(8):
        updates, state = update(gradients(step, params), state, 1.0 / (1 + step))
        assert all(np.isfinite(u).all() and np.any(u) for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("rule", [*RULES, "celo2"])
@pytest.mark.parametrize(
    "leaf, found",
    [
        (np.zeros((0, 3), np.float32), r"float32\[0, 3\] with no entries"),
        (np.zeros(2, np.int32), r"int32\[2\]"),
        (np.zeros(2, np.complex64), r"complex64\[2\]"),
    ],
)
def test_what_cannot_be_optimized_is_named(rule, leaf, found, make):
    with pytest.raises(ValueError, match=rf"{rule}: .*got {found} at \['a'\]\['b'\].*optax.masked"):
        make(rule).init(PARAMS | {"a": {"b": leaf}})


@pytest.mark.parametrize("rule", [*RULES, "celo2"])
@pytest.mark.parametrize(
    "change",
    [
        lambda tree: {k: tree[k] for k in ("w", "b")},
        lambda tree: tree | {"w": tree["w"].T},
        lambda tree: tree | {"s": [tree["s"]]},
    ],
    ids=["fewer", "shape", "structure"],
)
def test_a_step_is_for_the_parameters_of_init(rule, change, make):
    optimizer = make(rule)
    state = optimizer.init(PARAMS)
    extra = {} if rule == "celo2" else {"value": 1.0}
    with pytest.raises(ValueError, match=f"{rule}: the gradients of update are unlike.*call init"):
        optimizer.update(change(gradients()), state, PARAMS, **extra)
    if rule != "celo_adam":  # which does not read them
        with pytest.raises(ValueError, match=f"{rule}: the parameters of update are unlike"):
            optimizer.update(gradients(), state, change(PARAMS), **extra)


@pytest.mark.parametrize("rule", [*RULES, "celo2"])
def test_a_gradient_of_nan_stays_where_it_was_for_one_step(rule, make):
    optimizer = make(rule)
    state, bad = optimizer.init(PARAMS), gradients()
    bad["b"][1] = np.nan
    extra = {} if rule == "celo2" else {"value": 1.0}
    updates, state = jax.jit(lambda g, s: optimizer.update(g, s, PARAMS, **extra))(bad, state)
    assert {k for k, u in updates.items() if not np.isfinite(u).all()} == {"b"}
    kept = state.adam.nu if rule == "celo_adam" else state.accumulators.rms
    assert np.isnan(kept["b"][1])


@pytest.mark.parametrize("rule", RULES)
def test_infinite_gradients_and_losses_are_clipped(rule, make):
    """To 1000, and, from the second loss on, to twice the running mean."""
    params, optimizer = {"w": PARAMS["w"]}, make(rule)
    state = optimizer.init(params)
    update = jax.jit(lambda g, s, value: optimizer.update(g, s, params, value=value))
    _, state = update(gradients(like=params), state, 1.0)
    infinite, largest = gradients(1, params), gradients(1, params)
    infinite["w"][0, 0], largest["w"][0, 0] = -np.inf, -1000.0
    actual, expected = update(infinite, state, np.inf), update(largest, state, 2.0)
    chex.assert_trees_all_equal(actual, expected)
    chex.assert_tree_all_finite(actual)


@pytest.mark.parametrize("rule", [*RULES, "celo2"])
def test_no_parameters_are_no_trouble(rule, make):
    optimizer = make(rule)
    state = optimizer.init({})
    extra = {} if rule == "celo2" else {"value": 1.0}
    updates, state = jax.jit(lambda s: optimizer.update({}, s, {}, **extra))(state)
    assert updates == {}


@pytest.mark.parametrize("rule", RULES)
def test_the_number_of_steps_cannot_be_injected(rule, random_theta):
    injected = optax.inject_hyperparams(RULES[rule])(theta=random_theta(rule), num_steps=20)
    with pytest.raises(
        ValueError, match=rf"{rule}: num_steps is static, got an array.*static_args"
    ):
        injected.init(PARAMS)


def test_gradients_accumulate_over_steps(make):
    params = {"w": PARAMS["w"]}
    single, accumulating = make("velo"), optax.MultiSteps(make("velo"), 2)
    halves = [jax.tree.map(lambda g, w=w: w * g, gradients(like=params)) for w in (0.5, 1.5)]
    state = accumulating.init(params)
    step = jax.jit(lambda g, s, v: accumulating.update(g, s, params, value=v))
    for grads, value in zip(halves, (9.0, 2.0), strict=True):
        updates, state = step(grads, state, value)
    update = jax.jit(lambda g, s: single.update(g, s, params, value=2.0)[0])
    expected = update(gradients(like=params), single.init(params))
    chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rule", RULES)
def test_a_loss_of_nan_is_remembered(rule, make):
    params, optimizer = {"w": PARAMS["w"]}, make(rule)
    state = optimizer.init(params)
    update = jax.jit(lambda g, s, value: optimizer.update(g, s, params, value=value))
    for value in (1.0, np.nan, 1.0, 1.0):
        updates, state = update(gradients(like=params), state, value)
    assert np.isnan(state.losses.mean).all()
    assert all(np.isnan(u).all() for u in jax.tree.leaves(updates))


def test_an_outlier_of_a_gradient_is_clipped(make):
    optimizer = make("velo")
    state, outlier = optimizer.init(PARAMS), gradients()
    outlier["w"][0, 0] = 1e6
    clipped = jax.tree.map(lambda g: np.clip(g, -1000, 1000), outlier)
    update = jax.jit(lambda g: optimizer.update(g, state, PARAMS, value=1.0)[0])
    actual, expected = update(outlier), update(clipped)
    chex.assert_trees_all_equal(actual, expected)


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), 0.0])
def test_celo2_needs_a_learning_rate_that_is_positive_and_finite(rate, random_theta):
    message = f"celo2: learning_rate must be positive and finite, got {rate}"
    with pytest.raises(ValueError, match=message):
        celo2(random_theta("celo2"), rate)


def test_celo2_trains_what_has_no_matrix(random_theta):
    params = {"b": PARAMS["b"], "s": PARAMS["s"]}
    optimizer = celo2(random_theta("celo2"), 0.1)
    updates, _ = optimizer.update(gradients(like=params), optimizer.init(params), params)
    assert all(np.any(u) for u in jax.tree.leaves(updates))


def test_celo2_leaves_vectors_to_adam(random_theta):
    theta = random_theta("celo2")
    optimizer = celo2(theta, 0.1)
    updates, _ = optimizer.update(gradients(), optimizer.init(PARAMS), PARAMS)
    adam = optax.adamw(0.1, b1=0.9, b2=0.95, weight_decay=0.0)
    expected, _ = adam.update(gradients(), adam.init(PARAMS), PARAMS)
    for name in ("b", "s"):
        np.testing.assert_allclose(updates[name], expected[name], rtol=1e-6)
    np.testing.assert_allclose(np.sqrt(np.mean(updates["w"] ** 2)), 0.1, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("gradient", ["same", jnp.float32])
def test_celo2_keeps_its_moments_in_float32(random_theta, dtype, gradient):
    """The square of 1e-4 is zero in float16. In a scan states must keep their types."""
    optimizer = celo2(random_theta("celo2"), 0.1)
    shapes = {"w": (2, 3), "b": (3,), "s": ()}
    params = {name: jnp.ones(shape, dtype) for name, shape in shapes.items()}
    gradients = {
        "w": jnp.full((2, 3), 1e-4),
        "b": jnp.array([1e-4, 0.0, -1e-4]),
        "s": jnp.zeros(()),
    }
    seen = jax.tree.map(lambda g: g.astype(dtype if gradient == "same" else gradient), gradients)

    def run(params, seen):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(seen, state, params)
            return (optax.apply_updates(params, updates), state), updates

        return jax.lax.scan(step, (params, optimizer.init(params)), length=3)[1]

    wide, rounded = ({k: jnp.float32(x) for k, x in tree.items()} for tree in (params, seen))
    updates = run(params, seen)
    for actual, expected in zip(*map(jax.tree.leaves, (updates, run(wide, rounded))), strict=True):
        assert np.isfinite(actual).all()
        np.testing.assert_allclose(jnp.float32(actual), expected, atol=0.01)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (2, 4, 4)])
def test_newton_schulz_brings_singular_values_near_one(shape):
    matrix = np.float32(np.random.default_rng(0).normal(size=shape))
    values = np.linalg.svd(newton_schulz(matrix), compute_uv=False)
    assert values.min() > 0.5 and values.max() < 1.3


def test_the_guard_of_hub_heals_a_learned_optimizer_that_saw_a_loss_of_nan(make):
    losses = [np.nan, 1.0, 0.9, 0.8, 0.7]
    learned = make("velo")
    guarded = hub(optax.adam(0.1), learned, mode="invert", guard="finite")

    def run(optimizer):
        state = optimizer.init(PARAMS)
        update = jax.jit(lambda g, s, value: optimizer.update(g, s, PARAMS, value=value))
        for seed, value in enumerate(losses):
            updates, state = update(gradients(seed), state, value)
        return all(np.isfinite(u).all() for u in jax.tree.leaves(updates)), state

    finite, _ = run(learned)
    assert not finite  # as published: it remembers
    finite, state = run(guarded)
    assert finite and np.isfinite(state.learned.losses.mean).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bare", [False, True], ids=["tree", "one array"])
def test_after_a_loss_of_nan_the_guard_lets_it_see_losses_again(rule, bare, make):
    """The running means, corrected for their start, are those of the losses since."""
    params = PARAMS["w"] if bare else {"w": PARAMS["w"]}
    optimizer = hub(optax.sgd(0.1), make(rule), mode="invert", guard="finite")
    state = optimizer.init(params)
    update = jax.jit(lambda g, s, value: optimizer.update(g, s, params, value=value)[1])
    losses = [5.0, 4.0, 5.0, np.nan, 2.0, 2.0, 2.0]
    for seed, value in enumerate(losses):
        state = update(gradients(seed, params), state, value)
    seen = state.learned.losses
    decays = np.exp(-1.0 / np.logspace(1, np.log10(20), 10))
    assert seen.count == 3 and state.learned.step == len(losses)
    np.testing.assert_allclose(seen.mean / (1 - decays**3), 2.0, rtol=1e-5)
    np.testing.assert_allclose(seen.least, 2.0, rtol=1e-5)


# --- weights on disk


@pytest.mark.parametrize("layout", ["official", "bare"])
def test_weights_of_the_published_size_load(layout, tmp_path):
    shapes = expected_shapes("velo", hidden=512, bank=256)
    rng = np.random.default_rng(0)
    theta = jax.tree.map(
        lambda shape: rng.random(shape, np.float32) * 0.01, shapes, is_leaf=is_shape
    )
    content = theta if layout == "bare" else {"params": theta, "gen_id": "x", "step": 3}
    file = tmp_path / "checkpoint"
    file.write_bytes(flax.serialization.msgpack_serialize(content))
    assert file.stat().st_size == pytest.approx(9_282_536, abs=200)
    loaded = load_theta(file)
    assert rule_of(loaded) == "velo"
    chex.assert_trees_all_equal(loaded, theta)
    assert sum(x.size for x in jax.tree.leaves(loaded)) == 2_320_385


@pytest.mark.parametrize("rule", [*RULES, "celo2"])
def test_what_is_saved_is_loaded(rule, tmp_path, random_theta):
    theta = random_theta(rule)
    save_theta(tmp_path / "theta", theta)
    loaded = load_theta(tmp_path / "theta")
    assert rule_of(loaded) == rule
    chex.assert_trees_all_equal(loaded, theta)


def spoil(theta, path, leaf):
    """Replaces one entry of weights, or takes it out for None."""
    node = theta
    for key in path[:-1]:
        node = node.setdefault(key, {})
    if leaf is None:
        del node[path[-1]]
    else:
        node[path[-1]] = leaf


@pytest.mark.parametrize(
    "path, leaf, message",
    [
        (
            ("ff_mod_stack", "~", "w1"),
            None,
            r"lack \[ff_mod_stack\]\[~\]\[w1\], of shape \(3, 4, 4\)",
        ),
        (
            ("rnn_params", "extra", "w"),
            np.zeros(1, np.float32),
            r"hold \[rnn_params\]\[extra\]\[w\]",
        ),
        (
            ("rnn_params", "rnn/linear", "b"),
            np.zeros(7, np.float32),
            r"\[rnn/linear\]\[b\] have shape \(7,\), expected \(24,\)",
        ),
        (("rnn_params", "step_size", "b"), np.zeros(1), "are float64, expected float32"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, path, leaf, message, random_theta):
    theta = random_theta("velo")
    spoil(theta, path, leaf)
    (tmp_path / "theta").write_bytes(flax.serialization.msgpack_serialize(theta))
    with pytest.raises(ValueError, match=message) as error:
        load_theta(tmp_path / "theta")
    assert str(tmp_path / "theta") in str(error.value)
    with pytest.raises(ValueError, match=message):
        velo(theta, 10)


@pytest.mark.parametrize("size", [0, 10, 500])
def test_a_truncated_file_is_refused(tmp_path, size, random_theta):
    save_theta(tmp_path / "theta", random_theta("velo"))
    (tmp_path / "theta").write_bytes((tmp_path / "theta").read_bytes()[:size])
    with pytest.raises(ValueError, match=r"load_theta: .*theta .*damaged"):
        load_theta(tmp_path / "theta")


@pytest.mark.parametrize(
    "good, bad, message",
    [
        (b"lstm_init_state", b"\xc1" * 15, "damaged"),
        (b"float32", b"floaq32", "damaged"),
        (b"float32", b"float16", "damaged"),
        (b"step_size", b"step_sise", r"hold \[rnn_params\]\[step_sise\]"),
        (np.float32(7.5).tobytes(), np.float32(np.nan).tobytes(), "not finite"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, good, bad, message, random_theta):
    theta = random_theta("velo")
    theta["rnn_params"]["step_size"]["b"][0] = 7.5
    save_theta(tmp_path / "theta", theta)
    content = (tmp_path / "theta").read_bytes()
    assert good in content
    (tmp_path / "theta").write_bytes(content.replace(good, bad, 1))
    with pytest.raises(ValueError, match=message) as error:
        load_theta(tmp_path / "theta")
    assert str(tmp_path / "theta") in str(error.value)


@pytest.mark.parametrize("content", [b"\x80\x04K\x01.", b"hello", b"\xc1", b"\xc0", b"\x90"])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "theta").write_bytes(content)
    with pytest.raises(ValueError, match="load_theta: "):
        load_theta(tmp_path / "theta")


def test_no_file_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_theta(tmp_path / "missing")


@pytest.mark.parametrize(
    "rule, other",
    [("velo", "celo"), ("celo", "celo_adam"), ("celo_adam", "velo"), ("celo2", "velo")],
)
def test_weights_of_another_rule_are_refused(rule, other, random_theta):
    with pytest.raises(ValueError, match=f"{other}: the weights"):
        check_theta(random_theta(rule), other)
    with pytest.raises(ValueError, match=f"{other}: the weights"):
        RULES[other](random_theta(rule), 10)
    with pytest.raises(ValueError, match="celo2: the weights"):
        scale_by_celo2(random_theta("velo"))
