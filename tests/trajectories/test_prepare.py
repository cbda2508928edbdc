"""Every teacher sees the same tasks from the same starts, however often the work was cut off."""

import dataclasses
import errno
import functools
import os
import shutil
import signal
import subprocess
import sys
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax.optimizers import make_optimizer
from lohp_jax.trajectories import prepare as module
from lohp_jax.trajectories.prepare import perturb, prepare, template
from lohp_jax.trajectories.rollout import rollout
from lohp_jax.trajectories.store import open_store
from lohp_jax.types import TaskFamily

NUM_TASKS, NUM_STEPS = 10, 3
THETA_0 = {"w": jnp.asarray([[1.0, -2.0]]), "b": jnp.asarray([0.5])}


def sample(key, split="train"):
    return {"target": jax.random.normal(key, (2,)), "held_out": jnp.float32(split == "held_out")}


def init(key):
    return jax.tree.map(lambda leaf: jax.random.normal(key, leaf.shape), THETA_0)


def loss(params, data, key):
    noise = 0.01 * jax.random.normal(key, (1, 2))
    error = params["w"] + noise - data["target"][None]
    return jnp.sum(error**2) + jnp.sum(params["b"] ** 2)


FAMILY = TaskFamily(sample, init, loss, None, None)


def run(directory, teachers=("sgd:0.1", "adam:0.1"), *, family=FAMILY, **changes):
    settings = {
        "theta_0": THETA_0,
        "num_tasks": NUM_TASKS,
        "num_steps": NUM_STEPS,
        "key": jax.random.key(0),
        "directory": directory,
        "config": {"name": "toy"},
    }
    return prepare(family, teachers, **(settings | changes))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "_LARGEST_SHARD", 4)  # ten tasks make shards of 4, 4 and 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_LARGEST_SHARD", 4)
        return run(tmp_path_factory.mktemp("whole") / "store")


def files(directory):
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def of_teacher(store, index):
    loaded = store.load()
    return jax.tree.map(lambda leaf: leaf[loaded["teacher"] == index], loaded)


def test_all_trajectories_are_there(whole):
    loaded = whole.load()
    assert len(whole) == 2 * NUM_TASKS and whole.num_dropped == 0
    assert len(whole.shards()) == 6
    assert loaded["states"]["w"].shape == (2 * NUM_TASKS, NUM_STEPS + 1, 1, 2)
    assert loaded["losses"].shape == (2 * NUM_TASKS, NUM_STEPS + 1)
    assert loaded["teacher"].tolist() == [0] * NUM_TASKS + [1] * NUM_TASKS
    assert not loaded["data"]["held_out"].any()


def test_teachers_see_the_same_tasks_and_starts(whole):
    first, second = (of_teacher(whole, index) for index in (0, 1))
    np.testing.assert_array_equal(first["data"]["target"], second["data"]["target"])
    for name in THETA_0:
        start, other = first["states"][name][:, 0], second["states"][name][:, 0]
        np.testing.assert_array_equal(start, other)
        assert len(np.unique(start.reshape(NUM_TASKS, -1), axis=0)) == NUM_TASKS
    assert len(np.unique(first["data"]["target"], axis=0)) == NUM_TASKS
    assert not np.array_equal(first["states"]["w"][:, -1], second["states"]["w"][:, -1])


@pytest.mark.parametrize("index, name", [(0, "sgd:0.1"), (1, "adam:0.1")])
def test_a_trajectory_is_the_roll_out_of_its_task(whole, index, name):
    task = 9  # in the last shard, which is not full
    stored = jax.tree.map(lambda leaf: leaf[task], of_teacher(whole, index))
    task_key, start_key, loss_key = jax.random.split(jax.random.fold_in(jax.random.key(0), task), 3)
    data, start = sample(task_key), perturb(THETA_0, start_key, scale=0.01)
    expected = rollout(FAMILY, make_optimizer(name), data, start, loss_key, num_steps=NUM_STEPS)
    np.testing.assert_array_equal(stored["data"]["target"], data["target"])
    np.testing.assert_allclose(stored["losses"], expected.losses, rtol=1e-5)
    np.testing.assert_allclose(stored["states"]["w"], expected.states["w"], rtol=1e-5)


