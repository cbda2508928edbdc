"""Learned optimizers fuse their features, and give the same however tensors are grouped or placed."""

import json
import os
import pathlib
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax.optimizers import features
from lohp_jax.optimizers.celo2 import scale_by_celo2
from lohp_jax.optimizers.theta import load_theta, save_theta
from lohp_jax.optimizers.velo import celo, celo_adam, velo

RULES = {"velo": velo, "celo": celo, "celo_adam": celo_adam}
NUM_DEVICES, NUM_STEPS = 8, 3


def build(rule, theta):
    if rule == "celo2":
        return optax.with_extra_args_support(scale_by_celo2(theta, orthogonalise=False))
    return RULES[rule](theta, 20)


@pytest.fixture
def make(random_theta):
    """Makes a rule with weights of random numbers."""
    return lambda rule: build(rule, random_theta(rule, scale=0.1))


def random_like(shapes, seed):
    rng = np.random.default_rng(seed)
    return {k: np.float32(rng.normal(size=shape)) for k, shape in shapes.items()}


def run(optimizer, params, transform=jax.jit, num_steps=NUM_STEPS):
    """Parameters after a few steps with fixed gradients."""
    state = optimizer.init(params)
    step = transform(lambda g, s, p, value: optimizer.update(g, s, p, value=value))
    shapes = {k: p.shape for k, p in params.items()}
    for t in range(num_steps):
        updates, state = step(random_like(shapes, t), state, params, np.float32(1.0 / (1 + t)))
        params = optax.apply_updates(params, updates)
    return params, state


# --- memory


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA fuses otherwise elsewhere")
@pytest.mark.parametrize("rule", [*RULES, "celo2"])
def test_a_step_needs_little_more_memory_than_its_state(rule, make):
    """Thirty channels would be 30 times the parameters; what is kept are a few rows, and one tensor."""
    optimizer = make(rule)
    params = {"w": jax.ShapeDtypeStruct((600, 700), jnp.float32)}
    state = jax.eval_shape(optimizer.init, params)

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params, value=1.0)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.3 * 4 * 600 * 700


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA fuses otherwise elsewhere")
@pytest.mark.parametrize("rule", ["velo", "celo2"])
def test_a_step_of_many_equal_tensors_needs_copies_of_what_it_joins(rule, make):
    """Six arrays like the parameters and their updates, where thirty channels would be 30 more."""
    optimizer = make(rule)
    params = {f"w{i}": jax.ShapeDtypeStruct((60, 70), jnp.float32) for i in range(9)}
    state = jax.eval_shape(optimizer.init, params)

    def step(params, state, grads):
        return optimizer.update(grads, state, params, value=1.0)

    compiled = jax.jit(step, donate_argnums=1).lower(params, state, params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 4 * 9 * 60 * 70


# --- grouping


@pytest.mark.parametrize("rule", [pytest.param("velo", marks=pytest.mark.slow), "celo2"])
def test_tensors_of_equal_shape_may_go_together(rule, monkeypatch, make, narrow):
    shapes = {"a": (4, 3), "b": (5,), "c": (4, 3), "d": (5,)}
    params = random_like(shapes, 9)
    together, state = run(make(rule), params)
    monkeypatch.setattr(features, "_LARGE", -1)  # none is small, and none has many like it
    apart, state_apart = run(make(rule), params)
    jax.tree.map(lambda p, state: chex.assert_equal_shape([p, state]), params, together)
    chex.assert_trees_all_close(together, apart, rtol=2e-5, atol=1e-6)
    chex.assert_trees_all_close(state, state_apart, rtol=1e-4, atol=1e-6)


def test_many_large_tensors_of_equal_shape_compile_once(monkeypatch):
    calls = []

    def function(tensor, row):
        calls.append(tensor.shape)
        return tensor * row, jnp.sum(tensor)

    tensors = [jnp.full((2, 2), float(i)) for i in range(4)] + [jnp.ones(3)] * 2
    monkeypatch.setattr(features, "_LARGE", 3)
    monkeypatch.setattr(features, "_FEW", 3)
    apart, together = features.map_tensors(function, tensors, jnp.arange(6.0))
    assert calls == [(2, 2), (3,)]
    chex.assert_trees_all_close(apart, [x * i for i, x in enumerate(tensors)])
    np.testing.assert_allclose(together, [0, 4, 8, 12, 3, 3])


@pytest.mark.parametrize("shape, axes", [((3, 5), (0, 1)), ((2, 300, 2), (1, 2)), ((7,), (0,))])
def test_means_in_one_loop_are_means(shape, axes, monkeypatch):
    arrays = [np.float32(np.random.default_rng(i).normal(1, 1, shape)) for i in range(3)]
    expected = [np.mean(np.float64(x), axes, keepdims=True) for x in arrays]
    chex.assert_trees_all_close(features._means(arrays, axes), expected, rtol=1e-5)
    monkeypatch.setattr(features, "_LONG_LOOP", 1)
    chex.assert_trees_all_close(features._means(arrays, axes), expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2**20,), (20000, 50), (3, 300), (2, 9001)])
