"""`lohp solve`: a run directory holds what it promises, and the numbers are those of its solutions."""

import dataclasses
import json
import xml.etree.ElementTree as ElementTree

import jax
import numpy as np
import pytest

from lohp_jax import cli, solve_runs
from lohp_jax.diffusion.config import DiffusionConfig
from lohp_jax.diffusion.denoiser import DenoiserConfig
from lohp_jax.generation import generate
from lohp_jax.tasks import make_problem

TINY = solve_runs.SolveConfig(
    family="lasso_5x10",
    num_problems=6,
    num_samples=3,
    refine_steps=4,
    diffusion=DiffusionConfig(
        network=DenoiserConfig(kind="lasso", width=8, depth=1),
        pool=8,
        batch_size=4,
        updates=2,
        log_every=2,
        num_steps=2,
    ),
)
FLAGS = (
    *("--family", "lasso_5x10", "--num-problems", "6", "--num-samples", "3", "--refine-steps", "4"),
    *("--diffusion.network.width", "8", "--diffusion.network.depth", "1", "--diffusion.pool", "8"),
    *("--diffusion.batch-size", "4", "--diffusion.updates", "2", "--diffusion.log-every", "2"),
    *("--diffusion.num-steps", "2"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("solve") / "run"
    solve_runs.open_solve_run(directory, TINY)
    return directory, solve_runs.solve_run(directory, TINY)


def test_the_directory_holds_what_is_promised(run):
    directory, results = run
    assert json.loads((directory / "results.json").read_text()) == json.loads(json.dumps(results))
    assert solve_runs.read_solve_config(directory) == TINY
    for name in ("convergence", "guidance"):
        assert ElementTree.parse(directory / f"{name}.svg").getroot().tag.endswith("svg")
    assert [row["method"] for row in results["rows"]] == [
        "diffusion",
        "diffusion_refined",
        "multistart",
        "baseline",
    ]


def test_the_values_are_those_of_the_solutions(run):
    directory, results = run
    found = np.load(directory / "solutions.npz")
    family = make_problem("lasso_5x10")
    problem_key = jax.random.split(jax.random.fold_in(jax.random.key(0), 1))[0]
    problems = jax.vmap(lambda key: family.sample(key, "held_out"))(
        jax.random.split(problem_key, 6)
    )
    values = jax.vmap(family.objective)(found["x"], problems)
    np.testing.assert_allclose(found["value"], values, rtol=1e-5)
    gaps = (found["value"] - found["reference"]) / np.abs(found["reference"])
    row = next(row for row in results["rows"] if row["method"] == "diffusion_refined")
    assert row["gap_mean"] == pytest.approx(gaps.mean(), rel=1e-4, abs=1e-6)
    assert row["success"] == np.mean(gaps < 0.01)


def test_refined_is_never_worse_than_the_baseline(run):
    gaps = {row["method"]: row["gap_mean"] for row in run[1]["rows"]}
    assert gaps["diffusion_refined"] <= gaps["baseline"] + 1e-6
    assert gaps["diffusion_refined"] <= gaps["diffusion"] + 1e-6


def test_calls_are_counted(run):
    """Three samples of two steps, a round of products each; four steps of refinement from each start."""
    rows = {row["method"]: row for row in run[1]["rows"]}
    assert rows["diffusion"]["network_calls"] == 3 * 2
    assert rows["baseline"]["gradient_calls"] == 4
    assert rows["multistart"]["gradient_calls"] == 3 * 4
    more = rows["diffusion_refined"]["gradient_calls"] - rows["diffusion"]["gradient_calls"]
    assert more == (3 + 1) * 4


def test_the_generator_loads_and_knows_its_family(run, tmp_path):
    generator = solve_runs.load_solver(run[0])
    assert generator.family == "lasso_5x10" and generator.config == TINY.diffusion
    other = make_problem("rastrigin_2").sample(jax.random.key(0))
    with pytest.raises(ValueError, match=r"lasso: expected .*\['A', 'b', 'penalty'\], got"):
        generate(generator, other, jax.random.key(0))
    with pytest.raises(FileNotFoundError, match=r"expected a trained generator .*`lohp solve"):
        solve_runs.load_solver(tmp_path)


@pytest.mark.slow
def test_a_second_run_loads_the_generator(run, monkeypatch):
    directory, results = run
    monkeypatch.setattr(solve_runs, "train_diffusion", None)
    again = solve_runs.solve_run(directory, TINY)
    kept = ("method", "gap_mean", "gap_median", "success", "network_calls", "gradient_calls")
    for one, other in zip(results["rows"], again["rows"], strict=True):
        assert {name: one[name] for name in kept} == {name: other[name] for name in kept}


@pytest.mark.slow
def test_an_interrupted_training_goes_on(tmp_path):
    """With the same bits, both when it is interrupted in the warm start and after it."""
    stop_at = [("warm_start", 1), ("diffusion", 1)]
    config = dataclasses.replace(
        TINY, diffusion=dataclasses.replace(TINY.diffusion, log_every=1, warm_start=True)
    )
    whole = solve_runs.trained_generator(tmp_path / "whole", config)

    def interrupt(progress):
        if (progress.method, progress.step) in stop_at:
            stop_at.remove((progress.method, progress.step))
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            solve_runs.trained_generator(tmp_path / "parts", config, interrupt)
    parts = solve_runs.trained_generator(tmp_path / "parts", config, interrupt)
    jax.tree.map(np.testing.assert_array_equal, parts.params, whole.params)
    lines = [
        [(line["method"], line["step"]) for line in map(json.loads, path.open())]
        for path in (tmp_path / name / "metrics.jsonl" for name in ("whole", "parts"))
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 4


def test_another_config_is_refused(run):
    with pytest.raises(ValueError, match="refine_steps is 4 there and 5 here"):
        solve_runs.open_solve_run(run[0], dataclasses.replace(TINY, refine_steps=5))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"family": "laso"}, r"family must be one of .*did you mean 'lasso'\?"),
        ({"refiner": "newtn"}, r"refiner must be one of .*did you mean 'newton'\?"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"num_problems": 0}, "num_problems must be at least 1, got 0"),
        ({"refine_steps": -1}, "refine_steps must be 0 or more, got -1"),
        (
            {"training_family": "lasso"},
            "training_family must be 'lasso_fixed' or unset, got 'lasso'",
        ),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        solve_runs.SolveConfig(**options)


