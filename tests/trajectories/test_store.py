"""The store gives back what was written, survives its writer's death, and says what is damaged."""

import dataclasses
import errno
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.trajectories import store as store_lib
from lohp_jax.trajectories.store import create, open_store, take_states


class Pair(NamedTuple):
    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Weights:
    matrix: Any
    name: str = dataclasses.field(metadata={"static": True})


CONFIG = {"family": "digits_5way", "seed": 3, "teacher": {"name": "adam", "rates": (0.1, 0.01)}}


def batch(seed, num_trajectories=3):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=(num_trajectories, *shape)).astype(np.float32)

    return {
        "states": {
            "mlp/~/linear_0": {"b": normal(6, 2), "w": normal(6, 4, 2)},
            "mlp/~/linear_1": {"w": normal(6, 2, 1)},
        },
        "losses": normal(6),
        "optimizer": rng.integers(0, 3, num_trajectories).astype(np.int32),
        "data": {"labels": rng.integers(0, 9, (num_trajectories, 5))},
    }


def assert_equal(actual, desired):
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    for got, expected in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


def join(*trees):
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *trees)


def contents(directory):
    return {file: file.read_bytes() for file in directory.rglob("*") if file.is_file()}


@pytest.fixture
def written(tmp_path):
    """A store of two shards, and its directory."""
    store = create(tmp_path / "store", CONFIG)
    store.write("0000", batch(0), num_dropped=1)
    store.write("0001", batch(1, 2))
    return tmp_path / "store"


def test_round_trip_of_several_shards_in_the_order_of_their_names(tmp_path):
    store = create(tmp_path / "runs" / "store", CONFIG)
    for name, seed in [("b", 1), ("c", 2), ("a", 0)]:
        store.write(name, batch(seed, seed + 1), num_dropped=seed)
    expected = join(batch(0, 1), batch(1, 2), batch(2, 3))

    for each in (store, open_store(tmp_path / "runs" / "store")):
        assert each.shards() == ("a", "b", "c")
        assert len(each) == 6
        assert each.num_dropped == 3
        assert each.config == json.loads(json.dumps(CONFIG))
        assert_equal(each.load(), expected)
        for i in range(6):
            assert_equal(each.read(i), jax.tree.map(lambda leaf, i=i: leaf[i], expected))


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "float16", "bfloat16", "float32"])
def test_round_trip_of_every_dtype_from_device_and_host(tmp_path, dtype):
    on_device = jnp.arange(6).reshape(2, 3).astype(dtype)
    store = create(tmp_path, {})
    store.write("device", {"x": on_device})
    store.write("host", {"x": np.asfortranarray(on_device)})
    assert_equal(open_store(tmp_path).load(), {"x": np.concatenate([on_device, on_device])})


def test_big_endian_arrays_become_native(tmp_path):
    store = create(tmp_path, {})
    store.write("a", {"x": np.arange(3, dtype=">i4")})
    assert_equal(store.load(), {"x": np.arange(3, dtype=np.int32)})


def test_non_finite_values_survive(tmp_path):
    store = create(tmp_path, {})
    store.write("a", {"losses": np.array([[1.0, np.inf, np.nan, -np.inf]], np.float32)})
    np.testing.assert_array_equal(store.read(0)["losses"], [1.0, np.inf, np.nan, -np.inf])


def test_header_says_what_is_in_the_directory(written):
    header = json.loads((written / "header.json").read_text())
    assert header["schema"] == 1
    assert header["config"] == {**CONFIG, "teacher": {"name": "adam", "rates": [0.1, 0.01]}}
    assert header["num_dropped"] == 1
    assert {"path": ["states", "mlp/~/linear_0", "w"], "shape": [6, 4, 2], "dtype": "float32"} in (
        header["leaves"]
    )
    for name, num_trajectories in [("0000", 3), ("0001", 2)]:
        assert header["shards"][name]["num_trajectories"] == num_trajectories
        files = {file.name for file in (written / "shards" / name).iterdir()}
        assert files == set(header["shards"][name]["sha256"])