@pytest.mark.parametrize("missing", [["00-sgd-000004"], ["00-sgd-000000", "01-adam-000008"]])
def test_a_resumed_run_gives_the_same_bytes(whole, tmp_path, missing):
    shutil.copytree(whole._directory, tmp_path / "store")
    for name in missing:
        shutil.rmtree(tmp_path / "store" / "shards" / name)
    ages = {p: p.stat().st_mtime_ns for p in (tmp_path / "store" / "shards").rglob("*.npy")}
    run(tmp_path / "store")
    assert files(tmp_path / "store") == files(whole._directory)
    assert all(path.stat().st_mtime_ns == age for path, age in ages.items())


@pytest.mark.parametrize("after", [1, 4])
def test_an_interrupted_run_goes_on_where_it_stopped(whole, tmp_path, after):
    seen = []

    def interrupt(done, total):
        seen.append((done, total))
        if len(seen) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "store", on_progress=interrupt)
    assert len(open_store(tmp_path / "store").shards()) == after
    run(tmp_path / "store")
    assert files(tmp_path / "store") == files(whole._directory)


def test_progress_counts_to_the_end(tmp_path):
    seen = []
    run(tmp_path / "store", on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 20) for done in (4, 8, 10, 14, 18, 20)]


def test_each_teacher_compiles_once(tmp_path, monkeypatch):
    traced, actual = [], module._run

    @functools.wraps(actual)
    def counted(*args):
        traced.append(None)
        return actual(*args)

    monkeypatch.setattr(module, "_run", counted)
    run(tmp_path / "store")
    assert len(traced) == 2 * 2  # each of two, for a CPU and for anything else


def test_diverged_runs_are_dropped_and_counted(tmp_path):
    def fragile(params, data, key):  # not finite where the target is low
        return loss(params, data, key) / (data["target"][0] > 0)

    family = dataclasses.replace(FAMILY, loss=fragile)
    store = run(tmp_path / "store", family=family)
    targets = np.stack([sample(key)["target"] for key in task_keys()])
    good = targets[:, 0] > 0
    assert 0 < good.sum() < NUM_TASKS
    assert (len(store), store.num_dropped) == (2 * good.sum(), 2 * (NUM_TASKS - good.sum()))
    for index in (0, 1):
        kept = of_teacher(store, index)
        np.testing.assert_allclose(kept["data"]["target"], targets[good], rtol=1e-6)
        assert np.isfinite(kept["losses"]).all()


def task_keys():
    keys = [jax.random.fold_in(jax.random.key(0), task) for task in range(NUM_TASKS)]
    return [jax.random.split(key, 3)[0] for key in keys]


@pytest.mark.parametrize("teachers", [("sgd:1e6",), ("sgd:0.1", "sgd:1e30")])
def test_all_diverged(tmp_path, teachers):
    with pytest.raises(ValueError, match=r"all 10 runs of teacher 'sgd.*' diverged; lower"):
        run(tmp_path / "store", teachers)
    with pytest.raises(ValueError, match="diverged"):  # and again, without computing anything
        run(tmp_path / "store", teachers)