def test_another_family_is_refused_in_a_directory(run, capsys):
    """The checkpoint of one family is never used for another."""
    code, _, err = lohp(capsys, "solve", "--out", run[0], "--resume", "--family", "lasso_fixed")
    assert code == 2 and "lasso_5x10 there and lasso_fixed here" in err.replace("'", "")


@pytest.mark.slow
def test_a_lasso_trained_at_one_size_serves_another(tmp_path):
    config = dataclasses.replace(TINY, family="lasso", training_family="lasso_5x10")
    generator = solve_runs.trained_generator(tmp_path, config)
    problem = make_problem("lasso").sample(jax.random.key(0), "held_out")
    assert generator.family == "lasso"
    assert generate(generator, problem, jax.random.key(0)).shape == (1, 50)


def test_fista_needs_a_proximal_map():
    config = solve_runs.SolveConfig(family="rastrigin_2", refiner="fista")
    family = make_problem("rastrigin_2")
    with pytest.raises(ValueError, match="fista needs a proximal map, which rastrigin_2 lacks"):
        solve_runs.refiner_of(config, family, family.sample(jax.random.key(0)))


def test_gaps_by_their_definition():
    gaps = solve_runs.relative_gap(np.array([2.0, -1.9, 5.0]), np.array([1.0, -2.0, 4.0]))
    np.testing.assert_allclose(gaps, [1.0, 0.05, 0.25])
    found = solve_runs.gap_statistics(np.array([0.0, 0.005, 0.02, 0.03]))
    assert found["success"] == 0.5 and found["gap_median"] == 0.0125


def lohp(capsys, *arguments):
    code = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, " ".join(captured.err.split())


@pytest.mark.slow
def test_the_command_solves_problems_of_a_file(run, tmp_path, capsys):
    """With the generator of a run that is there."""
    rng = np.random.default_rng(0)
    problems = {"A": rng.normal(size=(2, 5, 10)), "b": rng.normal(size=(2, 5))}
    np.savez(tmp_path / "problems.npz", **{k: v.astype(np.float32) for k, v in problems.items()})
    code, out, err = lohp(
        capsys,
        *("solve", "--out", run[0], "--resume", *FLAGS),
        *("--problems", tmp_path / "problems.npz", "--json"),
    )
    assert code == 0, err
    assert [row["num_problems"] for row in json.loads(out)["rows"]] == [2] * 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--family", "rastrigni_2"), r"did you mean 'rastrigin_2'?"),
        ((*FLAGS, "--problems", "nowhere.npz"), "nowhere.npz"),
        ((*FLAGS, "--num-samples", "0"), "num_samples must be at least 1"),
    ],
)
def test_bad_usage(arguments, message, tmp_path, capsys):
    code, out, err = lohp(capsys, "solve", "--out", tmp_path / "run", *arguments)
    assert code in (1, 2) and not out and message in err
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_there_wants_resume(run, capsys):
    code, _, err = lohp(capsys, "solve", "--out", run[0], *FLAGS)
    assert code == 2 and "go on with --resume" in err
