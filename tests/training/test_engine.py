"""A run that was cut off, however, ends where one that was not would have ended, bit for bit.

The problem is a toy: six numbers, pulled towards those of each example. Run as a script, this file
trains until it is killed.
"""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.methods.setting import Dataset, Frame
from lohp_jax.networks.policy import PolicyNetwork
from lohp_jax.policy.hybrid import HybridConfig, Policy
from lohp_jax.runs.config import PrepareConfig, RunConfig, TrainingConfig, resolve
from lohp_jax.training import checkpoint, metrics
from lohp_jax.training import engine as loop
from lohp_jax.training.engine import DivergedError, num_updates, train
from lohp_jax.types import TaskFamily

CONFIG = resolve(
    RunConfig(
        prepare=PrepareConfig(num_steps=4),
        training=TrainingConfig(
            compression=2, updates=12, batch_size=4, log_every=2, checkpoint_every=4
        ),
    )
)


def with_training(**values):
    return dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, **values))


def sample(key, split="train"):
    return {"x": jax.random.normal(key, (3,))}


def noisy_context(data, key):
    return {"x": data["x"] + 0.1 * jax.random.normal(key, (3,))}


def init_network(key, context):
    return {"w": jax.random.normal(key, (3,)), "b": jnp.zeros(3)}


FAMILY = TaskFamily(sample, None, None, None, noisy_context)
POLICY = Policy(PolicyNetwork(init_network, None, None, None), None, HybridConfig(), 2)
FRAME = Frame({"w": jnp.ones(2)}, {"w": jnp.float32(2)}, jnp.int32(1))
DATASET = Dataset(
    jnp.asarray(np.random.default_rng(0).normal(size=(5, 3, 1, 3)), jnp.float32),
    jnp.arange(5) % 2,
    {"x": jnp.asarray(np.random.default_rng(1).normal(size=(5, 3)), jnp.float32)},
)


def objective(params, example, key):
    noise = 0.1 * jax.random.normal(key, (3,))
    error = params["w"] * example.context["x"] + params["b"] + noise - example.tokens[-1, 0]
    moved = {"progress": jnp.sum(params["b"] ** 2), "cosine": jnp.float32(1.0)}
    return jnp.sum(error**2), {**moved, "error": jnp.abs(error)}


@contextlib.contextmanager
def replaced(name, value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, name, value)
        yield


def run(directory, config=CONFIG, *, objective=objective, dataset=DATASET, **options):
    directory.mkdir(exist_ok=True)
    with replaced("make_objective", lambda *_: objective):
        return train(
            config,
            FAMILY,
            POLICY,
            FRAME,
            dataset,
            directory,
            options.pop("method", "lohp"),
            key=jax.random.key(3),
            **options,
        )


def lines(directory):
    """Metrics without the rate, which no two runs share."""
    text = (directory / "metrics.jsonl").read_text()
    return [json.loads(line) | {"updates_per_second": 0} for line in text.splitlines()]


