"""A run that was cut off, however, ends where one that was not would have ended, bit for bit.

The problem is a toy: six numbers, pulled towards those of each example. Run as a script, this file
trains until it is killed.
"""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax.training import checkpoint, metrics
from lohp_jax.training.engine import (
    DivergedError,
    Saving,
    Training,
    each_step,
    silent,
    step_keys,
    train,
)

NAME, UPDATES = "toy", 12
BESIDE = {"unit": {"w": jnp.float32(2)}, "kind": jnp.int32(1)}
CONFIG = {"updates": UPDATES, "sizes": [1, 2]}
OPTIMIZER = optax.adam(0.02)
RNG = np.random.default_rng(0)
DATASET = {
    "x": jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32),
    "y": jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32),
    "spoils": jnp.zeros(5, bool),
}


class State(NamedTuple):
    params: dict
    opt_state: optax.OptState
    step: jax.Array


def fresh_state():
    params = {"w": jax.random.normal(jax.random.key(1), (3,)), "b": jnp.zeros(3)}
    return State(params, OPTIMIZER.init(params), jnp.int32(0))


def draw_one(step):
    keys = step_keys(jax.random.key(2), step, 4)
    return {"index": jax.vmap(lambda key: jax.random.randint(key, (), 0, 5))(keys), "key": keys}


def toy_loss(params, example, key):
    noise = 0.1 * jax.random.normal(key, (3,))
    error = params["w"] * example["x"] + params["b"] + noise - example["y"]
    moved = {"progress": jnp.sum(params["b"] ** 2), "cosine": jnp.float32(1.0)}
    return jnp.sum(error**2), {**moved, "error": jnp.abs(error)}


def make_update(loss):
    def update(state, batch, dataset, axis_name=None):
        def mean_loss(params):
            examples = jax.tree.map(lambda leaf: leaf[batch["index"]], dataset)
            losses, info = jax.vmap(loss, (None, 0, 0))(params, examples, batch["key"])
            return losses.mean(), jax.tree.map(lambda leaf: leaf.mean(axis=0), info)

        (value, info), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        if axis_name is not None:
            value, info, grads = jax.lax.pmean((value, info, grads), axis_name)
        steps, opt_state = OPTIMIZER.update(grads, state.opt_state)
        values = {"loss": value, "gradient_norm": optax.tree.norm(grads), **info}
        return State(optax.apply_updates(state.params, steps), opt_state, state.step + 1), values

    return update


def make_training(
    *, name=NAME, loss=toy_loss, dataset=DATASET, draw_one=draw_one, updates=UPDATES, **options
):
    options = {"log_every": 2, "replicated": (dataset,)} | options
    return Training(name, fresh_state, make_update(loss), each_step(draw_one), updates, **options)


def run(directory, *, checkpoint_every=4, on_progress=silent, strategy="jit", **options):
    directory.mkdir(exist_ok=True)
    saving = Saving(directory, checkpoint_every, CONFIG, BESIDE)
    training = make_training(**options)
    return train(training, strategy=strategy, saving=saving, on_progress=on_progress)


def template(state):
    return {"state": state, **BESIDE}


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
    folders = [d / "checkpoints" / NAME for d in (directory, whole_directory)]
    assert checkpoint.all_steps(folders[0]) == checkpoint.all_steps(folders[1])
    saved, whole = (checkpoint.restore(folder, template(state))[1] for folder in folders)
    assert_identical(saved, whole)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return directory, run(directory)


def test_a_run_leaves_metrics_checkpoints_and_its_last_state(whole):
    directory, state = whole
    folder = directory / "checkpoints" / NAME
    assert state.step == 12
    assert checkpoint.all_steps(folder) == [4, 8, 12]
    _, saved = checkpoint.restore(folder, template(state))
    assert_identical(saved, template(state))
    assert checkpoint.read_config(folder) == CONFIG
    found = lines(directory)
    assert [line["step"] for line in found] == [2, 4, 6, 8, 10, 12]
    assert found[-1]["loss"] < found[0]["loss"]
    assert set(found[0]) == {
        *("method", "step", "updates_per_second", "loss", "gradient_norm"),
        *("progress", "cosine", "error", "frozen"),
    }


def test_metrics_are_means_over_their_chunk(whole, tmp_path):
    run(tmp_path / "fine", log_every=1)
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
        (NAME, step, UPDATES) for step in (2, 4, 6, 8, 10, 12)
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
    assert checkpoint.latest_step(directory / "checkpoints" / NAME) == 2 * after
    state = run(directory)
    assert_identical(state, whole[1])
    assert lines(directory) == lines(whole[0])


def finish(state, dataset):
    """Something that is seen if it is done twice, or not at all."""
    return state._replace(params=state.params | {"b": state.params["b"] + dataset["x"][0]})


@pytest.mark.parametrize("after", [None, 5, 6])
def test_what_is_left_to_do_is_done_once_after_the_last_update(whole, tmp_path, after):
    directory = tmp_path / "run"
    if after is not None:
        with pytest.raises(KeyboardInterrupt):
            run(directory, finish=finish, on_progress=Stop(after))
    state = run(directory, finish=finish)
    assert_identical(state, jax.jit(finish)(whole[1], DATASET))
    _, saved = checkpoint.restore(directory / "checkpoints" / NAME, template(state))
    assert_identical(saved["state"], state)


