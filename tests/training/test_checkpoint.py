"""A checkpoint comes back bit for bit, or not at all.

Run as a script, this file is the writer that gets killed, or one of two processes.
"""

import errno
import itertools
import json
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax.training import checkpoint, distributed

CONFIG = {"family": "digits_5way", "widths": [16, 32], "policy": {"lambda_": 0.1, "seed": None}}
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1), optax.identity())


def make_state(step, size=4):
    """A training state of Haiku parameters, optax state, keys and a step, with awkward floats."""
    awkward = np.uint32([0x7FC00123, 0x80000000, 1, 0xFF800000]).view(np.float32)
    values = np.random.default_rng(step).normal(size=(size, 3)).astype(np.float32)
    params = {
        "mlp/~/linear_0": {"w": jnp.asarray(values), "b": jnp.zeros(3)},
        "head": {"b": jnp.arange(3, dtype=jnp.bfloat16), "scale": jnp.float32(0.5), "unused": None},
    }
    grads = jax.tree.map(jnp.ones_like, params)
    _, opt = OPTIMIZER.update(grads, OPTIMIZER.init(params), params)
    key = jax.random.key(step)
    return {
        "params": params,
        "awkward": jnp.asarray(awkward),
        "empty": {"gates": {}, "carry": (), "list": []},
        "opt": opt,
        "key": key,
        "keys": jax.random.split(jax.random.key(step, impl="rbg"), (2, 3)),
        "step": jnp.int32(step),
    }