def test_a_shard_whose_runs_were_all_dropped_counts_as_done(tmp_path):
    store = create(tmp_path, CONFIG)
    store.write("0000", batch(0, 0), num_dropped=3)
    with pytest.raises(ValueError, match=r"found none in 1 shards \(3 runs were dropped\)"):
        store.load()
    store.write("0001", batch(1))
    store = open_store(tmp_path)
    assert (len(store), store.shards(), store.num_dropped) == (3, ("0000", "0001"), 3)
    assert_equal(store.load(), batch(1))
    assert_equal(store.read(0), jax.tree.map(lambda leaf: leaf[0], batch(1)))


def odd(seed, num_trajectories=2):
    """Trajectories of a structure with all that a pytree may be made of."""
    x = np.random.default_rng(seed).normal(size=(3, num_trajectories, 4)).astype(np.float32)
    layers = [(x[0], None), {2: x[1][:, :1], 10: Pair(x[1], None)}]
    return {
        "states": {"layers": layers, "head": Weights(x[2].astype(np.float16), "out"), "off": {}},
        "losses": np.int32(x[0, :, 0] > 0),
    }


def like(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tree)


@pytest.mark.parametrize("on_disk", [True, False], ids=["disk", "memory"])
def test_a_template_gives_back_any_pytree(tmp_path, on_disk):
    store = create(tmp_path if on_disk else None, CONFIG, like(odd(0)))
    for name, tree in [("b", odd(1, 3)), ("a", odd(0)), ("c", odd(2, 0))]:
        store.write(name, tree, num_dropped=1)
    expected = join(odd(0), odd(1, 3))
    for each in [store, open_store(tmp_path, like(odd(0)))] if on_disk else [store]:
        assert_equal(each.load(), expected)
        assert_equal(each.shard("b"), odd(1, 3))
        assert_equal(each.read(4), jax.tree.map(lambda leaf: leaf[4], expected))
        assert (len(each), each.num_dropped, each.shards()) == (5, 3, ("a", "b", "c"))
        assert not any(leaf.flags.writeable for leaf in jax.tree.leaves(each.shard("a")))
        each.verify()
    assert (
        sorted(path.name for path in tmp_path.iterdir()) == ["header.json", "shards"][: 2 * on_disk]
    )


def test_without_a_template_leaves_are_named_by_their_path(tmp_path):
    tree = odd(0)
    create(tmp_path, {}).write("a", tree)
    (pair, named), head = tree["states"]["layers"], tree["states"]["head"]
    expected = {
        "losses": tree["losses"],
        "states": {
            "head": {"matrix": head.matrix},
            "layers": {"0": {"0": pair[0]}, "1": {"2": named[2], "10": {"first": named[10].first}}},
        },
    }
    assert_equal(open_store(tmp_path).load(), expected)


def test_a_leaf_is_found_by_its_path_wherever_the_template_has_it(tmp_path):
    create(tmp_path, {}).write("a", {"p": Pair(first=np.ones(2), second=np.zeros(2))})
    swapped = {"p": {"second": jax.ShapeDtypeStruct((), float), "first": np.float64(0)}}
    store = open_store(tmp_path, swapped)
    assert_equal(store.load(), {"p": {"first": np.ones(2), "second": np.zeros(2)}})


