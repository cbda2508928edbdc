"""`lohp solve`: a run directory holds what it promises, and the numbers are those of its solutions."""

import dataclasses
import json
import xml.etree.ElementTree as ElementTree

import jax
import numpy as np
import pytest

from lohp_jax import cli
from lohp_jax.cli.output import print_solutions
from lohp_jax.diffusion.config import DiffusionConfig
from lohp_jax.evaluation import solve_plots
from lohp_jax.generation import generate
from lohp_jax.networks.denoiser import DenoiserConfig
from lohp_jax.problems import make_problem
from lohp_jax.runs import solve as solve_runs
from lohp_jax.types import Generator

TINY = solve_runs.SolveConfig(
    family="ackley_2",
    num_problems=6,
    num_samples=3,
    refiner="adam",
    refine_steps=2,
    diffusion=DiffusionConfig(
        network=DenoiserConfig(width=4, depth=1),
        pool=4,
        batch_size=2,
        updates=2,
        log_every=2,
        num_steps=2,
    ),
)
LASSO = dataclasses.replace(
    TINY,
    family="lasso_5x10",
    refiner="auto",
    diffusion=dataclasses.replace(TINY.diffusion, network=DenoiserConfig("lasso", 4, 1)),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Directory, results, and what they were made from; results must be there before it is drawn."""
    directory, seen = tmp_path_factory.mktemp("solve") / "run", []
    rows_of, draw = solve_runs.rows_of, solve_plots.draw_solve_plots

    def rows(config, solutions, seconds):
        seen.append(solutions)
        return rows_of(config, solutions, seconds)

    def drawing(directory, *args, **options):
        assert (directory / "results.json").exists()
        return draw(directory, *args, **options)

    solve_runs.open_solve_run(directory, TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solve_runs, "rows_of", rows)
        patch.setattr(solve_plots, "draw_solve_plots", drawing)
        patch.setattr(solve_plots, "_SAMPLES", 250)
        results = solve_runs.solve_run(directory, TINY)
    return directory, results, jax.device_get(seen[0])


def read_strictly(path):
    """JSON has no NaN and no infinity."""
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def test_the_directory_holds_what_is_promised(run):
    directory, results, _ = run
    assert read_strictly(directory / "results.json") == json.loads(json.dumps(results))
    assert solve_runs.read_solve_config(directory) == TINY
    for name in ("convergence", "guidance", "distribution", "paths"):
        assert ElementTree.parse(directory / f"{name}.svg").getroot().tag.endswith("svg")
    assert "absolute gap" in (directory / "convergence.svg").read_text()
    assert [row["method"] for row in results["rows"]] == [
        "diffusion",
        "diffusion_refined",
        "multistart",
        "baseline",
    ]


def ackley(x, shift):
    z = np.float64(x) - np.float64(shift)
    valley = 20 * np.exp(-0.2 * np.sqrt(np.mean(z**2, axis=-1)))
    return 20 + np.e - valley - np.exp(np.mean(np.cos(2 * np.pi * z), axis=-1))


def test_gaps_of_a_family_of_minimum_zero_are_absolute(run):
    """The optimum is 0, so that nothing can be divided by it."""
    directory, results, _ = run
    found = np.load(directory / "solutions.npz")
    family = make_problem("ackley_2")
    problem_key = jax.random.split(jax.random.fold_in(jax.random.key(0), 1))[0]
    keys = jax.random.split(problem_key, 6)
    problems = jax.jit(jax.vmap(lambda key: family.sample(key, "held_out")))(keys)
    gaps = ackley(found["x"], problems["shift"])
    np.testing.assert_allclose(found["value"], gaps, rtol=1e-4)
    row = next(row for row in results["rows"] if row["method"] == "diffusion_refined")
    assert results["gap"] == "absolute"
    assert row["gap_mean"] == pytest.approx(gaps.mean(), rel=1e-4)
    assert row["success"] == np.mean(gaps < 0.01)


def test_refined_is_never_worse_on_any_problem(run):
    solutions = run[2]
    best = solutions.proposed.min(axis=1)
    assert (solutions.value <= solutions.baseline).all()
    assert (solutions.value <= best + 1e-5 * np.abs(best)).all()
    assert (solutions.value < np.minimum(best, solutions.baseline) - 1e-3).any()
    np.testing.assert_allclose(solutions.curves[:, 1, -1], solutions.multistart, rtol=1e-6)
    np.testing.assert_allclose(solutions.curves[:, 2, -1], solutions.baseline, rtol=1e-4)
    np.testing.assert_allclose(solutions.curves[:, 0, 0], best, rtol=1e-4)


def test_calls_are_counted(run):
    """Three samples of two steps; two steps of Adam from each start, and a look at each point."""
    rows = {row["method"]: row for row in run[1]["rows"]}
    calls = {
        method: tuple(row[f"{kind}_calls"] for kind in ("network", "objective", "gradient"))
        for method, row in rows.items()
    }
    assert calls == {
        "diffusion": (3 * 2, 3, 0),
        "diffusion_refined": (3 * 2, (3 + 1) * 3, (3 + 1) * 2),
        "multistart": (0, 3 * 3, 3 * 2),
        "baseline": (0, 3, 2),
    }


def fabricated(values, reference, steps=0, certified=True):
    """Solutions of two problems where all methods reach the same, with calls of their own."""
    values, stages = np.float32(values), ("refine", "multistart", "baseline")
    calls = {stage: np.full(2, 10.0**power) for power, stage in enumerate(stages)}
    return solve_runs.Solutions(
        proposals=None,
        proposed=values[:, None],
        x=None,
        value=values,
        baseline=values,
        multistart=values,
        curves=np.tile(values[:, None, None], (1, 3, steps + 1)),
        reference=np.float64(reference),
        certified=np.array([True, certified]),
        objective_calls=calls,
        gradient_calls={stage: 2 * count for stage, count in calls.items()},
    )


SECONDS = dict.fromkeys(("propose", "refine", "multistart", "baseline"), 1e-3)


def test_gaps_of_lasso_are_relative():
    rows = solve_runs.rows_of(LASSO, fabricated([3.0, 6.0], [2.0, 5.0]), SECONDS)
    assert [row["gap_mean"] for row in rows] == pytest.approx([(1 / 2 + 1 / 5) / 2] * 4)


def test_every_stage_counts_its_own_calls():
    """And a warm start is one evaluation of its network, with a round of products."""
    warm = dataclasses.replace(
        LASSO, diffusion=dataclasses.replace(LASSO.diffusion, warm_start=True)
    )
    cold, warm = (
        solve_runs.calls_of(config, fabricated([3.0, 6.0], [2.0, 5.0])) for config in (LASSO, warm)
    )
    assert [cold[stage][1:] for stage in ("refine", "multistart", "baseline")] == [
        (1, 2),
        (10, 20),
        (100, 200),
    ]
    prepared = 15 + 2
    assert cold["propose"] == (3 * 2, 0, 3 * 2 + prepared)
    assert warm["propose"] == (3 * 2 + 1, 0, 3 * 2 + prepared + 1 + prepared)


def test_values_that_are_not_finite_leave_the_results_valid():
    rows = solve_runs.rows_of(TINY, fabricated([0.001, np.nan], [0.0, 0.0]), SECONDS)
    for row in rows:
        assert row["gap_mean"] is None and row["gap_quartiles"][1] is None
        assert row["success"] == 0.5
    json.dumps(rows, allow_nan=False)


@pytest.mark.parametrize("steps", [0, 1])
def test_convergence_is_drawn_for_any_number_of_steps(steps):
    config = dataclasses.replace(LASSO, refine_steps=steps)
    solutions = fabricated([3.0, np.inf], [2.0, 5.0], steps)._replace(
        gradient_calls=dict.fromkeys(("refine", "multistart", "baseline"), np.full(2, steps))
    )
    curves = solve_runs.convergence(config, solutions, SECONDS)
    figure = solve_plots.draw_convergence(curves, "relative")
    assert figure.axes[0].get_ylabel() == "relative gap, median and quartiles"
    for line in figure.axes[0].lines:
        assert len(line.get_xdata()) == steps + 1 and (line.get_xdata() > 0).all()


def test_batches_shrink_with_what_they_hold():
    def batch(config):
        family = make_problem(config.family)
        shapes = jax.eval_shape(jax.vmap(family.sample), jax.random.split(jax.random.key(0), 2))
        return solve_runs.batch_size(config, family, shapes)

    digits = dataclasses.replace(solve_runs.preset("fit_mlp"), num_samples=32)
    assert batch(solve_runs.preset("ackley_2")) == 256
    assert 1 < batch(digits) < 64
    twice = batch(dataclasses.replace(digits, num_samples=64))
    assert twice == batch(digits) // 2
    assert batch(dataclasses.replace(digits, refine_steps=200)) < twice
    assert batch(dataclasses.replace(digits, num_samples=10**6)) == 1


def test_the_generator_loads_and_knows_its_family(run, tmp_path):
    generator = solve_runs.load_solver(run[0])
    assert generator.family == "ackley_2" and generator.config == TINY.diffusion
    other = make_problem("lasso_5x10").sample(jax.random.key(0))
    with pytest.raises(ValueError, match=r"ackley: expected .*\['shift', 'x0'\], got"):
        generate(generator, other, jax.random.key(0))
    with pytest.raises(FileNotFoundError, match=r"expected a trained generator .*`lohp solve"):
        solve_runs.load_solver(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"family": "ackley_rotated_2"}, "family is 'ackley_2' there and 'ackley_rotated_2' here"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"diffusion": DiffusionConfig()}, "diffusion.network.width is 4 there and 128 here"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(run, change, message):
    """Of the checkpoint itself, whatever config.json says, and of the directory."""
    with pytest.raises(ValueError, match=f"generator holds a run with another config: {message}"):
        solve_runs.trained_generator(run[0], dataclasses.replace(TINY, **change))
    with pytest.raises(ValueError, match=f"run holds a run with another config: {message}"):
        solve_runs.open_solve_run(run[0], dataclasses.replace(TINY, **change))


def test_a_trained_solver_takes_other_settings_of_solving(run):
    more = dataclasses.replace(TINY, num_samples=9, num_problems=2, refiner="lbfgs", refine_steps=1)
    solve_runs.open_solve_run(run[0], more)
    assert solve_runs.trained_generator(run[0], more).config == TINY.diffusion
    assert solve_runs.read_solve_config(run[0]) == TINY


def test_a_generator_of_another_family_does_not_solve():
    generator = Generator(apply=None, params=(), family="rastrigin_2")
    with pytest.raises(ValueError, match="a generator of ackley_2, got one of rastrigin_2"):
        solve_runs.solve(generator, TINY, {"shift": np.zeros((1, 2))}, jax.random.key(0))


@pytest.mark.slow
def test_a_second_run_loads_the_generator(run, monkeypatch):
    directory, results, _ = run
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
            solve_runs.trained_generator(tmp_path / "parts", config, on_progress=interrupt)
    parts = solve_runs.trained_generator(tmp_path / "parts", config, on_progress=interrupt)
    jax.tree.map(np.testing.assert_array_equal, parts.params, whole.params)
    lines = [
        [(line["method"], line["step"]) for line in map(json.loads, path.open())]
        for path in (tmp_path / name / "metrics.jsonl" for name in ("whole", "parts"))
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 4


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


@pytest.mark.slow
def test_a_lasso_trained_at_one_size_serves_another(tmp_path):
    config = dataclasses.replace(LASSO, family="lasso", training_family="lasso_5x10")
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
    values, reference = np.array([2.0, -1.9, 5.0, np.nan]), np.array([1.0, -2.0, 4.0, 1.0])
    for gap, expected in (
        ("relative", [1.0, 0.05, 0.25, np.inf]),
        ("absolute", [1, 0.1, 1, np.inf]),
    ):
        np.testing.assert_allclose(solve_runs.gaps_of(gap, values, reference), expected)
    bounds = solve_runs.gaps_of("relative", np.array([3.0, 3.0, 3.0]), np.array([0.0, -1.0, 2.0]))
    np.testing.assert_allclose(bounds, [np.inf, np.inf, 0.5])  # no bound on (f - f*) / f* below 0
    below = solve_runs.gaps_of("relative", np.array([0.99995, 0.9]), np.ones(2))
    np.testing.assert_allclose(below, [0.0, -0.1])
    found = solve_runs.gap_statistics(np.array([0.0, 0.005, 0.02, 0.03]))
    assert found["success"] == 0.5 and found["gap_median"] == 0.0125


@pytest.mark.parametrize(
    "family, values, certified, notes",
    [
        ("lasso_5x10", [2.1, 5.1], True, []),
        ("lasso_5x10", [2.1, 5.1], False, ["not certified: f* of 1 of 2", "upper bounds"]),
        (
            "rastrigin_2",
            [2.1, 4.9],
            False,
            ["not certified: f* of 1 of 2", "can be below 0"],
        ),
    ],
)
def test_the_table_says_what_gaps_are_worth(family, values, certified, notes, capsys):
    config = solve_runs.SolveConfig(family, num_samples=1)
    solutions = fabricated(values, [2.0, 5.0], certified=certified)
    rows = solve_runs.rows_of(config, solutions, SECONDS)
    gap = solve_runs.gap_of(make_problem(family))
    print_solutions({"family": family, "gap": gap, "certified": 1 + certified, "rows": rows})
    out = " ".join(capsys.readouterr().out.split())
    assert all(note in out for note in notes) and ("not certified" in out) == bool(notes)
    assert ("below the label solver's value" in out) == (values[1] < 5)


def lohp(capsys, *arguments):
    code = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, " ".join(captured.err.split())


@pytest.mark.slow
def test_the_command_solves_problems_of_a_file(run, tmp_path, capsys):
    """With the generator and the settings of a run that is there."""
    rng = np.random.default_rng(0)
    problems = {name: np.float32(rng.uniform(-2, 2, size=(2, 2))) for name in ("shift", "x0")}
    np.savez(tmp_path / "problems.npz", **problems)
    code, out, err = lohp(
        capsys,
        *("solve", "--out", run[0], "--resume", "--num-samples", "2"),
        *("--problems", tmp_path / "problems.npz", "--json"),
    )
    assert code == 0, err
    results = json.loads(out)
    assert [row["num_problems"] for row in results["rows"]] == [2] * 4
    assert results["config"]["num_samples"] == 2 and results["config"]["refiner"] == "adam"


@pytest.fixture
def asked(monkeypatch, run):
    """Configs that the command asks `solve_run` for, which it does not run."""
    configs = []

    def solve_run(out, config, *args, **options):
        configs.append(config)
        return run[1]

    monkeypatch.setattr(solve_runs, "solve_run", solve_run)
    return configs


def test_a_resumed_run_takes_up_the_stored_settings(run, asked, capsys):
    code, out, err = lohp(capsys, "solve", "--out", run[0], "--resume")
    assert code == 0, err
    assert asked[-1] == TINY and "gaps are f - f*" in out
    options = ("--num-samples", "5", "--refiner", "lbfgs", "--num-problems", "2")
    code, _, err = lohp(
        capsys, "solve", "--out", run[0], "--resume", "--family", "ackley_2", *options
    )
    assert code == 0, err
    assert asked[-1] == dataclasses.replace(TINY, num_samples=5, refiner="lbfgs", num_problems=2)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--family", "lasso_250x500"), "family is 'ackley_2' there and 'lasso_250x500' here"),
        (("--diffusion.updates", "3"), "diffusion.updates is 2 there and 3 here"),
    ],
)
def test_another_training_is_refused_in_a_directory(run, asked, capsys, options, message):
    code, _, err = lohp(capsys, "solve", "--out", run[0], "--resume", *options)
    assert code == 2 and message in err and not asked


def test_the_default_directory_is_that_of_family_and_seed(
    run, asked, monkeypatch, tmp_path, capsys
):
    stored = tmp_path / "runs" / "solve-ackley_2-7" / "config.json"
    stored.parent.mkdir(parents=True)
    stored.write_text((run[0] / "config.json").read_text().replace('"seed": 0', '"seed": 7'))
    monkeypatch.chdir(tmp_path)
    code, _, err = lohp(capsys, "solve", "--family", "ackley_2", "--seed", "7", "--resume")
    assert code == 0, err
    assert asked == [dataclasses.replace(TINY, seed=7)]


def test_an_interrupted_run_says_how_to_go_on(run, monkeypatch, capsys):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(solve_runs, "solve_run", interrupted)
    code, _, err = lohp(capsys, "solve", "--out", run[0], "--resume")
    assert code == 1 and "train, meta-train and solve: with --resume" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--family", "rastrigni_2"), r"did you mean 'rastrigin_2'?"),
        (("--problems", "nowhere.npz"), "nowhere.npz"),
        (("--num-samples", "0"), "num_samples must be at least 1"),
    ],
)
def test_bad_usage(arguments, message, tmp_path, capsys):
    code, out, err = lohp(capsys, "solve", "--out", tmp_path / "run", *arguments)
    assert code == 2 and not out and message in err
    assert not (tmp_path / "run").exists()


def test_problems_of_another_size_are_refused_before_training(tmp_path, capsys):
    """The family takes them; a dense network of two inputs does not."""
    np.savez(tmp_path / "problems.npz", shift=np.zeros((2, 3)), x0=np.ones((2, 3)))
    code, out, err = lohp(
        capsys,
        *("solve", "--family", "ackley_2", "--out", tmp_path / "run"),
        *("--problems", tmp_path / "problems.npz"),
    )
    assert code == 2 and not out
    assert "problem 0: ackley_2: expected shift of shape [2], as in training, got [3]" in err
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_there_wants_resume(run, capsys):
    code, _, err = lohp(capsys, "solve", "--out", run[0])
    assert code == 2 and "go on with --resume" in err
