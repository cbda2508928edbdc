"""`lohp run` on the family of domains, which has ERM among its baselines."""

import contextlib
import io
import json

import pytest

from lohp_jax import cli

SIZES = [
    *("--prepare.num-tasks", "6", "--prepare.num-steps", "4", "--network.trunk", "mlp"),
    *("--network.widths", "8", "--network.embedding", "8", "--training.compression", "2"),
    *("--training.updates", "4", "--training.batch-size", "2", "--training.log-every", "2"),
    *("--training.checkpoint-every", "2", "--evaluation.num-tasks", "4"),
]
ASKED = ["--family", "domains", "--tasks.network", "linear", "--methods", "cloning"]


def lohp(*arguments):
    """Exit code and standard error of a command run in this process."""
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        code = cli.main([str(argument) for argument in arguments])
    return code, " ".join(err.getvalue().split())


@pytest.mark.slow
def test_a_run_leaves_one_domain_out_and_has_erm_beside_it(tmp_path):
    code, err = lohp("run", *ASKED, *SIZES, "--tasks.domain", "45", "--out", tmp_path / "run")
    assert code == 0, err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["config"]["tasks"]["domain"] == "45"
    rows = {row["method"]: row for row in results["rows"]}
    expected = ["teacher_adam", "same_support_adam", "erm", "nearest_task", "ridge", "cloning"]
    assert list(rows) == expected
    assert rows["erm"]["kind"] == "baseline" and rows["erm"]["gradients"] == 0
    assert rows["erm"]["accuracy_std"] == 0  # one network for one domain, whatever the support
    assert rows["erm"]["accuracy"] > 0.1
    assert results["erm"].keys() == {"learning_rate", "weight_decay"}


def test_a_domain_that_is_not_there_is_named(tmp_path):
    code, err = lohp("run", *ASKED, "--tasks.domain", "44", "--out", tmp_path / "run")
    assert code == 2 and "got '44'; did you mean '45'?" in err
    assert not (tmp_path / "run").exists()
