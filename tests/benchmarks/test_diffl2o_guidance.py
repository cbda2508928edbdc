"""The study of guidance by landscape: its statistics by their definitions, and a run."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.diffl2o_guidance import arms, report, run

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("num_starts", [1, 2, 4, 6])
def test_scores_are_means_over_all_choices_of_starts(num_starts):
    gaps = RNG.uniform(0.0, 0.03, (5, 6))
    best = np.array([gaps[:, c].min(1) for c in itertools.combinations(range(6), num_starts)])
    found = arms.score(gaps, num_starts)
    expected, wins = best.mean(axis=0), (best < 0.01).mean(axis=0)
    for metric, values in (("gap", expected), ("success", wins)):
        halves = [values[::2].mean(), values[1::2].mean()]
        np.testing.assert_allclose(found[metric], halves, rtol=1e-3)
    np.testing.assert_allclose(found["gap_median"], np.median(expected), rtol=1e-3)


def test_a_gap_that_is_not_finite_spoils_the_mean_unless_another_start_is_better():
    gaps = np.array([[np.nan, 0.1], [0.2, 0.3]])
    assert arms.score(gaps, 1)["gap"] == [None, 0.25]
    assert arms.score(gaps, 2)["gap"] == [0.1, 0.2]


@pytest.mark.parametrize(
    "arm, calls, adaptive",
    [
        ("parameters_alone", 0, False),
        ("parameters", 0, False),
        ("raw_0.5", 10, False),
        ("smoothed_1", 80, False),
        ("both_1", 90, False),
        ("gated_raw", 90, True),
        ("wiener_smoothed", 80, True),
        ("learned_both", 90, True),
    ],
)
def test_arms_pay_for_their_gradients(arm, calls, adaptive):
    """Ten steps with one raw gradient or eight probes each."""
    found = arms.ARMS[arm]
    assert (found.sampling_calls, found.adaptive) == (calls, adaptive)


def cells_of(**success):
    """Cells of arms whose success on both halves is given for each seed."""
    cells = {}
    for name, seeds in success.items():
        for seed, halves in enumerate(seeds):
            network = cells.setdefault(arms.ARMS[name].network, {})
            cell = network.setdefault(str(seed), {"arms": {}})
            cell["arms"][name] = {"raw": {"1": {"success": halves}}}
    return cells


def test_the_best_fixed_weights_are_measured_where_they_were_not_chosen():
    """raw_1 wins the even half and both_1 the odd one, each by luck."""
    fixed = dict.fromkeys(report.FIXED, [[0.1, 0.1]] * 2)
    fixed |= {"raw_1": [[0.9, 0.2]] * 2, "both_1": [[0.2, 0.8]] * 2}
    cells = cells_of(**fixed, wiener_both=[[0.4, 0.5], [0.4, 0.3]])
    found = report.against_best(cells, ("wiener_both",), "raw", "1", "success")
    seeds = [((0.5 - 0.2) + (0.4 - 0.2)) / 2, ((0.3 - 0.2) + (0.4 - 0.2)) / 2]
    assert found["best"] == "raw_1"
    assert found["difference"] == pytest.approx(np.mean(seeds))
    reach = 12.706 * np.std(seeds, ddof=1) / np.sqrt(2)  # Student's t, one degree of freedom
    assert found["interval"] == pytest.approx((0.2 - reach, 0.2 + reach), rel=1e-4)
    assert report.verdict(found) == "level"


def test_seeds_count_that_all_networks_have():
    cells = {network: {"0": {}, "1": {}} for network in arms.NETWORKS}
    cells["wiener"] = {"1": {}, "2": {}}
    assert {tuple(found) for found in report.complete(cells).values()} == {("1",)}
    assert report.complete({"alone": {"0": {}}}) == {}


@pytest.mark.parametrize(
    "interval, word",
    [
        ((0.1, 0.2), "ahead"),
        ((-0.2, -0.1), "**behind**"),
        ((-0.1, 0.1), "level"),
        ((np.nan, np.nan), "(one seed)"),
    ],
)
def test_verdicts(interval, word):
    assert report.verdict({"interval": interval}) == word


def test_fewer_decades_of_a_gap_are_better():
    merits = report.merit([{"gap": [0.1, 1e-30]}, {"gap": [None, 1.0]}], "gap")
    np.testing.assert_allclose(merits, [[1.0, 7.0], [-np.inf, 0.0]])


@pytest.mark.slow
def test_what_is_not_shown_is_as_if_left_out():
    """One compilation serves all weights, with the samples that the public sampler gives."""
    from lohp_jax.diffusion.generator import diffusion_generator
    from lohp_jax.diffusion.training import initial_params

    family, config = arms.make_set("ackley_2"), arms.make_config("fixed", True)
    params = initial_params(family, config, jax.random.key(0))
    params["network"] = jax.tree.map(lambda leaf: leaf + 0.1, params["network"])  # not zero
    params |= {"warm": None}
    arm = arms.ARMS["smoothed_0.5"]
    problems = arms.draw_problems(family, 2).arrays
    found = arms.make_sampler(family, "fixed", False, 1, "ddim")(
        params, arm.shown, problems, jax.random.key(3)
    )
    generator = diffusion_generator(family, config, params)
    one = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), problems)
    key = jax.random.split(jax.random.key(3), 2)[0]
    expected = generator.apply(params, one, key, guidance=arm.weights)
    np.testing.assert_allclose(found[0, 0], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_run_is_written_and_not_repeated(tmp_path):
    path = tmp_path / "results.json"
    arguments = ["--quick", "--seeds", "1", "--sets", "ackley_2_leak", "--results", str(path)]
    run.main(arguments)
    results = json.loads(path.read_text())
    row = results["cells"]["ackley_2_leak"]["alone"]["0"]["arms"]["parameters_alone"]
    assert row["sampling_calls"] == 0 and row["refine_calls"] == 60
    assert row["refined"]["16"]["gap_median"] <= row["raw"]["16"]["gap_median"]
    run.main(arguments)
    assert json.loads(path.read_text()) == results
    assert "ackley_2_leak" in (tmp_path / "tables.md").read_text()
    with pytest.raises(SystemExit, match="'quick': False"):
        run.main(arguments[1:])
