"""The statistics of the report on HUB, by their definitions on made-up results."""

import numpy as np
import pytest

from benchmarks.hub import report, standings


def row(finals, *, start=1.0, losses=None, steps=3, scalar=0.1, scalars=(0.01, 0.1, 1.0), length=1):
    """An arm whose runs go to their ends in even steps of the logarithm."""
    scores = [np.geomspace(start, end, steps).tolist() for end in finals]
    return {
        "settings": {"scalars": list(scalars), "num_steps": 10 * length},
        "scalar": scalar,
        "trials": {f"{s:g}": [abs(s - scalar)] for s in scalars},
        "scores": scores,
        "final": {"loss": losses or finals},
    }


def results(metric="objective", **arms):
    return {"separable_1000": {"metric": metric, "num_query": 100, "trivial": {}, "arms": arms}}


def cells_of(metric="objective", **arms):
    return standings.read_cells(results(metric, **arms))["separable_1000"]


def test_a_run_that_is_not_finite_or_ends_above_its_start_costs_its_start():
    cells = cells_of(
        hand=row([0.1] * 4),
        arm=row([0.1, 0.1, 0.1, 3.0], losses=[0.1, None, 0.1, 3.0]),
    )
    np.testing.assert_allclose(cells["arm"].costs, [0.1, 1.0, 0.1, 1.0])
    assert cells["arm"].failed.tolist() == [False, True, False, True]
    lost = cells_of(hand=row([2.0] * 4), arm=row([1.5] * 4))  # though no worse than Adam
    assert lost["arm"].failed.all() and lost["hand"].failed.all()
    assert cells["arm"].mean == pytest.approx(0.55)  # the middle two of .1, .1, 1, 1


def test_weights_that_are_not_numbers_fail_though_their_accuracy_is_one():
    cells = cells_of(
        "accuracy", hand=row([0.9], start=0.1), arm=row([0.9], start=0.1, losses=[None])
    )
    assert cells["arm"].costs == pytest.approx(0.9) and cells["arm"].failed.all()


def test_a_run_fails_that_goes_less_than_half_of_the_way():
    """Half of the way from 1 to .01, in logarithms, is .1."""
    cells = cells_of(hand=row([0.01] * 3), arm=row([0.09, 0.11, 0.01]))
    assert cells["arm"].failed.tolist() == [False, True, False]
    assert not cells["hand"].failed.any()


@pytest.mark.parametrize(
    "metric, own, hand, learned, kept",
    [
        ("objective", 0.1019, 0.1, 0.2, True),
        ("objective", 0.1021, 0.1, 0.2, False),
        ("objective", 0.1021, 0.2, 0.1, False),
        ("accuracy", 0.966, 0.97, 0.9, True),
        ("accuracy", 0.964, 0.97, 0.9, False),
    ],
)
def test_keeping_up_is_with_the_better_arm(metric, own, hand, learned, kept):
    start = 1.0 if metric == "objective" else 0.1
    cells = cells_of(
        metric,
        **{k: row([v] * 5, start=start) for k, v in (("arm", own), ("hand", hand), ("l", learned))},
    )
    assert standings.keeps_up(cells, "arm", "l") is kept


def test_standing_is_a_geometric_mean_over_tasks_with_the_worst_beside_it():
    """Ratios of 2 and 1/8 have the mean 1/2, on every choice of seeds; two ends of .4 have failed."""
    hand = [0.1, 0.2, 0.1, 0.2]
    tasks = {
        str(i): cells_of(hand=row(hand), l=row(hand), arm=row([ratio * x for x in hand]))
        for i, ratio in enumerate((2.0, 0.125))
    }
    found = standings.stand(tasks, "arm", "l")
    assert found.ratio == pytest.approx(0.5) and found.worst == pytest.approx(2.0)
    np.testing.assert_allclose(found.interval, 0.5, rtol=1e-6)
    assert (found.within, found.tasks, found.failed, found.runs) == (1, 2, 2, 8)


def test_a_perfect_score_counts_as_half_an_example():
    cells = cells_of("accuracy", hand=row([1.0], start=0.1), arm=row([0.99], start=0.1))
    assert np.exp(standings.log_ratio(cells["arm"], cells["hand"])) == pytest.approx(2.0)


def test_what_the_hand_designed_arm_reaches_in_the_same_time():
    """Twice as slow as it: half-way through a run of four times the length."""
    cells = cells_of(hand=row([0.1]), hand_long=row([0.01], steps=5, length=4), arm=row([0.1]))
    cells["arm"] = cells["arm"]._replace(clock=2.0)
    assert report.in_the_same_time(cells, "arm") == "0.1"
    cells["arm"] = cells["arm"]._replace(clock=9.0)
    assert report.in_the_same_time(cells, "arm") == "0.01 (4x)"
    assert report.in_the_same_time(cells, "hand") == "-"


def test_tasks_that_tell_nothing_apart_are_left_out():
    same, other = row([0.1] * 4), row([0.2] * 4)
    assert not standings.tells_apart(cells_of(**{"hand": same, "r/alone": same}), "r")
    assert standings.tells_apart(cells_of(**{"hand": same, "r/alone": other}), "r")
    assert not standings.tells_apart(cells_of(**{"hand": same, "q/alone": other}), "r")
    lost = row([2.0, 2.0, 2.0, 0.1])
    assert not standings.tells_apart(cells_of(**{"hand": lost, "r/alone": same}), "r")


def test_an_arm_of_fewer_tasks_stands_beside_hub_on_those():
    """Invert has a ratio of 1/4 on the first task and of 1 on the second; the other no second."""

    def task(invert, **more):
        arms = {"hand": 0.1, "r/alone": 0.3, "r/hub_trust": 0.1, "r/hub_invert": invert} | more
        return cells_of(**{name: row([end] * 4) for name, end in arms.items()})

    cells = {"separable_1000": task(0.025, **{"r/graft": 0.05}), "ltc_sine_8": task(0.1)}
    lines = report.overall(cells, "r")[1].splitlines()
    columns = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in lines}
    assert columns["r/hub_invert"][1:3] == ["2", "0.50"]
    assert columns["r/graft"][1:3] == ["1", "0.50"] and columns["r/graft"][4] == "0.25, 1.00"
    assert lines[-1].startswith("| r/graft")  # those of all tasks come first


def test_merging_adds_arms_and_tasks():
    have = results(hand=row([0.1]))
    report.merge(
        have, results(arm=row([0.2])) | {"ltc_sine_8": results(hand=row([0.3]))["separable_1000"]}
    )
    assert list(have) == ["separable_1000", "ltc_sine_8"]
    assert have["separable_1000"]["arms"].keys() == {"hand", "arm"}


def test_the_table_marks_a_scalar_at_the_edge_of_what_was_tried():
    found = results(hand=row([0.1]), arm=row([0.2], scalar=1.0), one=row([0.3], scalars=(0.1,)))
    found = found["separable_1000"]
    found["arms"]["same"] = row([0.4]) | {"trials": {"0.01": [0.3], "0.1": [0.3], "1": [0.4]}}
    table = report.task_table(
        found, standings.read_cells({"separable_1000": found})["separable_1000"]
    )
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines()}
    assert "| 1 (edge) |" in lines["arm"] and "| 0.1 |" in lines["hand"]
    assert "| nothing |" in lines["one"] and "| 0.1 (tie) |" in lines["same"]