def assert_identical(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype and np.asarray(a).tobytes() == np.asarray(e).tobytes()


def assert_same_run(directory, state, expected):
    """A directory and a final state against those of an uninterrupted run."""
    whole_directory, whole_state = expected
    assert_identical(state, whole_state)
    assert lines(directory) == lines(whole_directory)
    folders = [d / "checkpoints" / "lohp" for d in (directory, whole_directory)]
    assert checkpoint.all_steps(folders[0]) == checkpoint.all_steps(folders[1])
    template = {"state": state, "frame": FRAME}
    saved, whole = (checkpoint.restore(folder, template)[1] for folder in folders)
    assert_identical(saved, whole)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return directory, run(directory)


def test_a_run_leaves_metrics_checkpoints_and_its_last_state(whole):
    directory, state = whole
    folder = directory / "checkpoints" / "lohp"
    assert state.step == 12
    assert checkpoint.all_steps(folder) == [4, 8, 12]
    _, saved = checkpoint.restore(folder, {"state": state, "frame": FRAME})
    assert_identical(saved, {"state": state, "frame": FRAME})
    found = lines(directory)
    assert [line["step"] for line in found] == [2, 4, 6, 8, 10, 12]
    assert found[-1]["loss"] < found[0]["loss"]
    assert set(found[0]) == {
        *("method", "step", "updates_per_second", "loss", "gradient_norm", "gradient_snr"),
        *("progress", "cosine", "error", "frozen"),
    }


def test_metrics_are_means_over_their_chunk(whole, tmp_path):
    fine = with_training(log_every=1)
    run(tmp_path / "fine", fine)
    for position, line in enumerate(lines(whole[0])):
        pair = lines(tmp_path / "fine")[2 * position : 2 * position + 2]
        np.testing.assert_allclose(line["loss"], np.mean([one["loss"] for one in pair]), rtol=1e-6)
        np.testing.assert_allclose(
            line["error"], np.mean([one["error"] for one in pair], axis=0), rtol=1e-6
        )


def test_progress_is_reported_after_each_chunk(tmp_path, whole):
    seen = []
    run(tmp_path / "run", on_progress=seen.append)
    assert [(at.method, at.step, at.updates) for at in seen] == [
        ("lohp", step, 12) for step in (2, 4, 6, 8, 10, 12)
    ]
    assert all(at.updates_per_second > 0 for at in seen)
    np.testing.assert_allclose(
        [at.metrics["loss"] for at in seen], [line["loss"] for line in lines(whole[0])], rtol=1e-7
    )


class Stop:
    """Raises at the n-th report of progress."""

    def __init__(self, after, error=KeyboardInterrupt):
        self.left, self.error = after, error

    def __call__(self, progress):
        self.left -= 1
        if not self.left:
            raise self.error


@pytest.mark.parametrize("after", [1, 2, 3, 5, 6])
def test_interrupted_run_is_saved_and_goes_on(whole, tmp_path, after):
    directory = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(directory, on_progress=Stop(after))
    assert checkpoint.latest_step(directory / "checkpoints" / "lohp") == 2 * after
    state = run(directory)
    assert_identical(state, whole[1])
    assert lines(directory) == lines(whole[0])


def test_run_interrupted_again_and_again(whole, tmp_path):
    directory = tmp_path / "run"
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(directory, on_progress=Stop(1))
    assert_identical(run(directory), whole[1])
    assert lines(directory) == lines(whole[0])


@pytest.mark.parametrize("after", [1, 3, 5])
def test_run_that_died_goes_on_from_its_checkpoint(whole, tmp_path, after):
    directory = tmp_path / "run"
    with pytest.raises(MemoryError):
        run(directory, on_progress=Stop(after, MemoryError))
    assert len(lines(directory)) == after
    expected = {1: None, 3: 4, 5: 8}[after]
    assert checkpoint.latest_step(directory / "checkpoints" / "lohp") == expected
    assert_same_run(directory, run(directory), whole)


def test_interrupt_between_line_and_report_leaves_one_line_a_chunk(whole, tmp_path):
    def append_and_stop(path, values):
        line = actual(path, values)
        if values["step"] == 6:
            raise KeyboardInterrupt
        return line

    actual, directory = metrics.append_line, tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "append_line", append_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run(directory)
    assert_same_run(directory, run(directory), whole)


def test_a_finished_run_is_left_alone(whole, tmp_path):
    seen, directory = [], tmp_path / "run"
    run(directory)
    text = (directory / "metrics.jsonl").read_text()
    state = run(directory, on_progress=seen.append)
    assert_identical(state, whole[1])
    assert not seen and (directory / "metrics.jsonl").read_text() == text


def test_killed_run_goes_on_from_its_checkpoint(whole, tmp_path):
    directory, root = tmp_path / "run", str(pathlib.Path(__file__).parents[2])
    script = subprocess.run(
        [sys.executable, __file__, str(directory)],
        env=os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert script.returncode == -signal.SIGKILL, script.stderr
    assert [line["step"] for line in lines(directory)] == [2, 4, 6]
    assert checkpoint.latest_step(directory / "checkpoints" / "lohp") == 4
    assert_same_run(directory, run(directory), whole)


def test_other_methods_lines_survive_a_resume(tmp_path):
    directory = tmp_path / "run"
    run(directory, method="cloning")
    with pytest.raises(MemoryError):
        run(directory, on_progress=Stop(3, MemoryError))
    run(directory)
    for method in ("cloning", "lohp"):
        steps = [line["step"] for line in metrics.read_lines(directory / "metrics.jsonl", method)]
        assert steps == [2, 4, 6, 8, 10, 12]


def test_start_from_given_params(tmp_path):
    params = {"w": jnp.full(3, 0.5), "b": jnp.ones(3)}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", params=params, on_progress=Stop(1))
    _, saved = checkpoint.restore(
        tmp_path / "run" / "checkpoints" / "lohp", {"state": fresh_state(), "frame": FRAME}
    )
    np.testing.assert_allclose(saved["state"].params["b"], 1, atol=0.1)
    whole = run(tmp_path / "whole", params=params)
    assert_identical(run(tmp_path / "run", params=params), whole)


def fresh_state():
    return loop.initial_state(CONFIG, FAMILY, POLICY, "lohp", jax.random.key(0))


def test_consolidation_takes_half_as_many_updates(tmp_path):
    assert num_updates(CONFIG, "lohp") == 12
    assert num_updates(CONFIG, "lohp_consolidated") == 6
    assert num_updates(with_training(updates=1), "lohp_consolidated") == 1
    assert run(tmp_path / "run", method="lohp_consolidated").step == 6


BAD = {
    "nan loss": lambda loss, params, bad: loss * jnp.where(bad, jnp.nan, 1.0),
    "infinite loss": lambda loss, params, bad: loss / jnp.where(bad, 0.0, 1.0),
    "nan gradient": lambda loss, params, bad: (
        loss + jnp.sqrt(jnp.where(bad, 0.0, 1.0) * jnp.sum(params["w"] ** 2))
    ),
}


@pytest.mark.parametrize(
    "spoiled_by, update, good",
    [("nan loss", 1, 0), ("nan loss", 7, 6), ("infinite loss", 8, 6), ("nan gradient", 8, 6)],
)
def test_divergence_stops_with_the_last_good_state(tmp_path, spoiled_by, update, good):
    """One update draws an example that spoils its loss or its gradient."""

    def spoiled(params, example, key):
        loss, info = objective(params, example, key)
        return BAD[spoiled_by](loss, params, example.optimizer < 0), info

    def draw_bad(key, dataset, first_step, *, num_steps, batch_size):
        batch = draw(key, dataset, first_step, num_steps=num_steps, batch_size=batch_size)
        step = first_step + jnp.arange(num_steps)[:, None]
        return batch._replace(index=jnp.where(step == update - 1, 5, batch.index % 5))

    bad_row = jax.tree.map(lambda leaf: leaf[:1], DATASET)._replace(optimizer=jnp.array([-1]))
    dataset = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), DATASET, bad_row)
    draw, directory = loop.draw_batches, tmp_path / "run"
    message = (
        rf"lohp: .* at update {update}; the state of update {good} is saved\..*another run "
        "directory.*lower training.learning_rate"
    )
    with replaced("draw_batches", draw_bad), pytest.raises(DivergedError, match=message):
        run(directory, objective=spoiled, dataset=dataset)
    folder = directory / "checkpoints" / "lohp"
    step, saved = checkpoint.restore(folder, {"state": fresh_state(), "frame": FRAME})
    assert step == saved["state"].step == good
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved["state"]))
    logged = metrics.read_lines(directory / "metrics.jsonl", "lohp")
    assert [line["step"] for line in logged] == list(range(2, good + 1, 2))
    assert run(directory).step == 12  # without the bad example