def assert_identical(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        if jnp.issubdtype(e.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(a) == jax.random.key_impl(e)
            a, e = jax.random.key_data(a), jax.random.key_data(e)
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


def assert_restores(directory, step, state=None):
    state = state or make_state(step)
    restored_step, restored = checkpoint.restore(directory, state, step)
    assert restored_step == step
    assert_identical(restored, state)


def folders(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def directory(tmp_path):
    """Three checkpoints, of steps 5, 10 and 20."""
    for step in (5, 10, 20):
        checkpoint.save(tmp_path / "checkpoints", step, make_state(step), CONFIG | {"step": step})
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("as_template", [lambda state: state, lambda s: jax.eval_shape(lambda: s)])
def test_round_trip_is_bit_identical(directory, as_template):
    step, state = checkpoint.restore(str(directory), as_template(make_state(0)))
    assert step == 20
    assert_identical(state, make_state(20))
    np.testing.assert_array_equal(
        jax.random.normal(state["key"], (3,)), jax.random.normal(jax.random.key(20), (3,))
    )
    OPTIMIZER.update(state["params"], state["opt"], state["params"])


def test_restored_arrays_are_on_the_default_device(directory):
    with jax.default_device(jax.devices()[-1]):
        _, state = checkpoint.restore(directory, make_state(0))
    for leaf in jax.tree.leaves(state):
        assert leaf.devices() == {jax.devices()[-1]} and not leaf.committed


def test_steps_and_config(directory):
    assert checkpoint.all_steps(directory) == [5, 10, 20]
    assert checkpoint.latest_step(directory) == 20
    assert checkpoint.read_config(directory) == CONFIG | {"step": 20}
    assert checkpoint.read_config(directory, 5) == CONFIG | {"step": 5}
    assert_restores(directory, 10)


def test_arrays_are_an_ordinary_orbax_checkpoint(directory):
    from orbax.checkpoint import v1 as ocp

    loaded = ocp.load(directory / "step_10")
    np.testing.assert_array_equal(
        loaded["params"]["mlp/~/linear_0"]["w"], make_state(10)["params"]["mlp/~/linear_0"]["w"]
    )


@pytest.mark.parametrize("keep, expected", [(1, [3]), (2, [3, 20]), (3, [3, 10, 20])])
def test_newest_are_kept_and_the_one_just_written(directory, keep, expected):
    checkpoint.save(directory, 3, make_state(3), CONFIG, keep=keep)
    assert checkpoint.all_steps(directory) == expected
    assert len(folders(directory)) == len(expected)
    assert_restores(directory, 3)


def test_a_step_saved_again_is_replaced(directory):
    for seed in (21, 22):
        checkpoint.save(directory, 20, make_state(seed), CONFIG)
        assert checkpoint.all_steps(directory) == [5, 10, 20]
        assert_restores(directory, 20, make_state(seed))
        assert len(folders(directory)) == 3


@pytest.mark.parametrize("interrupted", ["_hash_files", "_write_manifest"])
@pytest.mark.parametrize("step", [20, 30])
def test_half_written_is_ignored_then_removed(directory, monkeypatch, interrupted, step):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, interrupted, interrupt)
        checkpoint.save(directory, step, make_state(99), CONFIG)
    assert len(folders(directory)) == 4
    (directory / "step_40.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (directory / "notes").mkdir()
    assert checkpoint.all_steps(directory) == [5, 10, 20]
    assert_restores(directory, 20)
    checkpoint.save(directory, 50, make_state(50), CONFIG)
    assert folders(directory) == ["notes", "step_10", "step_20", "step_50"]


def test_interrupted_removal_leaves_nothing_that_looks_complete(directory, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.shutil, "rmtree", interrupt)
        checkpoint.save(directory, 30, make_state(30), CONFIG)
    assert checkpoint.all_steps(directory) == [10, 20, 30]
    assert "step_5" in folders(directory)
    checkpoint.save(directory, 40, make_state(40), CONFIG)
    assert folders(directory) == ["step_20", "step_30", "step_40"]


def damaged(path, how):
    raw = path.read_bytes()
    middle = len(raw) // 2
    if how == "flipped":
        path.write_bytes(raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :])
    elif how == "truncated":
        path.write_bytes(raw[:middle])
    else:
        path.unlink()
    return raw


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_every_damaged_file_is_noticed(directory, how):
    paths = [p for p in (directory / "step_20").rglob("*") if p.is_file() and p.stat().st_size]
    assert len(paths) > 5
    for path in paths:
        if (path.name, how) == ("manifest.json", "missing"):
            continue  # half-written, see above
        raw = damaged(path, how)
        with pytest.raises(ValueError, match=r"step 20 is damaged.*other complete.*\[5, 10\]"):
            checkpoint.restore(directory, make_state(0))
        path.write_bytes(raw)
    assert_restores(directory, 20)


def test_damage_deletes_nothing_and_can_be_stepped_over(directory):
    damaged(directory / "step_20" / "manifest.json", "truncated")
    for read in (checkpoint.read_config, lambda d: checkpoint.restore(d, make_state(0))):
        with pytest.raises(ValueError, match=r"step 20 is damaged.*manifest.json cannot be read"):
            read(directory)
    assert checkpoint.all_steps(directory) == [5, 10, 20]
    assert_restores(directory, 10)
    checkpoint.save(directory, 20, make_state(20), CONFIG)
    assert_restores(directory, 20)


def test_any_flipped_bit_of_the_manifest_is_noticed_or_harmless(directory):
    path = directory / "step_5" / "manifest.json"
    raw = path.read_bytes()
    for position in range(len(raw)):
        changed = bytes([raw[position] ^ 1 << position % 8])
        path.write_bytes(raw[:position] + changed + raw[position + 1 :])
        try:
            assert checkpoint.read_config(directory, 5) == CONFIG | {"step": 5}
            assert json.loads(path.read_bytes()) == json.loads(raw)
        except ValueError as error:
            assert "step 5 is damaged" in str(error)


def test_damage_without_another_step(tmp_path):
    checkpoint.save(tmp_path, 0, make_state(0), CONFIG)
    damaged(tmp_path / "step_0" / "manifest.json", "flipped")
    with pytest.raises(ValueError, match=r"step 0 is damaged.*there is no other step"):
        checkpoint.restore(tmp_path, make_state(0))


def test_missing(tmp_path, directory):
    for read in (checkpoint.read_config, lambda d: checkpoint.restore(d, make_state(0))):
        with pytest.raises(FileNotFoundError, match=r"no complete checkpoint in .*`lohp train`"):
            read(tmp_path / "absent")
        with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
            read(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"step 7 in .*there are steps \[5, 10, 20\]"):
        checkpoint.restore(directory, make_state(0), 7)
    assert checkpoint.all_steps(tmp_path / "absent") == []
    assert checkpoint.latest_step(tmp_path / "absent") is None
    assert not (tmp_path / "absent").exists()


def replaced(tree, value, head, *rest):
    return tree | {head: replaced(tree[head], value, *rest) if rest else value}


def shape_of(*shape, dtype=np.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    "path, value, message",
    [
        (
            "params mlp/~/linear_0 w",
            shape_of(4, 5),
            r"float32\[4, 5\] at .*'w'.*, got float32\[4, 3\] in checkpoint step 20",
        ),
        ("step", shape_of(), r"expected float32\[\] at \['step'\], got int32\[\]"),
        ("key", shape_of(2, dtype=np.uint32), r"uint32\[2\] at \['key'\], got key<fry>\[\]"),
        ("ema", shape_of(2), r"expected float32\[2\] at \['ema'\], got nothing"),
        ("params head b", None, r"expected None at .*'head'.*'b'.*, got bfloat16\[3\]"),
        ("params head", {}, r"expected \{\} at \['params'\]\['head'\], got nothing"),
        ("opt", (optax.EmptyState(),), r"\(EmptyState\(\),\) at \['opt'\], got nothing"),
        ("opt", optax.TraceState({"w": shape_of()}), r"float32\[\] at \['opt'\].trace\['w'\]"),
    ],
)
def test_wrong_template(directory, path, value, message):
    template = replaced(make_state(0), value, *path.split())
    with pytest.raises(ValueError, match=message):
        checkpoint.restore(directory, template)


def test_wrong_generator_of_keys(directory):
    template = make_state(0) | {"key": jax.random.key(0, impl="rbg")}
    with pytest.raises(ValueError, match=r"key<rbg>\[\] at \['key'\], got key<fry>\[\]"):
        checkpoint.restore(directory, template)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"step": -1}, "step >= 0 and keep >= 1, got step=-1, keep=3"),
        ({"keep": 0}, "step >= 0 and keep >= 1, got step=1, keep=0"),
        ({"config": {"dtype": np.float32}}, "config of dict.*`dataclasses.asdict`"),
        ({"state": {"rate": 0.1}}, r"expected arrays, got float at \['rate'\]"),
    ],
)
def test_bad_arguments(tmp_path, change, message):
    arguments = {"step": 1, "state": make_state(1), "config": CONFIG} | change
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_doubles_are_not_silently_halved(tmp_path):
    state = {"mean": np.float64([1 / 3])}
    checkpoint.save(tmp_path, 0, state, {})
    with pytest.raises(ValueError, match=r"jax_enable_x64 to be on for float64 at \['mean'\]"):
        checkpoint.restore(tmp_path, state)
    with jax.enable_x64(True):
        assert_identical(checkpoint.restore(tmp_path, state)[1], state)


