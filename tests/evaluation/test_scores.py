import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.baselines.adaptation import Tuned, adam_on_support
from lohp_jax.evaluation import scores
from lohp_jax.optimizers import make_optimizer
from lohp_jax.types import Generator


def test_drawn_tasks_depend_on_their_key_and_keep_their_context(family):
    tasks = scores.draw_tasks(family, jax.random.key(0), 5, "held_out")
    again = scores.draw_tasks(family, jax.random.key(0), 5, "held_out")
    assert tasks.data["target"].shape == (5, 8)
    np.testing.assert_array_equal(tasks.contexts["seen"], tasks.data["target"])
    np.testing.assert_array_equal(tasks.data["target"], again.data["target"])
    assert len(np.unique(tasks.data["target"][:, 0])) == 5


def test_scores_are_one_per_task(family):
    tasks = scores.draw_tasks(family, jax.random.key(0), 4, "held_out")
    weights = {"w": tasks.data["target"].at[1].multiply(-1.0)}
    np.testing.assert_array_equal(scores.scores(family, weights, tasks.data), [1, 0, 1, 1])


def test_scores_of_an_objective_are_the_objective(bowls):
    tasks = scores.draw_tasks(bowls, jax.random.key(0), 3, "held_out")
    weights = {"w": tasks.data["target"] + jnp.array([0.0, 1.0, 2.0])[:, None]}
    np.testing.assert_allclose(scores.scores(bowls, weights, tasks.data), [0, 1, 4], rtol=1e-5)


@pytest.mark.parametrize("measure", ["accuracy", "objective"])
def test_a_row_holds_mean_spread_and_extremes(measure):
    values = np.array([0.5, 1.0])
    latency = {"latency_ms_p50": 1.0, "latency_ms_p50_batch": 0.5}
    row = scores.make_row(
        "ours", "generator", 3, measure, values, gradients=7, latency=latency, split="train"
    )
    assert row[measure] == 0.75
    assert (row[f"{measure}_min"], row[f"{measure}_max"]) == (0.5, 1.0)
    assert row[f"{measure}_std"] == pytest.approx(np.std([0.5, 1.0], ddof=1))
    assert (row["method"], row["kind"], row["split"]) == ("ours", "generator", "train")
    assert ("accuracy" in row) != ("objective" in row)
    assert (row["num_tasks"], row["gradients"], row["seed"]) == (2, 7, 3)
    assert (row["latency_ms_p50"], row["latency_ms_p50_batch"]) == (1.0, 0.5)


def test_a_teacher_starts_at_theta_0_and_learns(family):
    tasks = scores.draw_tasks(family, jax.random.key(0), 3, "held_out")
    theta_0 = family.init(jax.random.key(0))
    taught = scores.teacher(family, make_optimizer("adam:0.1"), theta_0, 30).many(
        tasks.data, tasks.keys
    )
    assert taught.states["w"].shape == (3, 31, 8)
    np.testing.assert_array_equal(taught.states["w"][:, 0], 0.0)
    assert (taught.losses[:, -1] < 0.2 * taught.losses[:, 0]).all()


def test_the_adapter_ends_where_adam_ends(family):
    tasks = scores.draw_tasks(family, jax.random.key(0), 3, "held_out")
    theta_0 = family.init(jax.random.key(0))
    generator = adam_on_support(family, theta_0, Tuned(0.1, 30))
    assert generator.gradients == 30
    producer = scores.make_producer(scores.from_generator(generator))
    adapted = producer.many(tasks.contexts, tasks.keys)
    teacher = scores.teacher(
        family, make_optimizer("adam:0.1"), theta_0, 30
    )  # the context is the whole task
    taught = teacher.many(tasks.data, tasks.keys)
    np.testing.assert_allclose(adapted["w"], taught.states["w"][:, -1], rtol=1e-5)