@pytest.mark.parametrize(
    "change, where, ours, theirs",
    [
        (lambda tree: tree | {"losses": np.zeros(2)}, "losses", "int32 []", "float64 []"),
        (lambda tree: tree | {"more": np.zeros(2)}, "more", "nothing", "float64 []"),
        (lambda tree: {"losses": tree["losses"]}, "states/head/matrix", "float16 [4]", "nothing"),
        (lambda tree: tree | {"states": [np.ones((2, 3))]}, "states/0", "nothing", "float64 [3]"),
    ],
    ids=["dtype", "added", "missing", "other"],
)
def test_another_structure_than_the_templates_is_refused(tmp_path, change, where, ours, theirs):
    def difference(template, got):
        return re.escape(f"the template has {template} at {where}") + ".* has " + re.escape(got)

    with pytest.raises(
        ValueError, match=r"Store\.write: the template has .* at .*, this tree has "
    ):
        create(None, {}, like(odd(0))).write("a", change(odd(0)))
    create(tmp_path, {}, like(odd(0))).write("a", odd(0))
    before = contents(tmp_path)
    for opened in (open_store, lambda path, like: create(path, {}, like)):
        with pytest.raises(ValueError, match=difference(theirs, ours)):
            opened(tmp_path, like(change(odd(0))))
    assert contents(tmp_path) == before


def test_a_template_of_keys_or_of_numbers_is_refused_before_anything_is_made(tmp_path):
    key = jax.eval_shape(lambda: jax.random.key(0))
    with pytest.raises(ValueError, match="create: the leaf at data/key holds PRNG keys"):
        create(tmp_path / "store", {}, {"data": {"key": key}})
    with pytest.raises(
        ValueError, match="expected shapes and dtypes in the template, got float at a"
    ):
        create(tmp_path / "store", {}, {"a": 1.0})
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("index", [-1, 5])
def test_read_refuses_an_index_outside(written, index):
    with pytest.raises(IndexError, match=rf"expected an index in \[0, 5\), got {index}"):
        open_store(written).read(index)


def test_a_shard_is_mapped_not_read(written):
    for leaf in jax.tree.leaves(open_store(written).shard("0000")):
        assert isinstance(leaf, np.memmap)
        assert not leaf.flags.writeable
    with pytest.raises(KeyError):
        open_store(written).shard("0002")


def test_take_states_equals_its_definition():
    states = batch(0)["states"]
    indices = np.array([[0, 5], [3, 3], [4, 1]])
    taken = take_states(states, indices)
    for module, name in [("mlp/~/linear_0", "b"), ("mlp/~/linear_1", "w")]:
        for r in range(3):
            for n in range(2):
                expected = states[module][name][r, indices[r, n]]
                np.testing.assert_array_equal(taken[module][name][r, n], expected)


def test_load_joins_what_select_takes(written):
    def last_two(shard):
        indices = np.tile([4, 5], (len(shard["losses"]), 1))
        return {"states": take_states(shard["states"], indices), "losses": shard["losses"]}

    whole = join(batch(0), batch(1, 2))
    expected = jax.tree.map(lambda leaf: leaf[:, 4:], whole["states"])
    assert_equal(
        open_store(written).load(last_two), {"states": expected, "losses": whole["losses"]}
    )


def peak_bytes(ask):
    tracemalloc.start()
    try:
        result = ask()
        return tracemalloc.get_traced_memory()[1], result
    finally:
        tracemalloc.stop()


def test_memory_grows_with_what_is_asked_for(tmp_path):
    store = create(tmp_path, {})
    for name in "abc":  # 4 MiB a shard, 1 MiB a trajectory, 16 KiB a state
        store.write(name, {"states": np.zeros((4, 64, 4096), np.float32)})
    indices = np.array([[0, 63]] * 4)
    peak, trajectory = peak_bytes(lambda: store.read(5))
    assert trajectory["states"].nbytes == 2**20
    assert peak < 1.5 * 2**20
    peak, states = peak_bytes(lambda: store.load(lambda s: take_states(s["states"], indices)))
    assert states.nbytes == 3 * 4 * 2 * 2**14
    assert peak < 2 * states.nbytes


# A writer that stops.

_WRITER = """
import os, signal, sys
import numpy as np
from lohp_jax.trajectories import store

name, last = sys.argv[2], int(sys.argv[3])
owner = store._DigestingFile if name == "write" else os
original, calls = getattr(owner, name), []

def deadly(*args):
    calls.append(args)
    if len(calls) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)

writer = store.create(sys.argv[1], {"seed": 0})
setattr(owner, name, deadly)
writer.write("b", batch(1))
"""


