"""`lohp run` on a family and a method of the user's own, both in a file, and what may go wrong there."""

import contextlib
import io
import json
import pathlib
import re
import shutil
import textwrap

import jax
import numpy as np
import pytest
import safetensors.numpy

import lohp_jax as lj
from lohp_jax import cli
from lohp_jax.runs import baselines
from lohp_jax.training import checkpoint
from lohp_jax.trajectories import store as stores

MINE = """
    import jax
    import jax.numpy as jnp
    import lohp_jax as lj

    UNITS = 4


    def init(key):
        w, out = jax.random.normal(key, (2, UNITS))
        return {"w": w[None], "b": jnp.zeros(UNITS), "out": 0.1 * out[:, None]}


    def apply(params, x):
        return jnp.tanh(x @ params["w"] + params["b"][None]) @ params["out"]


    family = lj.sine_regression(init, apply, shots=4, num_train=8, num_query=8)
    not_a_family = 3


    def start(key, example):
        return {"end": jnp.zeros(example.tokens.shape[1:])}


    def loss(params, example, key):
        return jnp.mean((params["end"] - example.tokens[-1]) ** 2), {}


    def walk(params, context, key, *, temperature=0.0, num_steps=None, guidance=0.0):
        return jnp.stack([jnp.zeros_like(params["end"]), params["end"]])


    mean_end = lj.Method("mean_end", start, loss, walk)
"""
SIZES = [
    *("--prepare.num-tasks", "6", "--prepare.num-steps", "4", "--network.trunk", "mlp"),
    *("--network.widths", "8", "--network.embedding", "8", "--training.compression", "2"),
    *("--training.updates", "4", "--training.batch-size", "2", "--training.log-every", "2"),
    *("--training.checkpoint-every", "2", "--evaluation.num-tasks", "4"),
]
ASKED = ["--family", "mine.py:family", *SIZES]


def lohp(*arguments):
    """Exit code, standard output and standard error of a command run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(argument) for argument in arguments])
    return code, out.getvalue(), " ".join(err.getvalue().split())


def contents(directory):
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def write(path, text):
    path.write_text(textwrap.dedent(text))


def read_results(directory):
    return json.loads((directory / "results.json").read_text())


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory, with a family in a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "500")
    write(tmp_path / "mine.py", MINE)
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Directory of a run of it with a method of ours and one of the user's, and what it said."""
    folder = tmp_path_factory.mktemp("whole")
    write(folder / "mine.py", MINE)
    with contextlib.chdir(folder):
        said = lohp("run", *ASKED, "--methods", "lohp", "mine.py:mean_end", "--out", "run")
    return folder / "run", said


@pytest.fixture
def copied(whole, folder):
    shutil.copytree(whole[0], folder / "run")
    return folder / "run"


def test_both_are_trained_compared_and_reported(whole):
    directory, (code, out, err) = whole
    assert code == 0, err
    results = read_results(directory)
    assert results["family"] == "mine.py:family" and results["measure"] == "objective"
    assert results["main"] == "lohp"
    assert [row["method"] for row in results["rows"]] == [
        *("teacher_adam", "same_support_adam", "same_support_adamw"),
        *("mean_weights", "nearest_task", "ridge", "lohp", "mean_end"),
    ]
    for row in results["rows"]:
        assert "accuracy" not in row
        assert 0 < row["objective_min"] <= row["objective"] <= row["objective_max"]
    assert results["honesty"].keys() >= {"lohp", "mean_end"}
    page = (directory / "report.html").read_text()
    assert "mean_end" in page and "teacher_adam" in page
    assert "objective" in out and "mean_end" in out and "train mean_end" in err
    assert checkpoint.all_steps(directory / "checkpoints" / "mean_end") == [2, 4]


def test_the_run_knows_where_the_family_and_the_method_come_from(copied):
    config = json.loads((copied / "config.json").read_text())
    assert config["family"] == "mine.py:family" and config["methods"] == [
        "lohp",
        "mine.py:mean_end",
    ]
    assert config["description"]["params"]["['w']"] == "float32[1,4]"
    family = lj.load(copied).family
    assert family == "sine"
    generator = lj.load(copied, "mean_end")
    assert generator.params["end"].shape[1] == 16
    assert generator.config["run"]["family"] == "mine.py:family"
    ends = lj.open_store(copied / "trajectories").load()["states"]
    assert ends["w"].shape == (6, 5, 1, 4)