def test_a_producer_gives_one_network_per_context(family):
    generator = Generator(lambda params, context, key, **_: {"w": params * context["seen"]}, 2.0)
    tasks = scores.draw_tasks(family, jax.random.key(0), 3, "held_out")
    producer = scores.make_producer(scores.from_generator(generator))
    many = producer.many(tasks.contexts, tasks.keys)
    one = producer.one({"seen": tasks.contexts["seen"][1]}, tasks.keys[1])
    np.testing.assert_array_equal(many["w"], 2 * tasks.contexts["seen"])
    np.testing.assert_array_equal(one["w"], many["w"][1])


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is told to go on."""
    now = [0.0]
    monkeypatch.setattr(scores.time, "perf_counter", lambda: now[0])
    return now


def test_latency_counts_networks_and_the_slowest_calls(family, clock):
    tasks = scores.draw_tasks(family, jax.random.key(0), 4, "held_out")
    calls = []

    def timed(number, milliseconds):
        def call(contexts, keys):
            calls.append(number)
            clock[0] += milliseconds(calls.count(number)) / 1e3
            return jnp.zeros(())

        return call

    alone = timed(1, lambda call: {1: 500.0, 2: 9.0, 3: 8.0}.get(call, 1.0))
    together = timed(4, lambda call: {1: 700.0, 2: 800.0}.get(call, 400.0))
    found = scores.latency(scores.Producer(alone, together), tasks.contexts, tasks.keys)
    assert found == pytest.approx(
        {
            "latency_ms_first": 500,  # which compiles, and counts nowhere else
            "latency_ms_p50": 1,
            "latency_ms_p99": 8,  # the second slowest of 101
            "latency_ms_p50_batch": 100,
            "latency_ms_p99_batch": 200,
            "latency_batch_size": 4,
        }
    )
    assert calls.count(1) == 1 + 101 and calls.count(4) == 1 + 5  # it is slow: the fewest


PARTLY = Generator(lambda params, context, key, **_: {"w": params * context["seen"]}, 0.5)
OPPOSED = Generator(
    lambda params, context, key, **_: {"w": -params * context["seen"]}, 0.5, gradients=3
)


def test_evaluate_scores_every_generator_on_the_same_tasks(family, bowls):
    results = scores.evaluate(
        family, {"ours": PARTLY, "theirs": OPPOSED}, jax.random.key(0), num_tasks=3
    )
    assert (results["family"], results["measure"]) == ("signs", "accuracy")
    assert [(r["method"], r["accuracy"], r["gradients"]) for r in results["rows"]] == [
        ("ours", 1.0, 0),
        ("theirs", 0.0, 3),
    ]
    assert all(r["num_tasks"] == 3 and r["split"] == "held_out" for r in results["rows"])
    tasks = scores.draw_tasks(bowls, jax.random.key(1), 3, "train")
    results = scores.evaluate(
        bowls, {"ours": PARTLY}, jax.random.key(1), num_tasks=3, split="train"
    )
    (row,) = results["rows"]
    expected = np.mean((0.5 * np.float64(tasks.data["target"])) ** 2)
    assert results["measure"] == "objective" and row["split"] == "train"
    assert row["objective"] == pytest.approx(expected, rel=1e-5)


def test_evaluate_refuses_fewer_than_two_tasks(family):
    with pytest.raises(ValueError, match="evaluate: num_tasks must be at least 2, got 1"):
        scores.evaluate(family, {"ours": PARTLY}, jax.random.key(0), num_tasks=1)


def test_evaluate_refuses_a_generator_that_cannot_read_the_contexts(family):
    def check(context):
        raise ValueError(f"generate: expected images, got {sorted(context)}.")

    other = Generator(PARTLY.apply, 0.5, check=check)
    with pytest.raises(ValueError, match=r"generate: expected images, got \['seen'\]"):
        scores.evaluate(family, {"other": other}, jax.random.key(0), num_tasks=2)


def test_evaluate_refuses_a_family_that_measures_nothing(family):
    broken = dataclasses.replace(family, evaluate=lambda params, data: {"loss": params["w"][0]})
    with pytest.raises(ValueError, match='"accuracy" or "objective"'):
        scores.evaluate(broken, {"ours": PARTLY}, jax.random.key(0), num_tasks=2)
