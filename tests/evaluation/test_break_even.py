import pytest

from lohp_jax.evaluation.break_even import Spent, break_even

SPENT = Spent(prepare=30.0, train=60.0, compilation=12.0)


def row(method, value, milliseconds, *, kind="baseline", measure="accuracy", batch=0.5, **more):
    return {
        "method": method,
        "kind": kind,
        measure: value,
        f"{measure}_std": 0.1,
        "num_tasks": 100,  # a standard error of 0.01
        "latency_ms_p50": milliseconds,
        "latency_ms_p50_batch": batch,
        **more,
    }


def ours(value=0.9, milliseconds=2.0, **more):
    return row("lohp", value, milliseconds, kind="generator", **more)


def judged(*rows, spent=SPENT, measure="accuracy"):
    return break_even(rows, measure, "lohp", spent, "same_support_adam")


def test_it_pays_after_what_it_took_over_what_it_saves():
    adam = row("same_support_adam", 0.89, 32.0, batch=9.5)
    found = judged(ours(latency_batch_size=256), adam)
    (against,) = found["against"]
    assert against == {
        "rival": "same_support_adam",
        "saved_ms": 30.0,
        "saved_ms_batch": 9.0,
        "tasks": 3000,  # 90 s over 30 ms
        "tasks_batch": 10000,
    }
    assert (found["prepare_seconds"], found["train_seconds"]) == (30, 60)
    assert found["compile_seconds"] == 12
    assert found["words"] == (
        "It took 90.0 s before the first new task, 30.0 s to prepare and 60.0 s to train, 12.0 s of "
        "these to compile. Pays against same_support_adam after 3,000 tasks (2.00 ms against 32.0 ms "
        "for a task; accuracy 0.9 against 0.89). In batches of 256: after 10,000 tasks."
    )


@pytest.mark.parametrize(
    "adam, ours, measure, expected",
    [
        (0.93, 0.9, "accuracy", "it is worse (accuracy 0.9 against 0.93)"),
        (0.5, 0.6, "objective", "it is worse (objective 0.6 against 0.5)"),
        (0.91, 0.9, "accuracy", None),  # within the spread, sqrt(2) 0.01
        (0.59, 0.6, "objective", None),
    ],
)
def test_it_never_pays_where_it_is_worse(adam, ours, measure, expected):
    rows = (
        row("lohp", ours, 2.0, kind="generator", measure=measure),
        row("same_support_adam", adam, 32.0, measure=measure),
    )
    found = judged(*rows, measure=measure)
    assert found["against"][0]["tasks"] == (None if expected else 3000)
    assert ("Never pays against same_support_adam" in found["words"]) == bool(expected)
    assert (expected or "Pays against") in found["words"]


def test_it_never_pays_where_it_is_not_faster():
    found = judged(ours(), row("same_support_adam", 0.8, 2.0))
    assert found["against"][0]["tasks"] is None
    assert "Never pays in time against same_support_adam: it is not faster" in found["words"]
    assert "though better (accuracy 0.9 against 0.8)" in found["words"]
    assert found["words"].endswith("No baseline reaches its score within the spread.")


def test_the_fastest_rival_that_is_as_good_is_named():
    rows = (
        ours(),
        row("same_support_adam", 0.85, 32.0),
        row("slow", 0.95, 50.0),
        row("quick", 0.89, 12.0, train_seconds=80.0),
        row("quickest", 0.8, 0.1),  # but worse
        row("teacher_adam", 0.99, 1.0, kind="teacher"),  # sees more
    )
    found = judged(*rows)
    assert [each["rival"] for each in found["against"]] == ["same_support_adam", "quick"]
    assert found["against"][1]["tasks"] == 1000  # 90 s less 80 s of its own, over 10 ms
    slower = judged(ours(milliseconds=20.0), *rows[1:])
    assert slower["against"][1]["tasks"] is None
    dear = judged(ours(), row("quick", 0.9, 12.0, train_seconds=500.0))
    assert dear["against"][0]["tasks"] == 0


def test_what_is_not_known_is_said():
    found = judged(ours(), row("same_support_adam", 0.8, 9.0), spent=None)
    assert found["against"] == [] and found["prepare_seconds"] is None
    assert found["words"].startswith("Unknown: there is no record")
    assert judged(ours())["words"].startswith("Nothing to compare with")


def test_a_rival_that_is_not_finite_is_no_rival():
    found = judged(ours(), row("ridge", float("nan"), 0.1))
    assert found["against"] == []