@pytest.mark.parametrize(
    "function, call, survivors",
    [
        pytest.param("write", 6, ("a",), id="amid-a-leaf"),
        pytest.param("replace", 1, ("a",), id="before-the-shard-moves"),
        pytest.param("replace", 2, ("a",), id="before-the-header-moves"),
        pytest.param("fsync", 10, ("a", "b"), id="after-the-header-moved"),
    ],
)
def test_a_killed_writer_leaves_what_was_there(tmp_path, function, call, survivors):
    create(tmp_path, {"seed": 0}).write("a", batch(0))
    before = contents(tmp_path)
    child = subprocess.run(
        [sys.executable, "-c", inspect.getsource(batch) + _WRITER, tmp_path, function, str(call)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stderr=subprocess.PIPE,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    after = contents(tmp_path)
    assert after != before  # it did begin
    if survivors == ("a",):
        assert {file: after[file] for file in before} == before
    assert open_store(tmp_path).shards() == survivors

    resumed = create(tmp_path, {"seed": 0})
    if "b" not in resumed.shards():
        resumed.write("b", batch(1))
    assert_equal(open_store(tmp_path).load(), join(batch(0), batch(1)))
    assert {path.name for path in tmp_path.iterdir()} == {"header.json", "shards"}


def _fail_at(monkeypatch, owner, function, call):
    """Lets the `call`-th call of `owner.function` find the disk full; returns the calls so far."""
    original, calls = getattr(owner, function), []

    def full(*args):
        calls.append(args)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args)

    monkeypatch.setattr(owner, function, full)
    return calls


@pytest.mark.parametrize(
    "owner, function, num_calls",
    [(store_lib._DigestingFile, "write", 12), (os, "fsync", 9), (os, "replace", 2)],
    ids=["write", "fsync", "replace"],
)
def test_a_full_disk_leaves_what_was_there_whenever_it_fills(
    tmp_path, monkeypatch, owner, function, num_calls
):
    store = create(tmp_path, {"seed": 0})
    store.write("a", batch(0))
    before = contents(tmp_path)
    for call in range(1, num_calls + 1):
        with monkeypatch.context() as patch:
            calls = _fail_at(patch, owner, function, call)
            with pytest.raises(OSError, match=r"shard 'b' stopped; the shards") as caught:
                store.write("b", batch(1))
        assert len(calls) == call
        assert caught.value.errno == errno.ENOSPC
        after = contents(tmp_path)
        assert {file: after[file] for file in before} == before
        assert open_store(tmp_path).shards() == ("a",)
        assert not list(tmp_path.glob(".*"))
    store.write("b", batch(1))
    assert_equal(open_store(tmp_path).load(), join(batch(0), batch(1)))


def test_a_shard_counts_once_its_header_is_in_place(tmp_path, monkeypatch):
    store = create(tmp_path, {})
    with monkeypatch.context() as patch:
        _fail_at(patch, os, "fsync", 10)  # of the folder, which makes the header's name durable
        with pytest.raises(OSError, match=r"shards that .* names are intact"):
            store.write("a", batch(0))
    assert store.shards() == open_store(tmp_path).shards() == ("a",)


def test_only_our_own_leftovers_are_swept(tmp_path):
    create(tmp_path, CONFIG)
    (tmp_path / ".lohp-tmp-x1" / "shard").mkdir(parents=True)
    (tmp_path / ".lohp-tmp-x1" / "shard" / "leaf-000.npy").write_bytes(b"half")
    (tmp_path / "notes").mkdir()
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "copy").mkdir()
    assert open_store(tmp_path).shards() == ()  # a reader passes over them
    assert (tmp_path / ".lohp-tmp-x1").exists()
    create(tmp_path, CONFIG)
    assert {path.name for path in tmp_path.iterdir()} == {"header.json", "notes", "shards"}
    assert (tmp_path / "shards" / "copy").exists()


