import json

import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.training import metrics


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def write(path, *lines):
    for method, step in lines:
        metrics.append_line(path, {"method": method, "step": step, "loss": 0.5 * step})


def steps(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["method"], line["step"]) for line in lines]


def test_a_line_holds_plain_numbers(path):
    values = {
        "method": "lohp",
        "step": 3,
        "frozen": False,
        "none": None,
        "loss": np.float32(0.1),
        "device": jnp.float32(2),
        "vector": np.array([1.0, np.nan, np.inf], np.float32),
        "nan": float("nan"),
    }
    returned = metrics.append_line(path, values)
    expected = values | {
        "loss": float(np.float32(0.1)),
        "device": 2.0,
        "vector": [1.0, None, None],
        "nan": None,
    }
    assert json.loads(path.read_text()) == returned == expected
    assert path.read_text().endswith("}\n")


def test_lines_are_appended_and_read_by_method(path):
    assert metrics.read_lines(path, "lohp") == []
    write(path, ("lohp", 2), ("cloning", 2), ("lohp", 4))
    assert steps(path) == [("lohp", 2), ("cloning", 2), ("lohp", 4)]
    assert [line["step"] for line in metrics.read_lines(path, "lohp")] == [2, 4]


@pytest.mark.parametrize(
    "step, kept",
    [(0, [("b", 2)]), (3, [("a", 2), ("b", 2)]), (4, [("a", 2), ("b", 2), ("a", 4)])],
)
def test_lines_beyond_a_checkpoint_are_dropped(path, step, kept):
    write(path, ("a", 2), ("b", 2), ("a", 4))
    metrics.drop_lines_after(path, "a", step)
    assert steps(path) == kept
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("broken", [b'{"method": "a", "st', b"[1]\n", b"\xff\xfe\n", b"\n"])
def test_what_a_killed_writer_left_is_dropped(path, broken):
    write(path, ("a", 2))
    with path.open("ab") as file:
        file.write(broken)
    metrics.drop_lines_after(path, "b", 0)
    write(path, ("b", 1))
    assert steps(path) == [("a", 2), ("b", 1)]


def test_nothing_is_dropped_where_there_is_no_file(path):
    metrics.drop_lines_after(path, "a", 0)
    assert not path.exists()


@pytest.mark.parametrize(
    "loss, progress, cosine, frozen",
    [
        (0.5, 0.05, 1.0, True),
        (0.5, 0.5, 1.0, False),
        (0.5, 0.5, 0.1, True),  # noise alone: far, but not along
        (2.0, 0.05, 1.0, False),
        (1.0, 0.05, 1.0, False),
    ],
)
def test_frozen_is_a_loss_that_falls_while_nothing_moves(loss, progress, cosine, frozen):
    history = [{"loss": 1.0, "progress": 0.5}, {"loss": 3.0, "progress": 0.5}]
    means = {"loss": loss, "progress": progress, "cosine": cosine}
    means = {name: np.float32(value) for name, value in means.items()}
    assert metrics.freeze_alarm(means, history) == {"frozen": frozen}
    assert metrics.freeze_alarm(means, []) == {"frozen": False}


def test_methods_without_a_roll_out_have_no_alarm():
    assert metrics.freeze_alarm({"loss": 0.5}, [{"loss": 1.0}]) == {}
