"""The files around a run: made in one step, checked when read, never half there."""

import dataclasses
import errno
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lohp_jax import export, files
from lohp_jax.runs import stage
from lohp_jax.runs.config import (
    FamilyConfig,
    PrepareConfig,
    RunConfig,
    TrainingConfig,
    resolve,
    to_json,
)
from lohp_jax.runs.directory import environment
from lohp_jax.runs.families import family_of
from lohp_jax.tasks.door import describe_family
from lohp_jax.trajectories import store as stores
from lohp_jax.trajectories.prepare import template
from lohp_jax.trajectories.teachers import make_teachers

CONFIG = RunConfig(methods=("lohp",), prepare=PrepareConfig(num_tasks=4, optimizers=("sgd",)))


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_new_run_keeps_its_resolved_config(tmp_path):
    directory = tmp_path / "deep" / "run"
    config = stage.open_run(directory, CONFIG)
    assert (
        config == resolve(CONFIG) == stage.open_run(directory) == stage.open_run(directory, CONFIG)
    )
    stored = json.loads((directory / "config.json").read_text())
    assert stored.pop("schema") == files.SCHEMA
    described = stored.pop("description")
    assert described == json.loads(json.dumps(describe_family(family_of(config))._asdict()))
    assert stored == json.loads(json.dumps(to_json(config)))
    assert names(directory) == ["config.json"]


@pytest.mark.parametrize(
    "changed, difference",
    [
        (dataclasses.replace(CONFIG, seed=1), "seed is 0 there and 1 here"),
        (
            dataclasses.replace(CONFIG, training=TrainingConfig(updates=7)),
            r"training.updates is \d+ there and 7 here",
        ),
        (
            dataclasses.replace(CONFIG, prepare=PrepareConfig(num_tasks=4, optimizers=("adam",))),
            r"prepare.optimizers is \['sgd'\] there and \['adam'\] here",
        ),
    ],
)
def test_a_run_with_another_config_is_refused(tmp_path, changed, difference):
    stage.open_run(tmp_path, CONFIG)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ValueError, match=difference):
        stage.open_run(tmp_path, changed)
    assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    "bad",
    [
        dataclasses.replace(CONFIG, family="digits"),
        dataclasses.replace(CONFIG, training=TrainingConfig(compression=3)),
        dataclasses.replace(CONFIG, tasks=FamilyConfig(shots=10**6)),
        dataclasses.replace(CONFIG, tasks=FamilyConfig(data="digit")),
    ],
)
def test_a_config_without_sense_leaves_no_directory(tmp_path, bad):
    with pytest.raises(ValueError):
        stage.open_run(tmp_path / "run", bad)
    assert not names(tmp_path)


def test_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json is missing.*lohp prepare --out"):
        stage.open_run(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", '{"schema": 2}', "\udcff"])
def test_damaged_json_is_named(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"config.json .*Nothing was deleted") as caught:
        files.read_json(path)
    assert ("schema 2" in str(caught.value)) == ("schema" in text)
    assert path.exists()


def test_json_round_trip(tmp_path):
    files.write_json(tmp_path / "x.json", {"schema": files.SCHEMA, "a": [1, 2.5, None, "ü"]})
    assert files.read_json(tmp_path / "x.json") == {"a": [1, 2.5, None, "ü"]}
    assert names(tmp_path) == ["x.json"]


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "results.json"
    files.write_json(path, {"schema": files.SCHEMA, "old": True})
    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match=r"No space left.*intact.*results.json") as caught:
        files.write_json(path, {"schema": files.SCHEMA, "old": False})
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    assert files.read_json(path) == {"old": True} and names(tmp_path) == ["results.json"]


def test_weights_are_named_by_their_path(tmp_path):
    weights = {"mlp/~/linear_0": {"w": jnp.arange(6.0).reshape(2, 3).T}, "head": {"b": jnp.ones(1)}}
    export.write_weights(tmp_path / "new" / "w.safetensors", weights)
    read = safetensors.numpy.load_file(tmp_path / "new" / "w.safetensors")
    assert read.keys() == {"mlp/~/linear_0.w", "head.b"}
    np.testing.assert_array_equal(read["mlp/~/linear_0.w"], weights["mlp/~/linear_0"]["w"])


@pytest.mark.parametrize(
    "optimizers, expected",
    [
        (("sgd:1", "adam"), ["teacher_sgd", "teacher_adam"]),
        (("adam:0.1", "sgd", "adam"), ["teacher_adam:0.1", "teacher_sgd", "teacher_adam"]),
    ],
)
def test_teachers_are_named_by_their_optimizer(optimizers, expected):
    assert [f"teacher_{teacher.name}" for teacher in make_teachers(optimizers, 20)] == expected


def test_start_depends_on_the_seed_alone():
    config = resolve(dataclasses.replace(CONFIG, tasks=FamilyConfig(network="mlp")))
    family = family_of(config)
    first, again = (stage.start_of(config, family) for _ in range(2))
    more_tasks = dataclasses.replace(config, prepare=PrepareConfig(num_tasks=99))
    other = stage.start_of(dataclasses.replace(config, seed=1), family)
    same = [
        jax.tree.map(np.array_equal, first, p) for p in (again, stage.start_of(more_tasks, family))
    ]
    assert all(jax.tree.leaves(same))
    assert not np.array_equal(first["head"]["w"], other["head"]["w"])


def test_environment_tells_versions_platform_and_device():
    found = environment()
    assert found["versions"]["jax"] == jax.__version__
    assert all(found[name] for name in ("python", "platform", "device", "cpu_cores"))
    json.dumps(found)


def test_steps_of_what_was_never_trained(tmp_path):
    assert stage.trained_steps(tmp_path, "lohp") == 0


def test_training_needs_all_trajectories(tmp_path):
    config = stage.open_run(tmp_path, CONFIG)
    with pytest.raises(FileNotFoundError, match="lohp prepare --out"):
        stage.open_stage(tmp_path, config)
    family = family_of(config)
    like = template(family, stage.start_of(config, family), config.prepare.num_steps)
    store = stores.create(tmp_path / "trajectories", {}, like)
    none = jax.tree.map(lambda leaf: np.zeros((0, *leaf.shape), leaf.dtype), like)
    store.write("0", none, num_dropped=3)
    with pytest.raises(
        ValueError, match=r"has 3 of 4 trajectories.*lohp prepare --out .* --resume"
    ):
        stage.open_stage(tmp_path, config)


def test_a_method_that_cannot_serve_the_family_is_refused_before_anything_is_made(
    tmp_path, monkeypatch
):
    blind = dataclasses.replace(family_of(resolve(CONFIG)), context_loss=None)
    monkeypatch.setattr(stage, "family_of", lambda config: blind)
    config = dataclasses.replace(CONFIG, methods=("lohp", "lohp_feedback"))
    with pytest.raises(ValueError, match="the family 'digits_5way' has no context_loss"):
        stage.open_run(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()
