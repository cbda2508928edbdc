"""Meta-training stops and goes on without losing a bit."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.optimizers.meta import Unroll
from lohp_jax.optimizers.small import Rate, pack_rate
from lohp_jax.runs import meta_training as meta
from lohp_jax.runs.config import from_json
from lohp_jax.runs.meta import meta_train
from lohp_jax.runs.meta_training import MetaConfig
from lohp_jax.training import checkpoint, metrics

CONFIG = MetaConfig(
    families=("prototypes", "teacher"),
    **{"updates": 7, "pairs": 3, "log_every": 2, "checkpoint_every": 4, "probe_every": 2},
)


def toy_unrolls(config):
    """Each of three truncations: w drifts along the meta-parameters and some noise."""

    def start(meta, key, portion):
        stop = jnp.int32(jnp.ceil(3 * portion))
        return {"w": jax.random.normal(key), "t": jnp.zeros((), jnp.int32), "stop": stop}

    def advance(meta, state, key, step_key):
        push = meta["log_peak"] + meta["theta"].sum()
        w = 0.5 * state["w"] + push + jax.random.normal(step_key) + 0.1 * jax.random.normal(key)
        t = state["t"] + 1
        return state | {"w": w, "t": t}, (w - 1.0) ** 2, t >= state["stop"]

    return (Unroll(start, advance),) * len(config.families)


def toy_start(key, *, learning_rate):
    return {"theta": jax.random.normal(key, (3,))} | pack_rate(Rate(learning_rate, 0.0, 1.0))


def use_toys(patch):
    patch.setattr(meta, "make_unrolls", toy_unrolls)
    patch.setattr(meta, "small_start", toy_start)


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    use_toys(monkeypatch)


def leaves(state):
    plain = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in jax.tree.leaves(state)
    ]
    return [np.asarray(x).tobytes() for x in plain]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        use_toys(patch)
        chunks = []
        state = meta_train(CONFIG, directory, on_progress=chunks.append)
    return directory, state, chunks


def test_run_leaves_checkpoints_and_metrics(whole):
    directory, state, chunks = whole
    assert int(state.step) == 7 and [c.step for c in chunks] == [2, 4, 6, 7]
    assert checkpoint.all_steps(directory / "checkpoints" / "meta") == [4, 7]
    lines = metrics.read_lines(directory / "metrics.jsonl", "meta")
    assert [line["step"] for line in lines] == [2, 4, 6, 7]
    for line in lines:
        assert len(line["losses"]) == 2 and line["gradient_norm"] > 0
        np.testing.assert_allclose(line["loss"], np.mean(line["losses"]), rtol=1e-5)
    np.testing.assert_allclose(lines[-1]["peak"], np.exp(state.meta["log_peak"]), rtol=1e-6)
    stored = checkpoint.read_config(directory / "checkpoints" / "meta")
    assert from_json(stored, MetaConfig) == CONFIG


@pytest.mark.parametrize("stop_at", [2, 4, 6])
def test_interrupted_and_resumed_gives_the_same_bits(whole, tmp_path, stop_at):
    def interrupt(progress):
        if progress.step == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        meta_train(CONFIG, tmp_path, on_progress=interrupt)
    assert checkpoint.latest_step(tmp_path / "checkpoints" / "meta") == stop_at
    assert leaves(meta_train(CONFIG, tmp_path)) == leaves(whole[1])
    lines = [metrics.read_lines(d / "metrics.jsonl", "meta") for d in (tmp_path, whole[0])]
    timeless = [
        [{k: v for k, v in line.items() if k != "updates_per_second"} for line in run]
        for run in lines
    ]
    assert timeless[0] == timeless[1]


def test_killed_run_goes_on_from_its_checkpoint(whole, tmp_path):
    """What `kill -9` leaves: lines of metrics beyond the newest checkpoint."""
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "meta" / "step_7")
    state = meta_train(CONFIG, tmp_path / "run")
    assert leaves(state) == leaves(whole[1])
    lines = metrics.read_lines(tmp_path / "run" / "metrics.jsonl", "meta")
    assert [line["step"] for line in lines] == [2, 4, 6, 7]


def test_seeds_differ(whole, tmp_path):
    other = dataclasses.replace(CONFIG, seed=1, updates=2)
    meta_train(other, tmp_path)
    lines = [metrics.read_lines(d / "metrics.jsonl", "meta") for d in (tmp_path, whole[0])]
    assert lines[0][0]["loss"] != lines[1][0]["loss"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"updates": 0}, "updates must be at least 1, got 0"),
        ({"pairs": 0}, "pairs must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"sigma": 0.0}, r"sigma must be finite and positive, got 0\.0"),
        ({"learning_rate": float("inf")}, "learning_rate must be finite and positive, got inf"),
        ({"checkpoint_every": 5}, "checkpoint_every must be a multiple of log_every=10, got 5"),
        ({"probe_every": 0}, "probe_every must be a multiple of log_every=10, got 0"),
        ({"probe_steps": 70}, "probe_steps must be a multiple of 50, got 70"),
        ({"families": ()}, "families must name at least one"),
        ({"families": ("digits",)}, "got 'digits'; did you mean 'digits_mlp'"),
        ({"longest": 50}, r"truncation=50 and lengths=\(100, 50\)"),
    ],
)
def test_bad_configs(monkeypatch, options, message):
    monkeypatch.undo()  # the real unrolls check their settings
    with pytest.raises(ValueError, match=message):
        MetaConfig(**options)