@pytest.mark.parametrize("log_every, shapes", [(4, 1), (5, 2)])
def test_each_shape_compiles_once(tmp_path, log_every, shapes):
    traced = []

    def counted(update):
        def counting(*args, **kwargs):
            traced.append(None)
            return update(*args, **kwargs)

        return actual(counting)

    actual = loop.scan_updates
    config = with_training(log_every=log_every, checkpoint_every=log_every)
    with replaced("scan_updates", counted):
        assert run(tmp_path / "run", config).step == 12
    assert len(traced) == shapes


@pytest.mark.parametrize("strategy", ["mesh", "pmap"])
def test_strategies_give_the_same_run(whole, tmp_path, strategy):
    state = run(tmp_path / "run", strategy=strategy)
    np.testing.assert_allclose(state.params["w"], whole[1].params["w"], rtol=1e-5)
    assert checkpoint.latest_step(tmp_path / "run" / "checkpoints" / "lohp") == 12


def test_frozen_policy_raises_the_alarm(tmp_path):
    def frozen(params, example, key):
        moved = {"progress": jnp.float32(0.05), "cosine": jnp.float32(1.0)}
        return jnp.sum(params["b"] - 1.0), moved

    run(tmp_path / "run", objective=frozen)
    assert [line["frozen"] for line in lines(tmp_path / "run")] == [False] + 5 * [True]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", objective=frozen, on_progress=Stop(3))
    run(tmp_path / "cut", objective=frozen)
    assert lines(tmp_path / "cut") == lines(tmp_path / "run")


def test_full_disk_keeps_the_checkpoints_before(whole, tmp_path):
    def full(folder, step, *args, **kwargs):
        if step == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return actual(folder, step, *args, **kwargs)

    actual, directory = checkpoint.save, tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        with pytest.raises(OSError, match="No space left"):
            run(directory)
    assert checkpoint.all_steps(directory / "checkpoints" / "lohp") == [4]
    assert_same_run(directory, run(directory), whole)


def kill_in_mid_run(directory):
    def kill(progress):
        if progress.step == 6:
            os.kill(os.getpid(), signal.SIGKILL)

    run(directory, on_progress=kill)


if __name__ == "__main__":
    kill_in_mid_run(pathlib.Path(sys.argv[1]))