# Refusals.


def test_write_refuses_a_shard_that_exists(written):
    with pytest.raises(ValueError, match=r"expected a new shard, but '0000' exists"):
        create(written, CONFIG).write("0000", batch(5))
    assert_equal(open_store(written).load(), join(batch(0), batch(1, 2)))


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b"])
def test_write_refuses_names_that_are_no_plain_file_names(tmp_path, name):
    with pytest.raises(ValueError, match="expected a shard name of letters"):
        create(tmp_path, {}).write(name, batch(0))


class Text(str):
    """Another key than the text it looks like."""

    __hash__ = str.__hash__

    def __eq__(self, other):
        return self is other


@pytest.mark.parametrize(
    "tree, message",
    [
        (np.ones(2), "Store.write: expected a pytree .* got a leaf alone; use a dict"),
        ({}, "expected a pytree with arrays, got {} without any"),
        ({"a": None}, "expected a pytree with arrays, got {'a': None} without any"),
        ({"a": {"b": [1.0, np.ones(2)]}}, "expected arrays as leaves, got float at a/b/0; make"),
        ({Text("b"): np.ones(2), "b": np.ones(2)}, "tell its leaves apart, got two at b; use"),
        ({"a": np.float32(1)}, r"one common leading axis R, got shapes {'a': \(\)}"),
        ({"a": np.ones(2), "b": np.ones(3)}, r"got shapes {'a': \(2,\), 'b': \(3,\)}"),
        ({"a": np.array(["adam"])}, "expected numbers .* encode names as integers"),
        ({"a": np.array([None])}, "expected numbers .* got dtype object"),
        ({"a": jax.eval_shape(lambda: jnp.ones(2))}, "got ShapeDtypeStruct"),
    ],
)
def test_write_refuses_what_it_could_not_give_back(tmp_path, tree, message):
    store = create(tmp_path, {})
    with pytest.raises(ValueError, match=message):
        store.write("a", tree)
    assert store.shards() == ()


def test_write_refuses_keys_and_says_how_to_store_them(tmp_path):
    with pytest.raises(ValueError, match=r"holds PRNG keys; store `jax.random.key_data`"):
        create(tmp_path, {}).write("a", {"key": jax.random.split(jax.random.key(0), 2)})


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree | {"losses": tree["losses"][:, :-1]},
        lambda tree: tree | {"losses": tree["losses"].astype(np.float64)},
        lambda tree: tree | {"extra": tree["losses"]},
        lambda tree: {key: tree[key] for key in tree if key != "losses"},
    ],
    ids=["shape", "dtype", "added", "missing"],
)
def test_write_refuses_other_leaves_than_before(written, change):
    with pytest.raises(
        ValueError, match=r"the shards before have .* at (losses|extra), this tree has .*; keep to"
    ):
        create(written, CONFIG).write("0002", change(batch(2)))


@pytest.mark.parametrize(
    "config, message",
    [
        (CONFIG | {"seed": 4}, r"config\.seed is 3 there and 4 here; .* another directory"),
        (
            CONFIG | {"teacher": {"name": "sgd", "rates": [0.1, 0.01]}},
            r"config\.teacher\.name is 'adam' there and 'sgd' here",
        ),
        (
            {key: CONFIG[key] for key in ("family", "teacher")},
            r"config\.seed is 3 there and absent here",
        ),
        (CONFIG | {"steps": 9}, r"config\.steps is absent there and 9 here"),
    ],
)
def test_create_refuses_another_config(written, config, message):
    before = contents(written)
    with pytest.raises(ValueError, match=message):
        create(written, config)
    assert contents(written) == before


@pytest.mark.parametrize("value", [np.float32(1), float("nan"), {1, 2}, jnp.float32])
def test_create_refuses_a_config_that_is_not_json(tmp_path, value):
    with pytest.raises(ValueError, match="create: expected a config of JSON values"):
        create(tmp_path, {"field": value})