def test_means_of_many_entries_keep_their_digits(shape):
    x = np.float32(np.random.default_rng(0).uniform(0.5, 1.5, shape))
    axes = tuple(range(len(shape)))
    actual = jax.jit(lambda x: features._means([x, x**2], axes))(x)
    expected = [np.mean(np.float64(x) ** n, keepdims=True) for n in (1, 2)]
    chex.assert_trees_all_close(actual, expected, rtol=1e-5)


# --- transformations and types


@pytest.mark.parametrize("rule", [*RULES, "celo2"])
def test_with_64_bits_enabled_a_state_of_float32_can_be_scanned(rule, make):
    optimizer, params = make(rule), random_like({"w": (4, 3), "b": (3,)}, 0)

    def step(carry, loss):
        updates, state = optimizer.update(params, carry[1], carry[0], value=loss)
        return (optax.apply_updates(carry[0], updates), state), None

    with jax.enable_x64(True):
        start = params, jax.eval_shape(optimizer.init, params)
        scanned = jax.eval_shape(lambda s, v: jax.lax.scan(step, s, v)[0], start, np.ones(2))
    chex.assert_trees_all_equal_shapes_and_dtypes(scanned, start)


@pytest.mark.parametrize("rule", ["velo", "celo_adam", "celo2"])
def test_runs_are_vmapped_and_scanned(rule, make, narrow):
    optimizer, shapes = make(rule), {"w": (4, 3)}
    starts = [random_like(shapes, seed) for seed in range(3)]

    def run_scanned(params):
        grads = jax.tree.map(lambda *g: jnp.stack(g), *(random_like(shapes, t) for t in range(3)))

        def step(carry, inputs):
            g, value = inputs
            updates, state = optimizer.update(g, carry[1], carry[0], value=value)
            return (optax.apply_updates(carry[0], updates), state), None

        inputs = grads, 1.0 / (1.0 + jnp.arange(3.0))
        return jax.lax.scan(step, (params, optimizer.init(params)), inputs)[0][0]

    stacked = jax.tree.map(lambda *p: jnp.stack(p), *starts)
    actual = jax.jit(jax.vmap(run_scanned))(stacked)
    expected = [run(optimizer, start)[0] for start in starts]
    expected = jax.tree.map(lambda *p: jnp.stack(p), *expected)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "rule, dtype", [("velo", jnp.bfloat16), ("celo_adam", jnp.float16), ("celo2", jnp.float16)]
)
def test_parameters_of_half_precision_have_a_state_of_float32(rule, dtype, make, narrow):
    optimizer, shapes = make(rule), {"w": (4, 3)}
    half = jax.tree.map(lambda x: jnp.asarray(x, dtype), random_like(shapes, 0))
    full = jax.tree.map(jnp.float32, half)
    grads = jax.tree.map(lambda x: jnp.asarray(x, dtype), random_like(shapes, 1))
    step = jax.jit(lambda g, s, p: optimizer.update(g, s, p, value=jnp.asarray(2.0, dtype)))
    actual, state = step(grads, optimizer.init(half), half)
    expected, state_of_full = step(jax.tree.map(jnp.float32, grads), optimizer.init(full), full)
    chex.assert_trees_all_equal_dtypes(actual, half)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, state_of_full)
    chex.assert_trees_all_close(
        jax.tree.map(jnp.float32, actual), expected, rtol=2 * float(jnp.finfo(dtype).eps), atol=1e-6
    )