def test_shared_starts_are_noisy_copies(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LARGEST_SHARD", 400)
    store = run(tmp_path / "store", ["sgd:0.1"], num_tasks=400, start_noise=0.1)
    starts = store.load()["states"]
    for name, expected in THETA_0.items():
        deviation = starts[name][:, 0] - np.asarray(expected)[None]
        assert abs(deviation.mean()) < 0.02
        assert 0.09 < deviation.std() < 0.11
    first, second = (starts["w"][:, 0, 0, i] - float(THETA_0["w"][0, i]) for i in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.2


def test_no_noise_is_theta_0(tmp_path):
    starts = run(tmp_path / "store", ["sgd:0.1"], start_noise=0.0).load()["states"]["w"][:, 0]
    np.testing.assert_array_equal(starts, np.broadcast_to(THETA_0["w"], starts.shape))


def test_independent_starts_are_fresh(tmp_path):
    store = run(tmp_path / "store", start="independent")
    starts = of_teacher(store, 0)["states"]["w"][:, 0]
    np.testing.assert_array_equal(starts, of_teacher(store, 1)["states"]["w"][:, 0])
    assert len(np.unique(starts.reshape(NUM_TASKS, -1), axis=0)) == NUM_TASKS
    _, start_key, _ = jax.random.split(jax.random.fold_in(jax.random.key(0), 3), 3)
    np.testing.assert_allclose(starts[3], init(start_key)["w"], rtol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"start": "share"}, "prepare: start must be one of .* got 'share'"),
        ({"teachers": ("sgdd",)}, "got 'sgdd'; did you mean 'sgd'"),
        ({"teachers": ("velo:no.state",)}, "there is no file 'no.state'"),
        ({"num_tasks": 0}, "num_tasks must be at least 1, got 0"),
        ({"num_steps": 0}, "num_steps must be a positive whole number, got 0"),
    ],
)
def test_bad_settings_write_nothing(tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(tmp_path / "store", **changes)
    assert not (tmp_path / "store").exists()


def test_another_config_is_refused(whole):
    before = files(whole._directory)
    with pytest.raises(ValueError, match=r"config\.name is 'toy' there and 'other' here"):
        run(whole._directory, config={"name": "other"})
    assert files(whole._directory) == before


def test_full_disk_keeps_what_was_written(whole, tmp_path, monkeypatch):
    actual, calls = np.save, []

    def fail_later(*args, **kwargs):
        calls.append(args)
        if len(calls) > 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return actual(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", fail_later)
        with pytest.raises(OSError, match="run the same command again") as caught:
            run(tmp_path / "store")
    assert caught.value.errno == errno.ENOSPC
    assert len(open_store(tmp_path / "store").shards()) == 1
    run(tmp_path / "store")
    assert files(tmp_path / "store") == files(whole._directory)


def test_memory_keeps_what_the_disk_keeps(whole):
    seen = []
    store = run(None, on_progress=lambda done, total: seen.append(done))
    assert (store.shards(), len(store), store.config) == (whole.shards(), len(whole), whole.config)
    chex.assert_trees_all_equal(store.load(), whole.load())
    chex.assert_trees_all_equal(store.read(13), whole.read(13))
    assert seen == [4, 8, 10, 14, 18, 20]


class Net(NamedTuple):
    layers: Any
    scale: Any = None


def nested_family():
    """The toy family with params and data of tuples, NamedTuples and None."""

    def to_toy(net):
        (w, _), b = net.layers
        return {"w": w, "b": b}

    return TaskFamily(
        sample=lambda key, split="train": (sample(key, split), [None]),
        init=lambda key: Net([(init(key)["w"], None), init(key)["b"]]),
        loss=lambda params, data, key: loss(to_toy(params), data[0], key),
        evaluate=None,
        context=None,
    )


def test_params_and_data_of_any_structure(whole, tmp_path):
    theta_0 = Net([(THETA_0["w"], None), THETA_0["b"]])
    settings = {"family": nested_family(), "theta_0": theta_0, "start_noise": 0.0}
    store = run(tmp_path / "store", "sgd:0.1", **settings)
    plain = run(None, "sgd:0.1", start_noise=0.0).load()
    like = template(nested_family(), theta_0, NUM_STEPS)
    for each in (
        store,
        open_store(tmp_path / "store", like),
        run(tmp_path / "store", "sgd:0.1", **settings),
    ):
        loaded = each.load()
        assert jax.tree.structure(loaded["states"]) == jax.tree.structure(theta_0)
        assert jax.tree.structure(loaded["data"]) == jax.tree.structure(
            ({"target": 0, "held_out": 0}, [None])
        )
        np.testing.assert_array_equal(loaded["states"].layers[0][0], plain["states"]["w"])
        np.testing.assert_array_equal(loaded["data"][0]["target"], plain["data"]["target"])


def test_a_template_is_the_shape_of_what_is_stored(whole):
    like, one = template(FAMILY, THETA_0, NUM_STEPS), whole.read(0)
    jax.tree.map(lambda a, b: chex.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), like, one)


def test_data_with_keys_is_refused_before_anything_runs(tmp_path):
    family = dataclasses.replace(FAMILY, sample=lambda key, split: sample(key) | {"key": key})
    with pytest.raises(ValueError, match="data/key holds PRNG keys"):
        run(tmp_path / "store", family=family)
    assert not (tmp_path / "store").exists()


def test_transformations_are_teachers(whole):
    chain = optax.chain(optax.scale(1.0), optax.sgd(0.1))
    store = run(None, ["sgd:0.1", chain, ("mine", optax.adam(0.1))])
    assert store.config["teachers"] == ["sgd:0.1", "1", "mine"]
    kept = [of_teacher(store, index)["states"] for index in range(3)]
    chex.assert_trees_all_close(kept[0], of_teacher(whole, 0)["states"])
    chex.assert_trees_all_close(kept[1], kept[0])
    chex.assert_trees_all_close(kept[2], of_teacher(whole, 1)["states"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"teachers": ("sgd:0.1", "adam:0.2")}, r"config\.teachers is .*0.1.* there and .*0.2"),
        ({"teachers": ("sgd:0.1",)}, r"config\.teachers is"),
        ({"key": jax.random.key(1)}, r"config\.key is \[0, 0\] there and \[0, 1\] here"),
        ({"num_tasks": 9}, r"config\.num_tasks is 10 there and 9 here"),
        ({"start": "independent"}, r"config\.start is 'shared' there"),
    ],
)
def test_a_store_of_other_settings_is_refused(whole, changes, message):
    before = files(whole._directory)
    with pytest.raises(ValueError, match=message):
        run(whole._directory, **changes)
    assert files(whole._directory) == before


