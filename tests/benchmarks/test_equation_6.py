"""How runs down equation 6 are followed and described, by their definitions."""

import jax
import numpy as np
import optax
import pytest

from benchmarks.hub import equation_6, equation_6_report
from benchmarks.hub.run import Arm
from benchmarks.hub.tasks import Task
from lohp_jax.workloads.oscillating import oscillating

SEGMENTS = equation_6.NUM_STEPS // equation_6.EVERY


def slope(s):
    return 1 + 0.02 * s + np.cos(1 / s) + np.sin(1 / s) / s


def test_losses_are_those_after_every_step():
    """Gradient descent in one dimension from |x| = s, while it does not cross zero."""
    task, rate = Task(oscillating(1), 2 * equation_6.EVERY), 1e-3
    arm = Arm(lambda rate, _: optax.sgd(rate), (rate,))
    key = jax.random.key(3)
    s, losses = abs(float(task.family.init(key)["x"][0])), []
    for _ in range(task.num_steps):
        s -= rate * slope(s)
        losses.append(s * (1 + 0.01 * s + np.cos(1 / s)))
    assert s > 0
    found = equation_6.follow(task, arm, rate, key)
    parts = np.split(np.array(losses), 2)
    np.testing.assert_allclose(found["last"], [part[-1] for part in parts], rtol=1e-3)
    np.testing.assert_allclose(found["least"], [part.min() for part in parts], rtol=1e-3)
    np.testing.assert_allclose(found["most"], [part.max() for part in parts], rtol=1e-3)


def test_the_least_counts_before_the_late_stage_and_the_most_in_it():
    """In the first run 1 and 9 are before step 7,500, and 2 and 7 after it."""
    last = np.full((3, SEGMENTS), 5.0)
    least, most = last.copy(), last.copy()
    least[0, 74], most[0, 74], least[0, 75], most[0, 75] = 1.0, 9.0, 2.0, 7.0
    last[:, 14], last[:, -1] = [1.5, 2.5, 3.5], [0.1, 0.2, np.nan]
    found = equation_6.describe({"last": last, "least": least, "most": most})
    assert found["least"] == [1.0, 5.0, 5.0] and found["most"] == [7.0, 5.0, 5.0]
    assert found["after"]["1500"] == [1.5, 2.5, 3.5] and found["after"]["15000"] == [0.1, 0.2, None]
    assert len(found["curve"]) == SEGMENTS and found["curve"][14] == 2.5


@pytest.mark.parametrize(
    "most, expected", [([0.9, 1.1, 1.1], "1.1 (2)"), ([None, 1.1, None], "inf (3)")]
)
def test_runs_that_rise_tenfold_are_counted(most, expected):
    assert equation_6_report.late({"most": most, "least": [0.1, 0.1, 0.1]}) == expected


def test_a_row_for_every_arm_and_what_has_no_rate_in_every_column():
    def row(value):
        return {"after": {"1500": [value] * 3}}

    arms = {
        "hand": {"0.1": row(1.0), "0.2": row(2.0)},
        "celo/alone": {"1": row(3.0)},
        "small/alone": {"1": row(4.0)},
    }
    found = equation_6_report.table({"starts": {"wide": arms}}, "wide", equation_6_report.early)
    assert [line.split(" | ")[1:] for line in found.splitlines()[2:]] == [
        ["", "1", "2 |"],
        ["ships", "4", "4 |"],
        ["Celo", "3", "3 |"],
    ]
