"""The command line as a user meets it: what it writes, says and returns, in good and bad times.

One tiny run is made once; what damages it works on copies.
"""

import ast
import contextlib
import errno
import html
import io
import json
import logging
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import safetensors.numpy

import lohp_jax
from lohp_jax import cli
from lohp_jax.evaluation import scores
from lohp_jax.methods import METHODS
from lohp_jax.optimizers.meta import Unroll
from lohp_jax.optimizers.theta import load_theta
from lohp_jax.runs import lohp as runs
from lohp_jax.runs import meta as meta_runs
from lohp_jax.runs import meta_training as meta
from lohp_jax.runs.config import RunConfig, from_json
from lohp_jax.runs.stage import open_run, trained_steps
from lohp_jax.tasks import FAMILIES
from lohp_jax.training import checkpoint, metrics
from lohp_jax.training.engine import DivergedError
from lohp_jax.trajectories.store import open_store

ROOT = pathlib.Path(__file__).parents[2]
UPDATES = 6
TINY = [
    *("--methods", "lohp", "--prepare.num-tasks", "8", "--prepare.num-steps", "4"),
    *("--prepare.optimizers", "sgd:1", "adam:0.1", "--network.trunk", "mlp"),
    *("--network.widths", "8", "--network.embedding", "8", "--training.compression", "2"),
    *("--training.updates", str(UPDATES), "--training.batch-size", "4"),
    *("--training.log-every", "2", "--training.checkpoint-every", "4"),
    *("--evaluation.num-tasks", "4"),
]
ROW = {
    "method": str,
    "seed": int,
    "split": str,
    "accuracy": float,
    "accuracy_std": float,
    "accuracy_min": float,
    "num_tasks": int,
    "latency_ms_p50": float,
    "latency_ms_p99": float,
    "latency_ms_p50_batch": float,
    "latency_ms_p99_batch": float,
    "latency_ms_first": float,
    "latency_batch_size": int,
    "gradients": int,
    "forward_passes": int,
}


def lohp(*arguments):
    """Exit code, standard output and standard error of a command run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def contents(directory):
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def read_results(directory):
    return json.loads((directory / "results.json").read_text())


def without_latency(results):
    rows = [{k: v for k, v in row.items() if "latency" not in k} for row in results["rows"]]
    results = {name: value for name, value in results.items() if name != "break_even"}
    return results | {"rows": rows}


def trained(directory, method="lohp"):
    return jax.tree.leaves(lohp_jax.load(directory, method).params)


def assert_identical(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


class Compilations(logging.Handler):
    """Names of the functions that JAX compiles."""

    def __init__(self):
        super().__init__()
        self.names = []

    def emit(self, record):
        if found := re.match(r"Compiling (?:jit\()?(\w+)", record.getMessage()):
            self.names.append(found[1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Directory of a run, what it said, and what it compiled."""
    directory, compilations = tmp_path_factory.mktemp("whole") / "run", Compilations()
    logger = logging.getLogger("jax")
    logger.addHandler(compilations)
    try:
        with jax.log_compiles():
            said = lohp("run", "--out", directory, *TINY)
    finally:
        logger.removeHandler(compilations)
    return directory, said, compilations.names


