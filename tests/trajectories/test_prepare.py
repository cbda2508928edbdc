"""Every optimizer sees the same tasks from the same starts, however often the work was cut off."""

import dataclasses
import errno
import functools
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.optimizers import make_optimizer
from lohp_jax.trajectories import prepare as module
from lohp_jax.trajectories.prepare import perturb, prepare
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


def run(directory, *, family=FAMILY, config=None, **changes):
    settings = {
        "theta_0": THETA_0,
        "optimizers": ("sgd:0.1", "adam:0.1"),
        "num_tasks": NUM_TASKS,
        "num_steps": NUM_STEPS,
        "start": "shared",
        "start_noise": 0.01,
        "key": jax.random.key(0),
    }
    return prepare(family, directory, config or {"name": "toy"}, **(settings | changes))


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


def of_optimizer(store, index):
    loaded = store.load()
    return jax.tree.map(lambda leaf: leaf[loaded["optimizer"] == index], loaded)


def test_all_trajectories_are_there(whole):
    loaded = whole.load()
    assert len(whole) == 2 * NUM_TASKS and whole.num_dropped == 0
    assert len(whole.shards()) == 6
    assert loaded["states"]["w"].shape == (2 * NUM_TASKS, NUM_STEPS + 1, 1, 2)
    assert loaded["losses"].shape == (2 * NUM_TASKS, NUM_STEPS + 1)
    assert loaded["optimizer"].tolist() == [0] * NUM_TASKS + [1] * NUM_TASKS
    assert not loaded["data"]["held_out"].any()


def test_optimizers_see_the_same_tasks_and_starts(whole):
    first, second = (of_optimizer(whole, index) for index in (0, 1))
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
    stored = jax.tree.map(lambda leaf: leaf[task], of_optimizer(whole, index))
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


def test_each_optimizer_compiles_once(tmp_path, monkeypatch):
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
        kept = of_optimizer(store, index)
        np.testing.assert_allclose(kept["data"]["target"], targets[good], rtol=1e-6)
        assert np.isfinite(kept["losses"]).all()


def task_keys():
    keys = [jax.random.fold_in(jax.random.key(0), task) for task in range(NUM_TASKS)]
    return [jax.random.split(key, 3)[0] for key in keys]


@pytest.mark.parametrize("optimizers", [("sgd:1e6",), ("sgd:0.1", "sgd:1e30")])
def test_all_diverged(tmp_path, optimizers):
    with pytest.raises(ValueError, match=rf"all 10 runs of {optimizers[-1]} diverged; lower"):
        run(tmp_path / "store", optimizers=optimizers)
    with pytest.raises(ValueError, match="diverged"):  # and again, without computing anything
        run(tmp_path / "store", optimizers=optimizers)


def test_shared_starts_are_noisy_copies(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LARGEST_SHARD", 400)
    store = run(tmp_path / "store", num_tasks=400, start_noise=0.1, optimizers=("sgd:0.1",))
    starts = store.load()["states"]
    for name, expected in THETA_0.items():
        deviation = starts[name][:, 0] - np.asarray(expected)[None]
        assert abs(deviation.mean()) < 0.02
        assert 0.09 < deviation.std() < 0.11
    first, second = (starts["w"][:, 0, 0, i] - float(THETA_0["w"][0, i]) for i in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.2


def test_no_noise_is_theta_0(tmp_path):
    starts = run(tmp_path / "store", start_noise=0.0, optimizers=("sgd:0.1",)).load()["states"][
        "w"
    ][:, 0]
    np.testing.assert_array_equal(starts, np.broadcast_to(THETA_0["w"], starts.shape))


def test_independent_starts_are_fresh(tmp_path):
    store = run(tmp_path / "store", start="independent")
    starts = of_optimizer(store, 0)["states"]["w"][:, 0]
    np.testing.assert_array_equal(starts, of_optimizer(store, 1)["states"]["w"][:, 0])
    assert len(np.unique(starts.reshape(NUM_TASKS, -1), axis=0)) == NUM_TASKS
    _, start_key, _ = jax.random.split(jax.random.fold_in(jax.random.key(0), 3), 3)
    np.testing.assert_allclose(starts[3], init(start_key)["w"], rtol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"start": "share"}, "start must be 'shared' or 'independent', got 'share'"),
        ({"optimizers": ("sgdd",)}, "got 'sgdd'; did you mean 'sgd'"),
    ],
)
def test_bad_settings_write_nothing(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "store", **changes)
    assert not (tmp_path / "store").exists()


def test_another_config_is_refused(whole):
    before = files(whole._directory)
    with pytest.raises(ValueError, match=r'config.name = "toy", asked for is "other"'):
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