def test_a_run_interrupted_while_it_finishes_finishes_later(whole, tmp_path):
    def interrupt(state, dataset):
        raise KeyboardInterrupt

    directory = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(directory, finish=interrupt)
    assert checkpoint.latest_step(directory / "checkpoints" / NAME) == 10
    state = run(directory, finish=finish)
    assert_identical(state, jax.jit(finish)(whole[1], DATASET))


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
    assert checkpoint.latest_step(directory / "checkpoints" / NAME) == expected
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
    saved = checkpoint.latest_step(directory / "checkpoints" / NAME)
    assert lines(directory)[-1]["step"] == saved == 4
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
    assert checkpoint.latest_step(directory / "checkpoints" / NAME) == 4
    assert_same_run(directory, run(directory), whole)


def test_other_methods_lines_survive_a_resume(tmp_path):
    directory = tmp_path / "run"
    run(directory, name="other")
    with pytest.raises(MemoryError):
        run(directory, on_progress=Stop(3, MemoryError))
    run(directory)
    for method in ("other", NAME):
        steps = [line["step"] for line in metrics.read_lines(directory / "metrics.jsonl", method)]
        assert steps == [2, 4, 6, 8, 10, 12]


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
        loss, info = toy_loss(params, example, key)
        return BAD[spoiled_by](loss, params, example["spoils"]), info

    def draw_bad(step):
        batch = draw_one(step)
        return batch | {"index": jnp.where(step == update - 1, 5, batch["index"])}

    bad_row = jax.tree.map(lambda leaf: leaf[:1], DATASET) | {"spoils": jnp.array([True])}
    dataset = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), DATASET, bad_row)
    directory = tmp_path / "run"
    options = {"loss": spoiled, "dataset": dataset, "draw_one": draw_bad}
    message = rf"^toy: .* at update {update}; the state of update {good} is saved\. Rest a while\.$"
    with pytest.raises(DivergedError, match=message):
        run(directory, advice="Rest a while.", **options)
    folder = directory / "checkpoints" / NAME
    step, saved = checkpoint.restore(folder, template(fresh_state()))
    assert step == saved["state"].step == good
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved["state"]))
    logged = metrics.read_lines(directory / "metrics.jsonl", NAME)
    assert [line["step"] for line in logged] == list(range(2, good + 1, 2))
    assert run(directory).step == UPDATES  # without the bad example
    with pytest.raises(
        DivergedError, match=rf"^toy: .* at update {update}\. Lower the learning rate"
    ):
        train(make_training(**options))


def test_training_in_memory_is_that_on_disk(whole):
    states, seen = [], []
    state = train(make_training(), on_state=states.append, on_progress=seen.append)
    assert_identical(state, whole[1])
    assert [int(state.step) for state in states] == [2, 4, 6, 8, 10, 12]
    assert_identical(states[-1], state)
    assert [at.metrics["frozen"] for at in seen] == [line["frozen"] for line in lines(whole[0])]


@pytest.mark.parametrize("name", ["updates", "log_every"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=rf"toy: {name} must be at least 1, got 0"):
        make_training(**{name: 0})


def test_checkpoints_fall_on_the_chunk_that_reaches_their_step(tmp_path):
    run(tmp_path / "run", log_every=5, checkpoint_every=4)
    assert checkpoint.all_steps(tmp_path / "run" / "checkpoints" / NAME) == [5, 10, 12]
    with pytest.raises(ValueError, match="checkpoint_every must be at least 1, got 0"):
        run(tmp_path / "run", checkpoint_every=0)


@pytest.mark.parametrize("log_every, shapes", [(4, 1), (5, 2)])
def test_each_shape_compiles_once(log_every, shapes):
    traced = []

    def counted(*args):
        traced.append(None)
        return toy_loss(*args)

    assert train(make_training(loss=counted, log_every=log_every)).step == UPDATES
    assert len(traced) == shapes


@pytest.mark.parametrize("strategy", ["mesh", "pmap"])
def test_strategies_give_the_same_run(whole, tmp_path, strategy):
    state = run(tmp_path / "run", strategy=strategy)
    np.testing.assert_allclose(state.params["w"], whole[1].params["w"], rtol=1e-5)
    assert checkpoint.latest_step(tmp_path / "run" / "checkpoints" / NAME) == 12


def test_frozen_policy_raises_the_alarm(tmp_path):
    def frozen(params, example, key):
        moved = {"progress": jnp.float32(0.05), "cosine": jnp.float32(1.0)}
        return jnp.sum(params["b"] - 1.0), moved

    run(tmp_path / "run", loss=frozen)
    assert [line["frozen"] for line in lines(tmp_path / "run")] == [False] + 5 * [True]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", loss=frozen, on_progress=Stop(3))
    run(tmp_path / "cut", loss=frozen)
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
    assert checkpoint.all_steps(directory / "checkpoints" / NAME) == [4]
    assert_same_run(directory, run(directory), whole)


def kill_in_mid_run(directory):
    def kill(progress):
        if progress.step == 6:
            os.kill(os.getpid(), signal.SIGKILL)

    run(directory, on_progress=kill)


if __name__ == "__main__":
    kill_in_mid_run(pathlib.Path(sys.argv[1]))