@pytest.mark.parametrize("method", ["mean_end", "mine.py:mean_end"])
def test_a_method_of_ones_own_generates_by_its_name(copied, method):
    options = ("--method", method, "--weights", "w.safetensors", "--json")
    code, out, err = lohp("generate", "--out", copied, *options)
    assert code == 0, err
    assert json.loads(out)["objective"][0] > 0
    assert safetensors.numpy.load_file("w.safetensors")["w"].shape == (1, 1, 4)


@pytest.mark.slow
def test_the_first_method_may_be_ones_own(folder):
    code, out, err = lohp("run", *ASKED, "--methods", "mine.py:mean_end", "--out", "run", "--json")
    assert code == 0, err
    assert json.loads(out)["main"] == "mean_end"
    assert (folder / "run" / "report.html").exists()


def test_a_changed_file_is_refused_and_nothing_is_lost(copied, folder):
    write(folder / "mine.py", MINE.replace("UNITS = 4", "UNITS = 5"))
    before = contents(copied)
    for command in (
        ("evaluate", "--out", copied),
        ("train", "--out", copied, "--resume"),
        ("run", *ASKED, "--methods", "lohp", "mine.py:mean_end", "--out", copied, "--resume"),
        ("generate", "--out", copied, "--weights", "w"),
    ):
        code, out, err = lohp(*command)
        assert code in (1, 2) and not out
        assert (
            "run of another family: params['b'] is 'float32[4]' there and 'float32[5]' here" in err
        )
    with pytest.raises(ValueError, match=r"holds a run of another family: params\['b'\]"):
        lj.load(copied)
    assert contents(copied) == before and not (folder / "w").exists()


def test_a_file_that_is_gone_is_named_and_the_family_can_be_given(copied, folder):
    context = {"x": np.zeros((4, 1), np.float32), "y": np.ones((4, 1), np.float32)}
    before = lj.generate(lj.load(copied), context, jax.random.key(0))
    family = lj_family(folder)
    (folder / "mine.py").unlink()
    code, _, err = lohp("evaluate", "--out", copied)
    assert code == 1 and "there is no file 'mine.py' in" in err
    with pytest.raises(ValueError, match=r"there is no file 'mine\.py' in"):
        lj.load(copied)
    after = lj.generate(lj.load(copied, family=family), context, jax.random.key(0))
    np.testing.assert_array_equal(after["w"], before["w"])
    with pytest.raises(ValueError, match="holds a run of another family"):
        lj.load(copied, family=lj.sine_regression())


def lj_family(folder):
    found = {}
    exec(compile((folder / "mine.py").read_text(), "mine.py", "exec"), found)
    return found["family"]


def test_a_directory_of_another_family_is_refused(copied, folder):
    before = contents(copied)
    write(folder / "other.py", MINE)
    for family in ("other.py:family", "digits_5way"):
        code, out, err = lohp("run", "--family", family, *SIZES, "--out", copied, "--resume")
        assert code == 2 and not out
        assert f"family is 'mine.py:family' there and '{family}' here" in err
    assert contents(copied) == before


@pytest.mark.parametrize(
    "family, message",
    [
        ("broken.py:family", r"importing '.*broken.py' failed, ZeroDivisionError: .*line 2"),
        ("gone.py:family", "there is no file 'gone.py' in"),
        ("mine.py:famly", "has no attribute 'famly'; did you mean 'family'"),
        ("mine.py:not_a_family", "to be a TaskFamily, .* got int 3"),
        ("mine.py:mean_end", "to be a TaskFamily, .* got Method"),
        ("mine.py:start", "a function that needs arguments"),
        ("nowhere.mine:family", "there is no module 'nowhere'"),
        ("misfit.py:family", r"loss\(params, data, key\) must return one floating-point scalar"),
    ],
)
def test_a_family_that_cannot_be_used_leaves_nothing(folder, family, message):
    write(folder / "broken.py", "x = 1\ny = x / 0\n")
    misfit = "family = dataclasses.replace(family, loss=lambda params, data, key: data['x'])\n"
    write(folder / "misfit.py", "import dataclasses\n" + textwrap.dedent(MINE) + misfit)
    code, out, err = lohp("run", "--family", family, *SIZES, "--out", "run")
    assert code == 2 and not out and "Traceback" not in err
    assert re.search(message, err), err
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    "method, message",
    [
        ("mine.py:family", "to be a Method, .* got TaskFamily"),
        ("mine.py:mean_ed", "has no attribute 'mean_ed'; did you mean 'mean_end'"),
    ],
)
def test_a_method_that_is_none_leaves_nothing(folder, method, message):
    code, out, err = lohp("run", *ASKED, "--methods", "lohp", method, "--out", "run")
    assert code == 2 and not out
    assert re.search(message, err), err
    assert not (folder / "run").exists()