@pytest.fixture
def copied(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    return tmp_path / "run"


def test_run_leaves_what_it_promises(whole):
    directory, (code, out, err), _ = whole
    assert code == 0, err
    files = {path.name for path in directory.iterdir()}
    assert files == {
        *("config.json", "metrics.jsonl", "results.json", "figures.json", "report.html"),
        *("checkpoints", "trajectories"),
    }
    page = (directory / "report.html").read_text()
    assert "teacher_adam" in page and "image/svg+xml" in page
    assert "4 held-out tasks" in out and out.endswith(f"report: {directory / 'report.html'}\n")
    for method in ("teacher_sgd", "same_support_adam", "lohp"):
        assert re.search(rf"^ *{method} +0\.\d+ ± 0\.\d+ ", out, re.MULTILINE)
    assert "prepare" in err and "train lohp" in err and "loss" in err and "progress" in err


def test_results_follow_the_schema(whole):
    results = read_results(whole[0])
    assert results["schema"] == 1 and results["family"] == "digits_5way"
    config = from_json(results["config"])
    assert isinstance(config, RunConfig) and config == open_run(whole[0])
    environment = results["environment"]
    assert {"versions", "platform", "device"} <= environment.keys()
    assert {"lohp_jax", "jax", "optax"} <= environment["versions"].keys()
    assert [row["method"] for row in results["rows"]] == [
        *("teacher_sgd", "teacher_adam", "same_support_adam", "same_support_adamw"),
        *("ridge_probe", "mean_weights", "nearest_task", "ridge", "lohp"),
    ]
    for row in results["rows"]:
        assert {name: type(row[name]) for name in ROW} == ROW
        assert row["split"] == "held_out" and row["seed"] == 0 and row["num_tasks"] == 4
        assert 0 <= row["accuracy_min"] <= row["accuracy"] <= 1
        assert row["latency_ms_p50"] > 0 and row["latency_ms_p50_batch"] > 0
    costs = {row["method"]: row["gradients"] for row in results["rows"]}
    assert (costs["teacher_sgd"], costs["lohp"], costs["ridge"]) == (4, 0, 0)
    assert costs["same_support_adam"] == results["same_support_adam"]["num_steps"] > 0
    assert results["imitated"] in ("teacher_sgd", "teacher_adam")
    assert results["num_trajectories"] + results["num_dropped"] == 16
    assert results["num_weights"] == 5 * 64 + 5
    assert results["same_support_adamw"]["weight_decay"] > 0
    assert results["ridge_probe"]["penalty"] > 0
    closed = {"same_support_adam", "same_support_adamw", "ridge_probe"}
    closed |= {"mean_weights", "nearest_task", "ridge"}
    assert results["honesty"].keys() == closed | {"lohp"}


@pytest.mark.slow
def test_beside_a_closed_loop_stands_adam_with_as_many_gradients(tmp_path):
    directory = tmp_path / "run"
    changes = ["--methods", "lohp_feedback", "--loop.widths", "4", "--prepare.optimizers", "sgd:1"]
    changes += ["--evaluation.rivals", "prototypes"]
    code, out, err = lohp("run", "--out", directory, *TINY, *changes)
    assert code == 0, err
    results, rows = read_results(directory), {}
    for row in results["rows"]:
        rows[row["method"], row["split"]] = row
    spent = {method: rows[method, "held_out"]["gradients"] for method, _ in rows}
    adams = ("same_support_adam", "same_support_adamw")
    assert spent == {
        "teacher_sgd": 4,
        **{f"{name}_{number}": number for name in adams for number in (2, 8, 40)},
        **{name: results[name]["num_steps"] for name in adams},
        **dict.fromkeys(("ridge_probe", "mean_weights", "nearest_task", "ridge", "prototypes"), 0),
        "lohp_feedback": 2,
    }
    assert results["same_support_adam_8"]["num_steps"] == 8
    taken = results["prototypes"]["train_seconds"]
    assert rows["prototypes", "held_out"]["train_seconds"] == taken > 0
    both = [rows["lohp_feedback", split] for split in ("held_out", "train")]
    assert all(row["forward_passes"] == 5 and row["fallbacks"] == 0 for row in both)
    assert all(0 < row["familiarity"] <= 1 for row in both)
    figures = json.loads((directory / "figures.json").read_text())
    assert figures["score_by_step"]["lohp_feedback"]["gradients"] == [0, 1, 2]
    for split, row in zip(("held_out", "train"), both, strict=True):
        told = figures["familiarity"]["lohp_feedback"][split]
        assert [len(told[name]) for name in ("distance", "trust", "familiarity")] == [4, 4, 4]
        if split == "held_out":
            np.testing.assert_allclose(np.mean(told["trust"]), row["trust"], rtol=1e-6)
    assert "split train" in (directory / "report.html").read_text() and "split train" not in out


def test_a_run_says_what_it_took_and_when_it_pays(whole):
    results, (_, out, _) = read_results(whole[0]), whole[1]
    told = results["break_even"]["lohp"]
    assert told["prepare_seconds"] > 0 and told["train_seconds"] > 0
    assert 0 < told["compile_seconds"] < told["prepare_seconds"] + told["train_seconds"]
    assert told["against"][0]["rival"] == "same_support_adam"
    assert f"break-even of lohp: {told['words']}" in out
    assert f"honesty of lohp: {results['honesty']['lohp']['verdict']['words']}" in out
    page = (whole[0] / "report.html").read_text()
    assert html.escape(told["words"]) in page
    lines = [json.loads(line) for line in (whole[0] / "metrics.jsonl").read_text().splitlines()]
    stages = [(line["stage"], line["name"]) for line in lines if "stage" in line]
    assert stages[0] == ("prepare", "trajectories") and stages[-1] == ("train", "lohp")


def test_metrics_hold_the_diagnostics(whole):
    lines = metrics.read_lines(whole[0] / "metrics.jsonl", "lohp")
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert {
            *("loss", "gradient_norm", "gradient_snr", "off_policy", "on_policy", "progress"),
            *("cosine", "residual_by_length", "log_std", "log_coefficient", "frozen"),
        } <= line.keys()
        numbers = np.concatenate([np.ravel(v) for k, v in line.items() if k != "method"])
        assert np.isfinite(np.float64(numbers)).all()


def test_one_compilation_for_each_shape(whole):
    _, _, compiled = whole
    assert compiled.count("on_tuple") == 1  # the update, all of its three chunks
    assert compiled.count("_run") == 2  # the roll-out of each teacher
    assert compiled.count("start") == 1


@pytest.mark.slow
def test_stages_give_the_same_results(whole, tmp_path):
    directory, spoken = tmp_path / "run", {}
    weights = tmp_path / "new" / "weights.safetensors"
    for command, *options in (
        ("prepare", *TINY),
        ("train", "--method", "lohp"),
        ("generate", "--weights", weights),
        ("evaluate",),
        ("report",),
    ):
        code, out, err = lohp(command, "--out", directory, *options, "--json")
        assert code == 0, err
        spoken[command] = json.loads(out)
    assert spoken["prepare"] == {"out": str(directory), "num_trajectories": 16, "num_dropped": 0}
    assert spoken["train"] == {"out": str(directory), "method": "lohp", "updates": UPDATES}
    assert spoken["generate"]["num_samples"] == 1 and weights.exists()
    assert spoken["evaluate"] == read_results(directory)
    assert spoken["report"] == {"report": str(directory / "report.html")}
    assert without_latency(read_results(directory)) == without_latency(read_results(whole[0]))
    assert_identical(trained(directory), trained(whole[0]))


def test_run_in_the_same_directory_changes_nothing(whole):
    before = contents(whole[0])
    code, out, err = lohp("run", "--out", whole[0], *TINY)
    assert code == 2 and not out
    assert "holds a run; continue it with --resume, or choose another --out" in err
    code, out, err = lohp("prepare", "--out", whole[0], *TINY)
    assert code == 2 and "--resume" in err
    code, out, err = lohp("train", "--out", whole[0])
    assert code == 2 and "holds 6 updates of lohp; continue them with --resume" in err
    assert contents(whole[0]) == before


def test_resume_with_other_options_changes_nothing(whole):
    before = contents(whole[0])
    code, _, err = lohp("run", "--out", whole[0], "--resume", *TINY, "--training.clip-norm", 2)
    assert code == 2 and "training.clip_norm is 1.0 there and 2.0 here" in err
    assert contents(whole[0]) == before


def stop_training_at(monkeypatch, step):
    def append_line(path, values):
        line = actual(path, values)
        if values["step"] == step:
            raise KeyboardInterrupt
        return line

    actual = metrics.append_line
    monkeypatch.setattr(metrics, "append_line", append_line)


def test_interrupted_run_is_resumed(whole, tmp_path, monkeypatch):
    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_training_at(patch, 6)
        code, out, err = lohp("run", "--out", directory, *TINY)
    assert code == 1 and not out
    assert err.strip().splitlines()[-1].startswith("lohp: interrupted; ") and "--resume" in err
    assert trained_steps(directory, "lohp") == 4
    for command in ("evaluate", "report"):
        code, _, err = lohp(command, "--out", directory)
        assert code == 1
        assert "has 4 of 6 updates of lohp" in err or "no results" in err
    code, out, err = lohp("run", "--out", directory, "--resume", "--json")
    assert code == 0, err
    results = json.loads(out)
    assert results == read_results(directory)
    assert without_latency(results) == without_latency(read_results(whole[0]))
    assert_identical(trained(directory), trained(whole[0]))
    assert (directory / "report.html").exists()


def test_interrupted_preparation_is_resumed(whole, tmp_path, monkeypatch):
    def write(self, name, *args, **kwargs):
        if name.startswith("01"):
            raise KeyboardInterrupt
        return actual(self, name, *args, **kwargs)

    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        store = sys.modules["lohp_jax.trajectories.store"].Store
        actual = store.write
        patch.setattr(store, "write", write)
        code, _, err = lohp("prepare", "--out", directory, *TINY)
    assert code == 1 and "interrupted" in err and "--resume" in err
    code, _, err = lohp("train", "--out", directory)
    assert code == 1 and "8 of 16 trajectories; make the others with `lohp prepare --out" in err
    code, out, _ = lohp("prepare", "--out", directory, "--resume")
    assert code == 0 and "num_trajectories: 16" in out
    code, _, err = lohp("evaluate", "--out", directory)
    assert code == 1
    assert re.search(r"has 0 of 6 updates of lohp; .*--method lohp --resume", err)
    stores = [contents(d / "trajectories") for d in (directory, whole[0])]
    assert stores[0] == stores[1]


FROM_A_TERMINAL = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
"""
LOHP = """
import sys
from lohp_jax.cli import main
sys.exit(main())
"""
LOHP_INTERRUPTED_IN_COMPILATION = """
import os, sys, threading
from lohp_jax.cli import main
from lohp_jax.training import engine as loop

def scan_updates(update, actual=loop.scan_updates):
    def run(*args, **kwargs):
        traced = actual(update)(*args, **kwargs)
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        return traced
    return run

loop.scan_updates = scan_updates
sys.exit(main())
"""


@pytest.fixture
def endless(tmp_path):
    """A prepared run that would train for days."""
    updates = ("--training.updates", 1_000_000, "--training.checkpoint-every", 1_000_000)
    assert lohp("prepare", "--out", tmp_path / "run", *TINY, *updates)[0] == 0
    return tmp_path / "run"


def start_training(directory, code, **environment):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment
    arguments = ["train", "--out", directory, "--method", "cloning"]
    return subprocess.Popen(
        [sys.executable, "-c", FROM_A_TERMINAL + code, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_interrupted(process):
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1, err
    assert not out and "lohp: interrupted; " in err and "--resume" in err
    assert "Traceback" not in err


def test_signal_in_mid_training_leaves_a_resumable_run(endless):
    cache = jax.config.jax_compilation_cache_dir or ""
    process = start_training(endless, LOHP, JAX_COMPILATION_CACHE_DIR=cache)
    deadline = time.monotonic() + 180
    lines = endless / "metrics.jsonl"
    while lines.read_bytes().count(b'"method": "cloning"') < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert_interrupted(process)
    assert trained_steps(endless, "cloning") == metrics.read_lines(lines, "cloning")[-1]["step"] > 0
    assert all(np.isfinite(leaf).all() for leaf in trained(endless, "cloning"))


@pytest.mark.slow
def test_signal_in_mid_compilation_ends_cleanly(endless):
    assert_interrupted(start_training(endless, LOHP_INTERRUPTED_IN_COMPILATION))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], r"Expected one of \{run, prepare"),
        (["rnu"], r"rnu.*run, prepare, train, generate"),
        (["run", "--familly", "x"], r"--familly.*Perhaps you meant.*--family"),
        (["run", "--training.update", "5"], r"--training\.update\b.*--training\.updates"),
        (["run", "--family", "digits_5wy"], r"'digits_5wy'; did you mean 'digits_5way'\?"),
        (["run", "--methods", "lohp", "clonning"], r"'clonning'; did you mean 'cloning'\?"),
        (["run", "--methods", "lohp", "lohp"], r"none of them twice"),
        (["run", "--prepare.optimizers", "adm"], r"'adm'; did you mean 'adam'\?"),
        (["run", "--prepare.optimizers"], r"number of optimizers must be at least 1"),
        (["run", "--prepare.num-tasks", "0"], r"num_tasks must be at least 2, got 0"),
        (["run", "--prepare.num-tasks", "many"], r"--prepare\.num-tasks.*'many'"),
        (["run", "--prepare.start", "same"], r"'same'.*'shared', 'independent'"),
        (["run", "--training.compression", "3"], r"num_steps=20, got 3; .*\[1, 2, 4, 5, 10, 20\]"),
        (["run", "--training.learning-rate", "0"], r"learning_rate must be finite and positive"),
        (["run", "--network.trunk", "unett"], r"'unett'; did you mean 'unet'\?"),
        (["run", "--balance.end-std", "-1"], r"end_std must be positive, got -1"),
        (["run", "--tasks.network", "cnn"], r"'cnn'.*'linear'"),
        (["run", "--tasks.shots", "5000"], r"shots must be between 1 and 100.*got 5000"),
        (["run", "--tasks.data", "mnist"], r"'digits' or 'tfds:NAME', got 'mnist'"),
        (["run", "--strategy", "gpu"], r"'gpu'.*'jit', 'mesh', 'pmap'"),
        (["run", "--seed", "-1"], r"seed must be at least 0, got -1"),
        (["prepare", "--family", "digits5way"], r"did you mean 'digits_5way'\?"),
        (["train", "--method", "lohpp"], r"'lohpp'.*'lohp'"),
        (["train", "--metod", "lohp"], r"--metod.*--method"),
        (["generate"], r"--weights"),
        (["meta-train", "--families", "digits"], r"'digits'; did you mean 'digits_mlp'\?"),
        (["meta-train", "--sigma", "0"], r"sigma must be finite and positive, got 0"),
        (["meta-train", "--probe-steps", "70"], r"probe_steps must be a multiple of 50, got 70"),
        (["meta-train", "--update", "5"], r"--update\b.*--updates"),
    ],
)
def test_bad_usage_is_named_and_changes_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    out_option = ["--out", "new"] if arguments[:1] != ["rnu"] and arguments else []
    code, out, err = lohp(*arguments, *out_option)
    assert code == 2 and not out
    assert re.search(message, " ".join(err.split()))
    assert not list(tmp_path.iterdir())
    assert "Traceback" not in err and "tyro-dummy" not in err


@pytest.mark.parametrize(
    "command", [("train",), ("evaluate",), ("report",), ("generate", "--weights", "w")]
)
def test_missing_run(tmp_path, command):
    name, *options = command
    code, out, err = lohp(name, "--out", tmp_path / "none", *options)
    assert code == 1 and not out and str(tmp_path / "none") in err
    assert re.search(r"`lohp (prepare|train|evaluate)", err)
    assert not list(tmp_path.iterdir())


def replace_text(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def flip_byte(path):
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


CONFIG_DAMAGE = {
    "half-written": (lambda path: path.write_bytes(path.read_bytes()[:100]), "is damaged"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged"),
    "a list": (lambda path: path.write_text("[1]"), "is damaged"),
    "no schema": (lambda path: replace_text(path, '"schema"', '"scheme"'), "is damaged"),
    "not text": (lambda path: path.write_bytes(b"\xff\xfe{}"), "is damaged"),
    "other schema": (
        lambda path: replace_text(path, '"schema": 1', '"schema": 2'),
        "has schema 2, this version of lohp_jax reads schema 1 only",
    ),
    "unknown field": (
        lambda path: replace_text(path, '"seed"', '"seeds"'),
        "got 'seeds'; did you mean 'seed'?",
    ),
    "wrong type": (
        lambda path: replace_text(path, '"seed": 0', '"seed": "0"'),
        "config.json.seed: expected int, got '0'",
    ),
}


@pytest.mark.parametrize("damage, message", CONFIG_DAMAGE.values(), ids=CONFIG_DAMAGE)
def test_damaged_config(copied, damage, message):
    damage(copied / "config.json")
    before = contents(copied)
    for command in (("evaluate",), ("train", "--resume"), ("run", "--resume", *TINY)):
        code, out, err = lohp(*command, "--out", copied)
        assert code == 1 and not out
        assert message in err and str(copied / "config.json") in err
    assert contents(copied) == before


def test_flipped_byte_in_a_shard_is_named(copied):
    shard = copied / "trajectories" / "shards" / "01-adam-000000"
    flip_byte(shard / "leaf-000.npy")
    before = contents(copied)
    for command in (("evaluate",), ("train", "--method", "cloning")):
        code, _, err = lohp(*command, "--out", copied)
        assert code == 1
        assert "01-adam-000000" in err and "sha256" in err and "Nothing was deleted" in err
    assert contents(copied) == before
    shutil.rmtree(shard)  # as the message says
    code, _, err = lohp("prepare", "--out", copied, "--resume")
    assert code == 0, err
    open_store(copied / "trajectories").verify()


def test_flipped_byte_in_a_checkpoint(copied):
    newest = copied / "checkpoints" / "lohp" / "step_6"
    flip_byte(max(newest.rglob("d/*"), key=lambda path: path.stat().st_size))
    before = contents(copied)
    for command in (("generate", "--weights", "w"), ("train", "--resume"), ("evaluate",)):
        code, _, err = lohp(*command, "--out", copied)
        assert code == 1 and "step 6 is damaged" in err and "SHA-256" in err
    assert contents(copied) == before


def test_damaged_results(copied):
    page = (copied / "report.html").read_bytes()
    replace_text(copied / "results.json", '"schema": 1', '"schema": 7')
    code, _, err = lohp("report", "--out", copied)
    assert code == 1 and "schema 7" in err
    assert (copied / "report.html").read_bytes() == page


def fill_disk(monkeypatch, name):
    """From now on no file of this name can be put into its place."""

    def replace(source, target):
        if pathlib.Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return actual(source, target)

    actual = os.replace
    monkeypatch.setattr(os, "replace", replace)


def test_full_disk_while_writing_the_config(tmp_path, monkeypatch):
    fill_disk(monkeypatch, "config.json")
    code, out, err = lohp("prepare", "--out", tmp_path / "run", *TINY)
    assert code == 1 and not out
    assert "No space left on device" in err and "config.json" in err
    assert contents(tmp_path) == {}


@pytest.mark.slow
def test_full_disk_while_writing_results(copied, monkeypatch):
    name = "results.json"
    fixed = dict.fromkeys(("latency_ms_p50", "latency_ms_p50_batch"), 1.0)
    monkeypatch.setattr(scores, "latency", lambda *_: fixed)
    before = contents(copied)
    fill_disk(monkeypatch, name)
    code, out, err = lohp("evaluate", "--out", copied)
    assert code == 1 and not out and "No space left on device" in err and name in err
    after = contents(copied)
    assert after[name] == before[name] and after.keys() == before.keys()


def test_full_disk_while_writing_weights(whole, tmp_path, monkeypatch):
    weights = tmp_path / "weights.safetensors"
    assert lohp("generate", "--out", whole[0], "--weights", weights)[0] == 0
    before = contents(tmp_path)
    fill_disk(monkeypatch, weights.name)
    code, _, err = lohp("generate", "--out", whole[0], "--weights", weights, "--seed", 1)
    assert code == 1 and "No space left on device" in err and weights.name in err
    assert contents(tmp_path) == before


def test_divergence_fails_with_its_message(whole, tmp_path, monkeypatch):
    def diverge(*args, **kwargs):
        raise DivergedError("lohp: lower training.learning_rate.")

    monkeypatch.setattr(runs, "train_run", diverge)
    code, out, err = lohp("train", "--out", whole[0], "--method", "cloning")
    assert code == 1 and not out and err.endswith("lohp: lower training.learning_rate.\n")


@pytest.fixture(scope="module")
def support():
    """A support as a user would keep it, with its labels out of order."""
    family = lohp_jax.make_family("digits_5way", shots=2)
    data = family.sample(jax.random.key(5), "held_out")
    context = family.context(data, jax.random.key(6))
    order = np.random.default_rng(0).permutation(10)
    x, y = (np.asarray(context[name])[order] for name in ("x", "y"))
    return {"x": x.astype(np.float64), "y": y.astype(np.int64)}


def test_weights_for_a_support_of_ones_own(whole, support, tmp_path):
    np.savez(tmp_path / "support.npz", **support)
    weights = tmp_path / "weights.safetensors"
    code, out, err = lohp(
        *("generate", "--out", whole[0], "--support", tmp_path / "support.npz"),
        *("--weights", weights, "--num-samples", 3, "--temperature", 0.5, "--seed", 4, "--json"),
    )
    assert code == 0, err
    assert json.loads(out) == {"weights": str(weights), "num_samples": 3}
    expected = lohp_jax.generate(
        lohp_jax.load(whole[0]),
        {"x": np.float32(support["x"]), "y": support["y"]},
        jax.random.split(jax.random.key(4))[1],
        num_samples=3,
        temperature=0.5,
    )
    written = safetensors.numpy.load_file(weights)
    assert written.keys() == {"head.w", "head.b"}
    assert written["head.w"].shape == (3, 64, 5)
    for name in ("w", "b"):
        np.testing.assert_allclose(written[f"head.{name}"], expected["head"][name], rtol=1e-5)
    assert not np.array_equal(written["head.w"][0], written["head.w"][1])


def test_weights_for_a_held_out_task(whole, tmp_path):
    code, out, _ = lohp("generate", "--out", whole[0], "--weights", tmp_path / "w", "--json")
    assert code == 0
    (accuracy,) = json.loads(out)["accuracy"]
    assert 0 <= accuracy <= 1
    code, out, _ = lohp("generate", "--out", whole[0], "--weights", tmp_path / "w")
    assert code == 0 and f"accuracy: {accuracy}" in out


def with_nan(images):
    images = images.copy()
    images[3, 2, 2, 0] = np.nan
    return images


BAD_SUPPORT = {
    "no labels": (lambda s: {"x": s["x"]}, r"arrays x, y, got \['x'\]"),
    "other names": (lambda s: {"images": s["x"], "labels": s["y"]}, r"got \['images', 'labels'\]"),
    "NaN": (lambda s: s | {"x": with_nan(s["x"])}, "finite numbers in x, got 1 NaN"),
    "missing class": (lambda s: {k: v[s["y"] > 0] for k, v in s.items()}, r"missing \[0\]"),
    "unknown class": (lambda s: s | {"y": s["y"] + 1}, r"missing \[0\], unknown \[5\]"),
    "wrong shape": (lambda s: s | {"x": s["x"][:, :4]}, r"\[n, 8, 8, 1\], got \[10, 4"),
    "too few labels": (
        lambda s: s | {"y": s["y"][:5]},
        "as many examples in y as in x, .*got 5 and 10",
    ),
    "labels as floats": (lambda s: s | {"y": 1.0 * s["y"]}, "expected integer y, got float64"),
    "images as bytes": (
        lambda s: s | {"x": np.uint8(s["x"])},
        "expected floating-point x, got uint8",
    ),
    "objects": (lambda s: s | {"x": np.array([{}])}, "numeric arrays"),
}


@pytest.mark.parametrize("spoil, message", BAD_SUPPORT.values(), ids=BAD_SUPPORT)
def test_bad_support(whole, support, tmp_path, spoil, message):
    np.savez(tmp_path / "support.npz", **spoil(support))
    weights = tmp_path / "weights.safetensors"
    code, out, err = lohp(
        *("generate", "--out", whole[0], "--weights", weights),
        *("--support", tmp_path / "support.npz"),
    )
    assert code == 2 and not out and re.search(message, err)
    assert len(err.splitlines()) == 1 and not weights.exists()


def test_support_that_is_no_npz(whole, support, tmp_path):
    weights = tmp_path / "weights.safetensors"
    np.save(tmp_path / "array.npy", support["x"])
    np.savez(tmp_path / "cut.npz", **support)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:-40])
    for name, expected_code, message in (
        ("array.npy", 2, "expected an .npz file"),
        ("cut.npz", 2, "expected an .npz file"),
        ("none.npz", 1, "No such file"),
    ):
        code, _, err = lohp(
            *("generate", "--out", whole[0], "--weights", weights, "--support", tmp_path / name)
        )
        assert code == expected_code and message in err and name in err
    assert not weights.exists()


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--num-samples", 0, "num_samples must be at least 1, got 0"),
        ("--temperature", -1, "temperature must be finite and not negative, got -1"),
        ("--temperature", "nan", "temperature must be finite"),
    ],
)
def test_bad_options_of_generate(whole, tmp_path, option, value, message):
    code, _, err = lohp("generate", "--out", whole[0], "--weights", tmp_path / "w", option, value)
    assert code == 2 and message in err and not (tmp_path / "w").exists()


def test_generate_from_a_method_that_is_not_trained(whole, tmp_path):
    code, _, err = lohp(
        *("generate", "--out", whole[0], "--weights", tmp_path / "w", "--method", "cloning")
    )
    assert code == 1 and "no complete checkpoint" in err and "lohp train" in err


META = [
    *("--updates", 6, "--pairs", 2, "--log-every", 2, "--checkpoint-every", 4),
    *("--probe-every", 4, "--families", "prototypes"),
]


@pytest.fixture
def quick_meta(monkeypatch):
    """Meta-training on a stand-in that compiles at once, against made-up scores."""

    def start(meta, key, portion):
        return jax.random.normal(key)

    def advance(meta, state, key, step_key):
        return state, (state + meta["log_peak"]) ** 2, jax.numpy.array(False)

    def score(settings, keys, num_steps):
        values = np.full((len(jax.tree.leaves(settings)[0]), len(keys)), 0.25)
        return dict.fromkeys(("mean_loss", "final_loss", "query_loss", "accuracy"), values)

    monkeypatch.setattr(meta, "make_unrolls", lambda config: (Unroll(start, advance),))
    monkeypatch.setattr(meta_runs, "make_trainer", lambda *args, **kwargs: score)


def test_meta_train_leaves_what_it_promises(quick_meta, tmp_path):
    directory = tmp_path / "run"
    code, out, err = lohp("meta-train", "--out", directory, *META)
    assert code == 0, err
    assert {path.name for path in directory.iterdir()} == {
        *("config.json", "adam.json", "metrics.jsonl", "results.json", "checkpoints"),
        "theta.msgpack",
    }
    assert "prototypes" in out and "0.25 / 0.25" in out
    assert f"theta: {directory / 'theta.msgpack'}\npeak: 0.0" in out and "loss" in err
    results = read_results(directory)
    assert results["schema"] == 1 and results["config"]["updates"] == 6
    assert {row["method"] for row in results["rows"]} == {"small", "adam_best"}
    assert [probe["step"] for probe in results["probes"]] == [4, 6]
    assert results["curve"] == metrics.read_lines(directory / "metrics.jsonl", "meta")
    trained = checkpoint.latest_step(directory / "checkpoints" / "meta")
    assert trained == 6 and results["rate"]["peak"] > 0
    assert load_theta(directory / "theta.msgpack").keys() == {"ff_mod_stack"}


def test_interrupted_meta_training_is_resumed(quick_meta, tmp_path, monkeypatch):
    whole, directory = tmp_path / "whole", tmp_path / "run"
    assert lohp("meta-train", "--out", whole, *META)[0] == 0
    with monkeypatch.context() as patch:
        stop_training_at(patch, 4)
        code, out, err = lohp("meta-train", "--out", directory, *META)
    assert code == 1 and not out and "interrupted" in err and "--resume" in err
    code, _, err = lohp("meta-train", "--out", directory, *META)
    assert code == 2 and "continue it with --resume" in err
    code, _, err = lohp("meta-train", "--out", directory, "--resume", *META, "--sigma", 0.5)
    assert code == 2 and "sigma is 0.02 there and 0.5 here" in err
    code, out, err = lohp("meta-train", "--out", directory, "--resume", "--json")
    assert code == 0, err
    theta = "theta.msgpack"
    assert (directory / theta).read_bytes() == (whole / theta).read_bytes()
    assert json.loads(out)["rows"] == read_results(whole)["rows"]


@pytest.mark.slow
def test_meta_training_interrupted_in_its_last_comparison_is_resumed(
    quick_meta, tmp_path, monkeypatch
):
    def interrupt(path, values):
        if values["method"] == "probe" and values["step"] == 6:
            raise KeyboardInterrupt
        return actual(path, values)

    actual = metrics.append_line
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "append_line", interrupt)
        code, _, err = lohp("meta-train", "--out", tmp_path, *META)
    assert code == 1 and "interrupted" in err and not (tmp_path / "results.json").exists()
    code, _, err = lohp("meta-train", "--out", tmp_path, "--resume")
    assert code == 0, err
    assert [probe["step"] for probe in read_results(tmp_path)["probes"]] == [4, 6]


def test_full_disk_while_writing_theta(quick_meta, tmp_path, monkeypatch):
    fill_disk(monkeypatch, "theta.msgpack")
    code, out, err = lohp("meta-train", "--out", tmp_path / "run", *META)
    assert code == 1 and not out and "No space left on device" in err and "theta" in err
    assert meta_runs.trained_meta_updates(tmp_path / "run") == 6


@pytest.mark.slow
def test_meta_train_of_real_tasks(tmp_path):
    code, out, err = lohp(
        *("meta-train", "--out", tmp_path / "run", "--json", "--families", "teacher"),
        *("--updates", 2, "--pairs", 2, "--truncation", 5, "--shortest", 5, "--longest", 20),
        *("--log-every", 1, "--checkpoint-every", 2, "--probe-every", 2),
        *("--probe-tasks", 2, "--probe-steps", 50),
    )
    assert code == 0, err
    learned, adam = json.loads(out)["rows"]
    assert 0 < learned["mean_loss"] < 2 and 0 < adam["mean_loss"] < 2
    assert load_theta(tmp_path / "run" / "theta.msgpack")


def test_tasks():
    code, out, _ = lohp("tasks")
    assert code == 0 and all(f"{name}\n" in out for name in FAMILIES)
    code, out, err = lohp("tasks", "--json")
    assert code == 0 and not err and json.loads(out).keys() == FAMILIES.keys()


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help(command):
    code, out, err = lohp(*command.split(), "--help")
    assert code == 0 and not err and "usage: lohp" in out
    if command in ("run", "prepare"):
        words = " ".join(re.sub(r"[│|]", " ", out).split())
        assert "(default: digits_5way)" in words and "--training.learning-rate" in out
        assert "(default: 0.003)" in words
    elif command:
        assert "(default: " in out
    else:
        assert all(name in out for name in cli.COMMANDS)


@pytest.mark.parametrize("command", ["train", "generate"])
def test_the_help_names_the_methods(command):
    _, out, _ = lohp(command, "--help")
    assert all(method in out for method in METHODS)


def test_reader_that_leaves_early():
    code = "import sys; from lohp_jax.cli import main; sys.exit(main(['run', '--help']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 1


def test_only_the_command_line_prints():
    for path in (ROOT / "lohp_jax").rglob("*.py"):
        if "cli" in path.relative_to(ROOT).parts:
            continue
        tree = ast.parse(path.read_text())
        printed = [
            node.lineno
            for node in ast.walk(tree)
            if isinstance(node, ast.Name) and node.id == "print"
        ]
        assert not printed, f"{path} prints in lines {printed}"


def test_newest_checkpoint_carries_the_config(whole):
    folder = whole[0] / "checkpoints" / "lohp"
    assert checkpoint.all_steps(folder) == [4, 6]
    saved = checkpoint.read_config(folder)
    assert from_json(saved["run"]) == open_run(whole[0])
    assert saved["family"] == json.loads((whole[0] / "config.json").read_text())["description"]
    assert saved["method"]["name"] == "lohp" and saved["teachers"] == ["sgd", "adam"]