def test_file_too_large_is_an_os_error_and_older_checkpoints_stay(directory):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 22, hard))
    try:
        with pytest.raises(OSError, match="step_30") as caught:
            checkpoint.save(directory, 30, make_state(30, size=1 << 20), CONFIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert checkpoint.all_steps(directory) == [5, 10, 20]
    assert_restores(directory, 20)


def test_full_disk_leaves_older_checkpoints(directory, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(checkpoint, "_write_manifest", full)
        checkpoint.save(directory, 30, make_state(30), CONFIG)
    for step in (5, 10, 20):
        assert_restores(directory, step)
    checkpoint.save(directory, 30, make_state(30), CONFIG)
    assert checkpoint.all_steps(directory) == [10, 20, 30]


def test_other_errors_of_orbax_pass_through():
    with pytest.raises(ValueError, match="as it was"), checkpoint._disk_errors(pathlib.Path()):
        raise ValueError("as it was")


def kill_while_writing(directory):
    """Saves step after step from eight devices until a half-written one is seen, then SIGKILL."""
    jax.config.update("jax_num_cpu_devices", 8)
    pass_on = distributed.compile_update(lambda state, batch: (state, None), "mesh")

    def watch():
        while not list(directory.glob("step_*.orbax-checkpoint-tmp/*")):
            time.sleep(1e-3)
        os.kill(os.getpid(), signal.SIGKILL)

    for step in itertools.count(1):
        if step == 3:
            threading.Thread(target=watch).start()
        size = 4 if step < 3 else 1 << 21
        state, _ = pass_on(make_state(step, size), np.zeros(8))
        checkpoint.save(directory, step, state, CONFIG)


def without_nan(step):
    """A state that `jax.device_put` finds equal in two processes."""
    return make_state(step) | {"awkward": jnp.zeros(1)}


def save_in_two_processes(directory, process, port):
    """What a mesh over two processes returns can be saved from both, and restored in both."""
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
    pass_on = distributed.compile_update(lambda state, batch: (state, None), "mesh")
    for step in (1, 2, 2):
        state = without_nan(step)
        checkpoint.save(directory, step, pass_on(state, np.zeros(2))[0], CONFIG, keep=1)
        assert checkpoint.all_steps(directory) == [step]
        assert_restores(directory, step, state)


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


def finish(processes, returncode):
    try:
        for process in processes:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == returncode, output
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_killed_writer_on_eight_devices_leaves_the_latest_readable(tmp_path):
    finish([start_script("killed", tmp_path)], -signal.SIGKILL)
    assert "step_3.orbax-checkpoint-tmp" in folders(tmp_path)
    assert checkpoint.latest_step(tmp_path) == 2
    for step in (1, 2):
        assert_restores(tmp_path, step)
    checkpoint.save(tmp_path, 3, make_state(3), CONFIG)
    assert folders(tmp_path) == ["step_1", "step_2", "step_3"]


@pytest.mark.slow
def test_two_processes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    finish([start_script("two", tmp_path, process, port) for process in range(2)], 0)
    assert_restores(tmp_path, 2, without_nan(2))


if __name__ == "__main__":
    script, out, *rest = sys.argv[1:]
    if script == "killed":
        kill_while_writing(pathlib.Path(out))
    else:
        save_in_two_processes(pathlib.Path(out), *map(int, rest))