def test_theta_may_be_traced(random_theta, narrow):
    """As meta-training does, over perturbed weights and many tiny networks."""
    shapes = {"w": (4, 3)}
    thetas = [random_theta("celo2", seed, scale=0.1) for seed in range(3)]
    params, grads = random_like(shapes, 5), random_like(shapes, 6)

    def update(theta):
        optimizer = scale_by_celo2(theta, orthogonalise=False)
        return optimizer.update(grads, optimizer.init(params), params)[0]

    stacked = jax.tree.map(lambda *x: np.stack(x), *thetas)
    actual, update = jax.jit(jax.vmap(update))(stacked), jax.jit(update)
    expected = jax.tree.map(lambda *x: np.stack(x), *map(update, thetas))
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-6)
    # forward, as XLA:CPU takes minutes to compile the reverse
    direction = random_theta("celo2", 7, scale=0.5)
    _, slope = jax.jvp(update, (thetas[0],), (direction,))
    ahead, behind = (
        update(jax.tree.map(lambda a, b, t=t: a + np.float32(t) * b, thetas[0], direction))
        for t in (1e-3, -1e-3)
    )
    difference = jax.tree.map(lambda a, b: (a - b) / 2e-3, ahead, behind)
    chex.assert_trees_all_close(slope, difference, rtol=0.02, atol=0.02)
    assert np.abs(slope["w"]).max() > 0.2


# --- devices


def run_sharded(rule, theta):
    """Parameters after a few steps, on one device and split over eight."""
    params = random_like({"w": (16, 24), "v": (16, 24), "b": (8,)}, 0)
    one, _ = run(build(rule, theta), params)
    mesh = jax.make_mesh((NUM_DEVICES,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"w": ("d", None), "v": (None, "d"), "b": ("d",)}
    split = {
        k: jax.device_put(
            p, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*specs[k]))
        )
        for k, p in params.items()
    }

    def step_and_block(function):
        jitted = jax.jit(function)
        return lambda *args: jax.block_until_ready(jitted(*args))

    eight, state = run(build(rule, theta), split, step_and_block)
    return {"one": one, "eight": eight, "split": len(state.accumulators.rms["w"].devices())}


@pytest.mark.slow
def test_eight_devices_equal_one(tmp_path, random_theta):
    for rule in ("velo", "celo2"):
        save_theta(tmp_path / rule, random_theta(rule, scale=0.1))
    env = os.environ | {"NPROC": "16", "JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={NUM_DEVICES}"
    root = str(pathlib.Path(__file__).parents[2])
    env["PYTHONPATH"] = os.pathsep.join([root, env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, __file__, tmp_path], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    for rule, result in json.loads(done.stdout).items():
        assert result["split"] == NUM_DEVICES, rule
        for name in result["one"]:
            np.testing.assert_allclose(
                result["eight"][name], result["one"][name], rtol=1e-4, atol=1e-6, err_msg=rule
            )


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    results = {rule: run_sharded(rule, load_theta(folder / rule)) for rule in ("velo", "celo2")}
    print(json.dumps(jax.tree.map(lambda x: x if isinstance(x, int) else x.tolist(), results)))
