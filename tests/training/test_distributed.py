"""Three ways to compile one update must be one update.

Several CPU devices need a process of their own (`NPROC=16` before jax starts, or steps can
deadlock): run as a script, this file writes what they computed, and the tests below compare.
"""

import functools
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax.training.distributed import compile_update

NUM_DEVICES, NUM_STEPS, BATCH, HIDDEN = 8, 20, 16, 6
STRATEGIES = ("jit", "mesh", "pmap")
OPTIMIZER = optax.adam(0.01)


def make_data():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(40, 3)).astype(np.float32) for name in ("x", "y")}


def make_params():
    rng = np.random.default_rng(1)
    shapes = {"w1": (3, HIDDEN), "b1": (HIDDEN,), "w2": (HIDDEN, 3)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def make_batch(step, size=BATCH):
    """Which examples, and the key that each draws the noise on its input from."""
    index = np.random.default_rng([2, step]).integers(0, 40, size)
    return {"index": index, "key": jax.random.split(jax.random.key(step), size)}


def init_state():
    params = jax.tree.map(jnp.asarray, make_params())
    return {"params": params, "opt": OPTIMIZER.init(params)}


def loss_fn(params, batch, data):
    noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(batch["key"])
    hidden = jnp.tanh((data["x"][batch["index"]] + noise) @ params["w1"] + params["b1"][None])
    return jnp.mean((hidden @ params["w2"] - data["y"][batch["index"]]) ** 2)


def update(state, batch, data, axis_name=None):
    loss, grads = jax.value_and_grad(loss_fn)(state["params"], batch, data)
    if axis_name is not None:
        loss, grads = jax.lax.pmean((loss, grads), axis_name)
    steps, opt = OPTIMIZER.update(grads, state["opt"])
    return {"params": optax.apply_updates(state["params"], steps), "opt": opt}, {"loss": loss}


def oracle():
    """Adam on the same loss in float64 NumPy, gradients by hand, one example at a time."""
    params = {name: value.astype(np.float64) for name, value in make_params().items()}
    data = make_data()
    mean = {name: np.zeros_like(value) for name, value in params.items()}
    square = {name: np.zeros_like(value) for name, value in params.items()}
    losses = []
    for step in range(NUM_STEPS):
        batch, loss = make_batch(step), 0.0
        grads = {name: np.zeros_like(value) for name, value in params.items()}
        for index, key in zip(batch["index"], batch["key"], strict=True):
            x = data["x"][index].astype(np.float64) + np.asarray(jax.random.normal(key, (3,)))
            hidden = np.tanh(x @ params["w1"] + params["b1"])
            residual = hidden @ params["w2"] - data["y"][index]
            loss += np.sum(residual**2) / (3 * BATCH)
            d_out = 2 * residual / (3 * BATCH)
            d_hidden = params["w2"] @ d_out * (1 - hidden**2)
            grads["w2"] += np.outer(hidden, d_out)
            grads["w1"] += np.outer(x, d_hidden)
            grads["b1"] += d_hidden
        losses.append(loss)
        for name, g in grads.items():
            mean[name] = 0.9 * mean[name] + 0.1 * g
            square[name] = 0.999 * square[name] + 0.001 * g**2
            corrected = np.sqrt(square[name] / (1 - 0.999 ** (step + 1))) + 1e-8
            params[name] -= 0.01 * mean[name] / (1 - 0.9 ** (step + 1)) / corrected
    return params, losses


def run(strategy, devices=None, *, num_steps=NUM_STEPS, start=0, state=None):
    """Final state, the losses and how often `update` was traced; waits for each step."""
    traces = []

    def counted(*args, axis_name=None):
        traces.append(None)
        return update(*args, axis_name=axis_name)

    step_fn = compile_update(counted, strategy, devices)
    state, data, losses = state or init_state(), make_data(), []
    for step in range(start, start + num_steps):
        state, metrics = jax.block_until_ready(step_fn(state, make_batch(step), data))
        losses.append(metrics["loss"])
    return state, np.stack(losses), len(traces)


def run_chunks(strategy, chunk=5):
    """The same through `lax.scan`, with the batch on axis 1."""
    traces = []

    def counted(state, batches, data, axis_name=None):
        traces.append(None)
        step = functools.partial(update, data=data, axis_name=axis_name)
        return jax.lax.scan(step, state, batches)

    step_fn = compile_update(counted, strategy, batch_axis=1)
    state, losses = init_state(), []
    for start in range(0, NUM_STEPS, chunk):
        batches = [make_batch(step) for step in range(start, start + chunk)]
        batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
        state, metrics = jax.block_until_ready(step_fn(state, batches, make_data()))
        losses.append(metrics["loss"])
    return state, np.concatenate(losses), len(traces)


def message_of(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def relay():
    """Hands one state through all strategies, four devices, and the last device alone."""
    state, losses = None, []
    hops = [(s, None) for s in STRATEGIES]
    hops += [("mesh", jax.devices()[:4]), ("pmap", jax.devices()[4:]), ("jit", jax.devices()[-1:])]
    for start, (strategy, devices) in enumerate(hops):
        state, loss, _ = run(strategy, devices, num_steps=1, start=start, state=state)
        losses.append(loss)
    last = state["params"]["w1"].devices() == {jax.devices()[-1]}
    return np.concatenate(losses), last


def write_multi_device(directory):
    """What the tests compare, computed on eight CPU devices."""
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    arrays, facts = {}, {}
    for strategy in STRATEGIES:
        for kind, run_fn in (("step", run), ("chunk", run_chunks)):
            state, losses, num_traces = run_fn(strategy)
            arrays |= {f"{strategy}/{kind}/{k}": v for k, v in state["params"].items()}
            arrays[f"{strategy}/{kind}/losses"] = losses
            facts[f"{strategy}/{kind}/shapes"] = str(jax.tree.map(jnp.shape, state))
            facts[f"{strategy}/{kind}/traces"] = num_traces
    arrays["relay"], facts["relay on last device"] = relay()
    step_fn = compile_update(update, "mesh")
    for size in (12, 4, 0):
        batch = make_batch(0, max(size, 1))
        batch = jax.tree.map(lambda leaf, size=size: leaf[:size], batch)
        call = functools.partial(step_fn, init_state(), batch, make_data())
        facts[f"batch of {size}"] = message_of(call)
    facts["jit, 8"] = message_of(lambda: compile_update(update, "jit", jax.devices()))
    np.savez(directory / "arrays.npz", **arrays)
    (directory / "facts.json").write_text(json.dumps(facts))


def write_one_of_two(directory, process, port):
    """The mesh over two processes with one device each; every process holds half of each batch."""
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
    sharding = jax.sharding.NamedSharding(
        jax.make_mesh((2,), ("any",)), jax.sharding.PartitionSpec("any")
    )

    def share(leaf):
        half = leaf[process * BATCH // 2 : (process + 1) * BATCH // 2]
        return jax.make_array_from_process_local_data(sharding, half)

    def update_beside_key(state, batch, data):
        train, metrics = update(state["train"], batch, data)
        return {"train": train, "key": state["key"]}, metrics

    step_fn = compile_update(update_beside_key, "mesh")
    state, data = {"train": init_state(), "key": jax.random.key(7)}, make_data()
    for step in range(NUM_STEPS):
        batch = make_batch(step)
        batch["key"] = np.asarray(jax.random.key_data(batch["key"]))
        batch = jax.tree.map(share, batch)
        batch["key"] = jax.random.wrap_key_data(batch["key"])
        state, _ = jax.block_until_ready(step_fn(state, batch, data))
    assert_same_key(state["key"], jax.random.key(7))
    np.savez(directory / f"process{process}.npz", **jax.device_get(state["train"]["params"]))


def assert_same_key(actual, expected):
    data = [jax.device_get(jax.random.key_data(key)) for key in (actual, expected)]
    np.testing.assert_array_equal(*data)


def start_script(*args):
    root = str(pathlib.Path(__file__).parents[2])
    environment = os.environ | {"NPROC": "16", "JAX_PLATFORMS": "cpu", "PYTHONPATH": root}
    environment.pop("XLA_FLAGS", None)
    return subprocess.Popen(
        [sys.executable, __file__, *map(str, args)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes):
    try:
        for process in processes:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory):
    directory = tmp_path_factory.mktemp("eight_devices")
    finish(start_script("multi_device", directory))
    with np.load(directory / "arrays.npz", allow_pickle=False) as arrays:
        return dict(arrays), json.loads((directory / "facts.json").read_text())


@pytest.fixture(scope="module")
def expected():
    return oracle()


@pytest.mark.parametrize("kind", ["step", "chunk"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_twenty_updates_equal_a_hand_written_loop(eight_devices, expected, strategy, kind):
    arrays, _ = eight_devices
    params, losses = expected
    np.testing.assert_allclose(arrays[f"{strategy}/{kind}/losses"], losses, rtol=1e-5)
    for name, value in params.items():
        actual = arrays[f"{strategy}/{kind}/{name}"]
        np.testing.assert_allclose(actual, value, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["step", "chunk"])
@pytest.mark.parametrize("strategy", ["mesh", "pmap"])
def test_eight_devices_equal_one(eight_devices, strategy, kind):
    arrays, _ = eight_devices
    for name in (*make_params(), "losses"):
        one, eight = arrays[f"jit/step/{name}"], arrays[f"{strategy}/{kind}/{name}"]
        np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-6)


def test_state_has_one_layout(eight_devices):
    _, facts = eight_devices
    layouts = {facts[f"{s}/{kind}/shapes"] for s in STRATEGIES for kind in ("step", "chunk")}
    assert layouts == {str(jax.tree.map(jnp.shape, init_state()))}


@pytest.mark.parametrize("kind", ["step", "chunk"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_steps_trace_once(eight_devices, strategy, kind):
    assert eight_devices[1][f"{strategy}/{kind}/traces"] == 1


def test_a_state_may_pass_from_one_strategy_to_another(eight_devices, expected):
    arrays, facts = eight_devices
    np.testing.assert_allclose(arrays["relay"], expected[1][: len(arrays["relay"])], rtol=1e-5)
    assert facts["relay on last device"]


@pytest.mark.parametrize(
    "case, message",
    [
        ("batch of 12", "8, got 12; 8 or 16 would fit"),
        ("batch of 4", "8, got 4; 8 would fit"),
        ("batch of 0", "8, got 0; 8 would fit"),
        ("jit, 8", "'jit' runs on one device, got 8; choose 'mesh'"),
    ],
)
def test_errors_that_take_eight_devices(eight_devices, case, message):
    assert message in eight_devices[1][case]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, expected):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    finish(*(start_script("one_of_two", tmp_path, process, port) for process in range(2)))
    for process in range(2):
        with np.load(tmp_path / f"process{process}.npz", allow_pickle=False) as actual:
            for name, value in expected[0].items():
                np.testing.assert_allclose(actual[name], value, rtol=1e-5, atol=2e-6)


def sum_update(state, batch, *replicated, axis_name=None):
    del axis_name
    return state + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(replicated)), batch


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_changed_data_is_noticed(strategy):
    step_fn = compile_update(sum_update, strategy, jax.devices()[:1])
    batch, array, buffer = jnp.zeros(1), jnp.ones(3), np.ones(2)
    assert step_fn(0.0, batch)[0] == 0
    assert step_fn(0.0, batch, array)[0] == 3
    assert step_fn(0.0, batch, array)[0] == 3
    assert step_fn(0.0, batch, 2 * array)[0] == 6
    assert step_fn(0.0, batch, array, array)[0] == 6
    assert step_fn(0.0, batch, buffer)[0] == 2
    buffer[:] = 5
    assert step_fn(0.0, batch, buffer)[0] == 10


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_the_first_step_compiles(strategy, caplog):
    step_fn = compile_update(sum_update, strategy, jax.devices()[:1])
    state, data = jnp.zeros(3), jnp.ones(2)
    for compiles in (True, False, False):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("WARNING", logger="jax"):
            state, _ = step_fn(state, np.zeros((4, 2)), data)
        assert ("Compiling" in caplog.text) == compiles


def test_jit_heeds_the_default_device():
    last = jax.devices()[-1]
    with jax.default_device(last):
        step_fn = compile_update(sum_update)
    assert step_fn(0.0, np.zeros(1))[0].devices() == {last}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_state_given_is_still_there(strategy):
    state = jnp.float32(1)
    step_fn = compile_update(sum_update, strategy, jax.devices()[:1])
    for _ in range(2):
        assert step_fn(state, jnp.zeros(1), 1.0)[0] == 2


@pytest.mark.parametrize("given, nearest", [("pmapp", "pmap"), ("Mesh", "mesh"), ("shard_map", "")])
def test_unknown_strategy(given, nearest):
    with pytest.raises(ValueError, match=rf"got '{given}'; did you mean '{nearest}"):
        compile_update(sum_update, given)


def test_pmap_needs_an_axis_name():
    def without(state, batch):
        return state, batch

    with pytest.raises(ValueError, match=r"keyword axis_name.*never be averaged"):
        compile_update(without, "pmap")
    for strategy in ("jit", "mesh"):
        assert compile_update(without, strategy, jax.devices()[:1])(1.0, jnp.zeros(1))[0] == 1
    compile_update(lambda state, batch, **options: (state, batch), "pmap")


def test_pmap_needs_one_process(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="one process, got 2; choose 'mesh'"):
        compile_update(sum_update, "pmap")


def test_bad_devices_and_axis():
    with pytest.raises(ValueError, match="empty sequence"):
        compile_update(sum_update, "mesh", [])
    with pytest.raises(ValueError, match="batch_axis must be at least 0, got -1"):
        compile_update(sum_update, batch_axis=-1)


@pytest.mark.parametrize(
    "batch",
    [{"x": np.zeros((4, 2)), "y": np.zeros((4, 3))}, {"x": np.zeros((4, 2)), "y": np.zeros(4)}, {}],
    ids=["two sizes", "no such axis", "empty"],
)
def test_batch_leaves_must_agree(batch):
    with pytest.raises(ValueError, match="leaves agree on the size of axis 1, got shapes"):
        compile_update(sum_update, batch_axis=1)(0.0, batch)


if __name__ == "__main__":
    script, out, *rest = sys.argv[1:]
    if script == "multi_device":
        write_multi_device(pathlib.Path(out))
    else:
        write_one_of_two(pathlib.Path(out), *map(int, rest))