def test_settings_of_the_tables_families_are_refused(folder):
    code, _, err = lohp("run", *ASKED, "--tasks.shots", 5, "--out", "run")
    assert code == 2 and "tasks.* are settings of the families that `lohp tasks` lists" in err
    assert not (folder / "run").exists()


def test_a_teacher_that_diverges_on_every_task_loses_nothing(folder):
    teachers = ("--prepare.optimizers", "adam:0.01", "sgd:1e30")
    code, out, err = lohp("prepare", *ASKED, *teachers, "--out", "run")
    assert code == 1 and not out
    assert "all 6 runs of teacher 'sgd' diverged; lower its learning rate" in err
    kept = stores.open_store(folder / "run" / "trajectories")
    assert len(kept) == 6 and kept.num_dropped == 6
    code, _, err = lohp("prepare", "--out", "run", "--resume")
    assert code == 1 and "all 6 runs of teacher 'sgd' diverged" in err


BAD_CONTEXTS = {
    "another structure": ({"a": np.zeros((4, 1)), "b": np.zeros((4, 1))}, "arrays x, y, got"),
    "another shape": ({"x": np.zeros((4, 2)), "y": np.zeros((4, 1))}, r"x of shape \[n, 1\]"),
    "another number": ({"x": np.zeros((4, 1)), "y": np.zeros((3, 1))}, "as many examples in y"),
    "no axis": ({"x": np.zeros((4, 1)), "y": np.zeros(4)}, r"y of shape \[n, 1\], got \[4\]"),
    "integers": ({"x": np.zeros((4, 1)), "y": np.zeros((4, 1), int)}, "floating-point y"),
    "infinite": ({"x": np.full((4, 1), np.inf), "y": np.zeros((4, 1))}, "finite numbers in x"),
}


@pytest.mark.parametrize("context, message", BAD_CONTEXTS.values(), ids=BAD_CONTEXTS)
def test_a_context_that_does_not_fit_is_refused(copied, folder, context, message):
    np.savez("context.npz", **context)
    options = ("--method", "mean_end", "--support", "context.npz", "--weights", "w")
    code, out, err = lohp("generate", "--out", copied, *options)
    assert code == 2 and not out
    assert re.search(message, err), err
    assert not (folder / "w").exists()


def test_a_store_is_opened_and_hashed_once_a_command(copied, monkeypatch):
    opened, hashed = [], []
    read_header, digest = stores._read_header, stores._digest
    monkeypatch.setattr(stores, "_read_header", lambda d: (opened.append(d), read_header(d))[1])
    monkeypatch.setattr(stores, "_digest", lambda file: (hashed.append(file), digest(file))[1])
    (copied / "results.json").unlink()
    code, _, err = lohp("run", "--out", copied, "--resume")
    assert code == 0, err
    assert opened == [pathlib.Path(copied / "trajectories")]
    assert sorted(hashed) == sorted((copied / "trajectories").rglob("*.npy"))


TEACHERS = ("--prepare.optimizers", "hub:0.05", "sam:0.01", "adam:0.1")