def test_create_refuses_shards_without_a_header(written):
    (written / "header.json").unlink()
    before = contents(written)
    with pytest.raises(ValueError, match=r"has shards but no header\.json"):
        create(written, CONFIG)
    assert contents(written) == before


# Damage.


def test_open_store_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"`lohp prepare --out {tmp_path}`")):
        open_store(tmp_path)


@pytest.mark.parametrize("opened", [open_store, lambda path: create(path, CONFIG)])
def test_another_schema_is_refused_and_kept(written, opened):
    header = json.loads((written / "header.json").read_text())
    (written / "header.json").write_text(json.dumps(header | {"schema": 2}))
    before = contents(written)
    with pytest.raises(
        ValueError, match="has schema 2, this version of lohp_jax reads schema 1 only"
    ):
        opened(written)
    assert contents(written) == before


@pytest.mark.parametrize("opened", [open_store, lambda path: create(path, CONFIG)])
@pytest.mark.parametrize(
    "damage",
    [
        lambda text: b"",
        lambda text: text[: len(text) // 2],
        lambda text: b"\xff\xfe" + text,
        lambda text: b"[1]",
        lambda text: b"{}",
        lambda text: b'{"schema": 1, "config": {}, "leaves": [3], "shards": {}}',
        lambda text: text.replace(b'"num_trajectories"', b'"num"'),
        lambda text: text.replace(b'"float32"', b'"float3"'),
    ],
)
def test_a_damaged_header_is_named_and_kept(written, opened, damage):
    file = written / "header.json"
    file.write_bytes(damage(file.read_bytes()))
    before = contents(written)
    with pytest.raises(ValueError, match=r"header\.json is damaged .* Nothing was deleted"):
        opened(written)
    assert contents(written) == before


def test_a_flipped_byte_is_named_and_its_shard_alone_made_anew(written):
    file = written / "shards" / "0001" / "leaf-002.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    before = contents(written)
    message = (
        r"file leaf-002\.npy of shard '0001' is damaged: expected sha256 \w{64}, got \w{64}\. "
        rf"Delete the folder {re.escape(str(file.parent))} and run `lohp prepare` again"
    )
    with pytest.raises(ValueError, match=message):
        open_store(written)
    with pytest.raises(ValueError, match=message):
        open_store(written, verify=False).verify()
    assert contents(written) == before

    shutil.rmtree(file.parent)  # as the message says
    with pytest.raises(ValueError, match=r"shard '0001' is damaged"):
        open_store(written)
    store = create(written, CONFIG)
    assert store.shards() == ("0000",)
    assert open_store(written).shards() == ("0000",)
    store.write("0001", batch(1, 2))
    assert_equal(open_store(written).load(), join(batch(0), batch(1, 2)))


def _save(array):
    return lambda file: np.save(file, array)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.unlink(),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(file.read_bytes()[:60]),
        lambda file: file.write_bytes(file.read_bytes().replace(b"}", b" ", 1)),
        lambda file: file.write_bytes(b"garbage" * 50),
        _save(np.zeros((3, 5))),
        _save(np.zeros((3, 5), np.float32)),
        _save(np.zeros((2, 5), np.int64)),
        _save(np.array([None])),
    ],
    ids=["gone", "empty", "short", "cut", "syntax", "garbage", "f64", "f32", "shape", "object"],
)
def test_a_damaged_leaf_is_named_with_and_without_digests(written, damage):
    file = written / "shards" / "0000" / "leaf-000.npy"  # data/labels, int64 [3, 5]
    damage(file)
    before = contents(written)
    store = open_store(written, verify=False)
    for use in (store.verify, lambda: store.read(0), store.load):
        with pytest.raises(ValueError, match=r"leaf-000\.npy of shard '0000' is damaged: expected"):
            use()
    assert_equal(store.read(3), jax.tree.map(lambda leaf: leaf[0], batch(1, 2)))
    assert contents(written) == before
