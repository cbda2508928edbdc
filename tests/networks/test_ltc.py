"""The LTC cell and its wiring give the numbers of ncps 1.0.1 (with PyTorch 2.13, in float64)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lohp_jax.networks.ltc import auto_ncp, init_ltc, ltc

WIRINGS = [
    (
        {"units": 8, "outputs": 1, "inputs": 2},
        [
            [0, 0, 0, 0, 0, 0, 0, 0],
            [-1, 1, -1, 0, 0, 0, 0, 0],
            [1, 0, 0, 0, 0, 0, 0, 0],
            [0, 1, 1, 0, 0, 0, 0, 0],
            [0, 0, 1, 0, 0, 0, 0, 0],
            [0, 0, 1, 0, 0, 0, 0, 0],
            [0, 0, 1, 0, 0, 0, 0, 0],
            [0, 1, -1, 0, 0, 0, 0, 0],
        ],
        [[0, 0, 0, -1, -1, 0, 0, -1], [0, 0, 0, 1, 0, -1, -1, 0]],
    ),
    (
        {"units": 10, "outputs": 3, "inputs": 2, "sparsity": 0.75},
        [
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [0, 1, 0, 0, -1, 0, 0, 0, 0, 0],
            [-1, 0, 1, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, 0, 1, 1, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 1, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 1, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 1, 0, 0, 0, 0, 0],
            [0, 0, 0, 1, -1, 0, 0, 0, 0, 0],
        ],
        [[0, 0, 0, 0, 0, -1, -1, 0, 0, -1], [0, 0, 0, 0, 0, 0, 0, -1, 1, 0]],
    ),
    (
        {"units": 12, "outputs": 1, "inputs": 4, "sparsity": 0.75, "seed": 1},
        [
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [-1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0],
            [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, 0, -1, 0, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, -1, 0, 0, 0, 0, 0, 0, 0],
            [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, -1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ],
        [
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1],
            [0, 0, 0, 0, 0, 0, 1, -1, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 0, 0, 0, -1, 0, 0, 0],
            [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, -1, 0],
        ],
    ),
]
WIRING = auto_ncp(8, 2, inputs=3)
OUTPUTS = [
    [1.687918603e-03, 2.328006947e00],
    [2.965642478e-02, 2.526614374e00],
    [3.962239789e-02, 2.591439310e00],
    [4.262277427e-02, 2.612646274e00],
    [4.313283257e-02, 2.619582913e00],
]
"""Of ncps, for `normal_weights(WIRING)` and the inputs `RandomState(1).normal(size=(5, 3))`."""
LAST_STATE = [
    *(-0.149545105, -1.096560904, -0.371859651, 0.525716957),
    *(-0.215285685, -0.148949263, -0.272574110, 0.229697282),
]


def normal_weights(wiring, seed=0):
    shapes = jax.eval_shape(functools.partial(init_ltc, wiring=wiring), jax.random.key(0))
    rng = np.random.RandomState(seed)
    return {name: rng.normal(size=shapes[name].shape) for name in sorted(shapes)}


def to_jax(tree):
    return jax.tree.map(jnp.float32, tree)


def softplus(x):
    return np.log1p(np.exp(x))


def oracle(params, wiring, inputs, state):
    """The cell by its definition, synapse by synapse."""
    p, v, outputs = params, np.array(state, np.float64), []

    def conductance(prefix, value, i, j):
        gate = 1 / (1 + np.exp(-p[prefix + "sigma"][i, j] * (value - p[prefix + "mu"][i, j])))
        return softplus(p[prefix + "w"][i, j]) * gate

    for u in inputs:
        x = p["input_w"] * u + p["input_b"]
        for _ in range(6):
            new = np.empty_like(v)
            for j in range(len(v)):
                c, g = 6 * softplus(p["cm"][j]), softplus(p["gleak"][j])
                above, below = c * v[j] + g * p["vleak"][j], c + g
                for prefix, values, matrix in (
                    ("", v, wiring.adjacency),
                    ("sensory_", x, wiring.sensory_adjacency),
                ):
                    for i in np.flatnonzero(matrix[:, j]):
                        a = conductance(prefix, values[i], i, j)
                        above, below = above + a * p[prefix + "erev"][i, j], below + a
                new[j] = above / below
            v = new
        outputs.append(p["output_w"] * v[: wiring.outputs] + p["output_b"])
    return np.array(outputs), v


@pytest.mark.parametrize("options, adjacency, sensory", WIRINGS)
def test_wirings_of_the_package(options, adjacency, sensory):
    wiring = auto_ncp(**options)
    np.testing.assert_array_equal(wiring.adjacency, adjacency)
    np.testing.assert_array_equal(wiring.sensory_adjacency, sensory)


@settings(deadline=None)
@given(
    hidden=st.integers(3, 30),
    outputs=st.integers(1, 6),
    inputs=st.integers(1, 20),
    sparsity=st.floats(0.1, 0.9),
    seed=st.integers(0, 2**32 - 1),
)
def test_wirings_go_forward_and_leave_nobody_out(hidden, outputs, inputs, sparsity, seed):
    units = hidden + outputs
    wiring = auto_ncp(units, outputs, inputs=inputs, sparsity=sparsity, seed=seed)
    num_command = max(int(0.4 * hidden), 1)
    names = "m" * outputs + "c" * num_command + "i" * (hidden - num_command)
    linked = {(names[i], names[j]) for i, j in np.argwhere(wiring.adjacency)}
    assert linked == {("c", "m"), ("c", "c"), ("i", "c")}
    assert {names[j] for _, j in np.argwhere(wiring.sensory_adjacency)} == {"i"}
    assert set(np.unique(wiring.adjacency)) | set(np.unique(wiring.sensory_adjacency)) <= {-1, 0, 1}

    of = {kind: np.array([name == kind for name in names]) for kind in "mci"}
    used = {
        "sensory to inter": wiring.sensory_adjacency[:, of["i"]],
        "inter to command": wiring.adjacency[of["i"]][:, of["c"]],
        "command to motor": wiring.adjacency[of["c"]][:, of["m"]],
    }
    for name, block in used.items():
        assert block.any(0).all() and block.any(1).all(), name


def test_outputs_and_state_of_the_package():
    inputs = np.random.RandomState(1).normal(size=(5, 3))
    outputs, state = ltc(to_jax(normal_weights(WIRING)), WIRING, jnp.float32(inputs))
    np.testing.assert_allclose(outputs, OUTPUTS, atol=2e-6)
    np.testing.assert_allclose(state, LAST_STATE, atol=2e-6)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_the_cell_equals_its_definition(transform):
    rng = np.random.RandomState(2)
    params, inputs, start = normal_weights(WIRING, 3), rng.normal(size=(4, 3)), rng.normal(size=8)
    outputs, state = transform(functools.partial(ltc, wiring=WIRING))(
        to_jax(params), inputs=jnp.float32(inputs), state=jnp.float32(start)
    )
    expected = oracle(params, WIRING, inputs, start)
    np.testing.assert_allclose(outputs, expected[0], atol=2e-6)
    np.testing.assert_allclose(state, expected[1], atol=2e-6)


def test_the_state_carries_a_sequence_on():
    params, inputs = to_jax(normal_weights(WIRING)), jnp.ones((6, 3))
    whole, last = ltc(params, WIRING, inputs)
    first, state = ltc(params, WIRING, inputs[:3])
    second, end = ltc(params, WIRING, inputs[3:], state)
    np.testing.assert_allclose(whole, np.concatenate([first, second]), atol=1e-6)
    np.testing.assert_allclose(last, end, atol=1e-6)


@jax.jit
def state_and_gradients(params, inputs, start):
    def energy(params):
        state = ltc(params, WIRING, inputs, start)[1]
        return jnp.sum(state**2), state

    grads, state = jax.grad(energy, has_aux=True)(params)
    return state, grads


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.1, 1.0, 10.0, 100.0]))
def test_the_state_is_bounded_and_gradients_are_finite(seed, scale):
    params = {name: scale * value for name, value in normal_weights(WIRING, seed).items()}
    rng = np.random.RandomState(seed)
    start, inputs = scale * rng.normal(size=8), scale * rng.normal(size=(3, 3))
    parts = [start, params["vleak"], params["erev"], params["sensory_erev"]]
    bound = max(np.abs(part).max() for part in parts)
    state, grads = state_and_gradients(to_jax(params), jnp.float32(inputs), jnp.float32(start))
    assert np.abs(state).max() <= bound * (1 + 1e-5)
    assert all(np.all(np.isfinite(leaf)) for leaf in grads.values())


def of_eight():
    """A network of eight units, and eight inputs for it."""
    wiring = auto_ncp(units=8, outputs=1, inputs=2)
    inputs = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    return init_ltc(jax.random.key(0), wiring), wiring, inputs


def test_a_dt_of_each_input_is_that_of_its_step():
    """As many inputs as units: a dt goes with an input all the same."""
    params, wiring, inputs = of_eight()
    dt = np.ones(8, np.float32)
    dt[3] = 5.0
    outputs, state = ltc(params, wiring, inputs, dt=dt)
    expected, last = [], None
    for x, span in zip(inputs, dt, strict=True):
        out, last = ltc(params, wiring, x[None], last, dt=float(span))
        expected.append(out[0])
    np.testing.assert_allclose(outputs, np.stack(expected), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state, last, rtol=1e-5, atol=1e-6)
    assert not np.allclose(outputs, ltc(params, wiring, inputs)[0], atol=1e-3)
    with pytest.raises(
        ValueError, match=r"scalar dt, or one for each of 8 inputs, got shape \[7\]"
    ):
        ltc(params, wiring, inputs, dt=dt[:7])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.int32, np.uint8, bool])
def test_inputs_of_any_real_type_are_computed_in_float32(dtype):
    params, wiring, inputs = of_eight()
    inputs = jnp.asarray(np.round(np.abs(inputs)), dtype)
    outputs, state = ltc(params, wiring, inputs)
    expected, last = ltc(params, wiring, inputs.astype(jnp.float32))
    assert outputs.dtype == state.dtype == jnp.float32
    np.testing.assert_array_equal(outputs, expected)
    again = ltc(params, wiring, inputs, state.astype(jnp.bfloat16))[1]
    assert again.dtype == jnp.float32 and last.dtype == jnp.float32
    with pytest.raises(
        ValueError, match="expected inputs and weights of real numbers, got complex64"
    ):
        ltc(params, wiring, inputs.astype(jnp.complex64))


def test_synapses_that_do_not_exist_have_no_effect_and_the_others_do():
    params = to_jax(normal_weights(WIRING))
    grads = state_and_gradients(params, jnp.ones((3, 3)), jnp.zeros(8))[1]
    for prefix, matrix in (("", WIRING.adjacency), ("sensory_", WIRING.sensory_adjacency)):
        for name in ("w", "sigma", "mu", "erev"):
            grad = np.asarray(grads[prefix + name])
            assert np.all(grad[matrix == 0] == 0), prefix + name
            assert np.all(grad[matrix != 0] != 0), prefix + name


def test_initial_weights():
    wiring = auto_ncp(40, 4, inputs=30)
    params = jax.jit(lambda key: init_ltc(key, wiring))(jax.random.key(0))
    ranges = {"w": (0.001, 1), "sigma": (3, 8), "mu": (0.3, 0.8)}
    ranges |= {"sensory_" + name: bounds for name, bounds in ranges.items()}
    ranges |= {"gleak": (0.001, 1), "vleak": (-0.2, 0.2), "cm": (0.4, 0.6)}
    for name, (low, high) in ranges.items():
        assert low <= params[name].min() < low + 0.1 * (high - low), name
        assert high - 0.1 * (high - low) < params[name].max() <= high, name
    np.testing.assert_array_equal(params["erev"], wiring.adjacency)
    np.testing.assert_array_equal(params["sensory_erev"], wiring.sensory_adjacency)
    for side, size in (("input", 30), ("output", 4)):
        np.testing.assert_array_equal(params[side + "_w"], np.ones(size))
        np.testing.assert_array_equal(params[side + "_b"], np.zeros(size))
    assert {leaf.dtype for leaf in params.values()} == {jnp.dtype(jnp.float32)}
    assert not np.array_equal(params["w"][:30], params["sensory_w"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"units": 3}, "outputs <= units - 3, got inputs=2, outputs=1 and units=3; use more units"),
        ({"outputs": 0}, "1 <= outputs .* got inputs=2, outputs=0"),
        ({"inputs": 0}, "expected inputs >= 1 .* got inputs=0"),
        ({"sparsity": 0.95}, r"sparsity must be in \[0.1, 0.9\], got 0.95"),
        ({"sparsity": float("nan")}, "sparsity must be .* got nan"),
    ],
)
def test_auto_ncp_rejects(options, message):
    with pytest.raises(ValueError, match=f"auto_ncp: .*{message}"):
        auto_ncp(**{"units": 8, "outputs": 1, "inputs": 2} | options)


@pytest.mark.parametrize("shape", [(5,), (5, 2), (1, 5, 3)])
def test_ltc_rejects_inputs_of_another_shape(shape):
    with pytest.raises(AssertionError):
        ltc(to_jax(normal_weights(WIRING)), WIRING, jnp.ones(shape))