@pytest.mark.slow
def test_hub_sam_and_adam_teach_and_a_resumed_run_has_the_same_bits(folder, monkeypatch):
    asked = (*ASKED, *TEACHERS, "--methods", "lohp")
    code, out, err = lohp("run", *asked, "--out", "run", "--json")
    assert code == 0, err
    rows = {row["method"]: row for row in json.loads(out)["rows"]}
    gradients = {name: rows[f"teacher_{name}"]["gradients"] for name in ("hub", "sam", "adam")}
    assert gradients == {"hub": 4, "sam": 8, "adam": 4}

    def interrupt(self, name, *args, **kwargs):
        if name.startswith("01"):
            raise KeyboardInterrupt
        return actual(self, name, *args, **kwargs)

    actual = stores.Store.write
    with monkeypatch.context() as patch:
        patch.setattr(stores.Store, "write", interrupt)
        code, _, err = lohp("run", *asked, "--out", "cut")
    assert code == 1 and "interrupted" in err
    assert len(stores.open_store(folder / "cut" / "trajectories")) == 6
    code, _, err = lohp("run", "--out", "cut", "--resume")
    assert code == 0, err
    for part in ("trajectories", "figures.json"):
        whole, cut = (folder / name / part for name in ("run", "cut"))
        if whole.is_dir():
            assert contents(whole) == contents(cut)
        else:
            assert whole.read_bytes() == cut.read_bytes()
    for a, b in zip(
        *(jax.tree.leaves(lj.load(folder / n).params) for n in ("run", "cut")), strict=True
    ):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# --- windows


WINDOWED = [*("unet" if word == "mlp" else word for word in ASKED), "--prepare.record-every", "2"]
"""Weights in three tokens, of which every other state is stored."""


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """Directory of a run in windows of one token, and what it said."""
    folder = tmp_path_factory.mktemp("windowed")
    write(folder / "mine.py", MINE)
    with contextlib.chdir(folder):
        said = lohp("run", *WINDOWED, "--network.window", "1", "--out", "run")
    return folder / "run", said


def test_a_run_in_windows_trains_what_windows_can_and_compares_it(windowed):
    directory, (code, _, err) = windowed
    assert code == 0, err
    learned = ["lohp", "cloning", "hypernetwork_regression"]
    results = read_results(directory)
    assert [row["method"] for row in results["rows"]] == [
        *("teacher_adam", "same_support_adam", "same_support_adamw"),
        *("mean_weights", "nearest_task", "ridge"),
        *learned,
    ]
    assert results["config"]["methods"] == learned
    assert results["honesty"]["lohp"]["nearest_training_distance"] >= 0
    assert (directory / "report.html").exists() and "left_out" not in results


def test_a_generator_of_a_run_in_windows_is_loaded_and_streamed(windowed, folder):
    shutil.copytree(windowed[0], folder / "run")
    generator = lj.load(folder / "run")
    x = np.linspace(-1, 1, 4, dtype=np.float32)[:, None]
    lj.stream_weights(generator, {"x": x, "y": x}, jax.random.key(0), folder / "w")
    weights = lj.generate(generator, {"x": x, "y": x}, jax.random.key(0))
    streamed = safetensors.numpy.load_file(folder / "w")
    assert streamed.keys() == weights.keys()
    for name, leaf in streamed.items():
        np.testing.assert_allclose(leaf, weights[name][0], rtol=1e-6, atol=1e-6)


def test_baselines_of_large_networks_are_left_out_with_a_reason(windowed, folder, monkeypatch):
    shutil.copytree(windowed[0], folder / "run")
    monkeypatch.setattr(baselines, "_MOST_NUMBERS", 1)
    code, _, err = lohp("evaluate", "--out", "run")
    assert code == 0, err
    results = read_results(folder / "run")
    reason = "their end weights are more than 1 numbers"
    names = ("mean_weights", "nearest_task", "ridge")
    assert results["left_out"] == dict.fromkeys(names, reason)
    assert "ridge" not in [row["method"] for row in results["rows"]]
    assert "nearest_training_distance" not in results["honesty"]["lohp"]
    assert lohp("report", "--out", "run")[0] == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--network.window", "4"], "window must be between 1 and 3 tokens of 16 .*got 4"),
        (["--network.window", "0"], "window must be a positive multiple of 1, .*got 0"),
        (
            ["--network.window", "1", "--methods", "paper_literal"],
            "paper_literal: network.window must be None, got 1: residuals that are summed",
        ),
    ],
)
def test_a_run_with_a_bad_window_makes_no_directory(folder, arguments, message):
    code, _, err = lohp("run", *WINDOWED, *arguments, "--out", "run")
    assert code in (1, 2) and re.search(message, err), err
    assert not (folder / "run").exists()