def test_damage_is_found_before_going_on(whole, tmp_path):
    shutil.copytree(whole._directory, tmp_path / "store")
    shutil.rmtree(tmp_path / "store" / "shards" / "01-adam-000008")
    file = tmp_path / "store" / "shards" / "00-sgd-000000" / "leaf-000.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"leaf-000.npy of shard '00-sgd-000000' is damaged"):
        run(tmp_path / "store")


def test_an_interrupted_run_of_learned_teachers_resumes_to_the_same_bytes(tmp_path):
    def interrupt(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "store", ["hub:0.05"], on_progress=interrupt)
    assert len(open_store(tmp_path / "store").shards()) == 1
    run(tmp_path / "store", ["hub:0.05"])
    whole = run(tmp_path / "whole", ["hub:0.05"])
    assert files(tmp_path / "store") == files(tmp_path / "whole")
    assert len(whole) == NUM_TASKS


MANY = ("hub:0.05", "sam:0.1", "adam:0.1", "small:0.1")
KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
import test_prepare as test

test.module._LARGEST_SHARD = 4
test.run(sys.argv[1], test.MANY, on_progress=lambda done, total: done == 18 and os.kill(os.getpid(), 9))
"""


@pytest.mark.slow
def test_a_killed_run_of_learned_and_sharp_teachers_resumes_to_the_same_bytes(tmp_path):
    child = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "store", os.path.dirname(__file__)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stderr=subprocess.PIPE,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert len(open_store(tmp_path / "store").shards()) == 5  # of 12, amid those of sam
    run(tmp_path / "store", MANY)
    store = run(tmp_path / "whole", MANY)
    assert files(tmp_path / "store") == files(tmp_path / "whole")
    ends = [of_teacher(store, index)["losses"][:, -1].mean() for index in range(4)]
    assert len(set(ends)) == 4
    assert store.shards()[3] == "01-sam-000000"


# --- large networks


def test_only_every_other_state_is_kept(tmp_path):
    every = run(None, num_steps=4).load()
    few = run(tmp_path, num_steps=4, record_every=2)
    kept = jax.tree.map(lambda leaf: leaf[:, ::2], (every["states"], every["losses"]))
    loaded = few.load()
    chex.assert_trees_all_close((loaded["states"], loaded["losses"]), kept, rtol=1e-6)
    chex.assert_trees_all_equal(loaded["data"], every["data"])
    assert few.config["record_every"] == 2 and "record_every" not in run(None).config
    again = open_store(tmp_path, template(FAMILY, THETA_0, 4, 2))
    chex.assert_trees_all_equal(again.load(), loaded)


@pytest.mark.parametrize("record_every", [0, 2, 6])
def test_the_end_must_be_among_the_states_that_are_kept(tmp_path, record_every):
    message = f"record_every must divide num_steps=3, got {record_every}"
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "store", record_every=record_every)
    assert not list(tmp_path.iterdir())


def test_shards_of_large_trajectories_hold_few(monkeypatch):
    """12 weights and 4 losses, a teacher and a task of 3 numbers: 80 bytes."""
    assert module.largest_shard(template(FAMILY, THETA_0, NUM_STEPS)) == 4
    for most, expected in ((319, 3), (240, 3), (239, 2), (80, 1), (10, 1)):
        monkeypatch.setattr(module, "_MOST_BYTES", most)
        assert module.largest_shard(template(FAMILY, THETA_0, NUM_STEPS)) == expected
    monkeypatch.setattr(module, "_MOST_BYTES", 80)
    store = run(None, ("sgd:0.1",))
    assert [len(store.shard(name)["losses"]) for name in store.shards()] == [1] * NUM_TASKS
