"""A verdict for every way to fail, each with a generator made to fail it, and one that passes."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.baselines.retrieval import nearest_task
from lohp_jax.codec import make_codec, standard_scale
from lohp_jax.evaluation import scores
from lohp_jax.evaluation.honesty import honesty
from lohp_jax.evaluation.memory import find_neighbours, overlap
from lohp_jax.evaluation.verdicts import judge, win_share, wins
from lohp_jax.generation import generate
from lohp_jax.tasks.supervised import supervised_family

THETA_0 = {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}
NUM_TASKS = 32


def clusters():
    """Tasks of three Gaussian clusters in four dimensions, the centres anew in each task."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(120, 3, 4)) * 1.5
    y = np.tile(np.arange(3), (120, 40))
    x = np.take_along_axis(centres, y[:, :, None], axis=1) + 0.5 * rng.normal(size=(120, 120, 4))
    return supervised_family(
        lambda key: THETA_0,
        lambda params, x: x @ params["w"] + params["b"][None],
        np.float32(x),
        y,
        shots=10,
        held_out=0.5,
        class_axes={"w": 1, "b": 0},
    )


def by_means(context):
    """The linear classifier by the nearest class mean."""
    member = jax.nn.one_hot(context["y"], 3)
    means = member.T @ context["x"] / member.sum(axis=0)[:, None]
    return {"w": 2 * means.T, "b": -jnp.sum(means**2, axis=1)}


@pytest.fixture(scope="module")
def bench():
    """`produce -> honesty` on unseen tasks of clusters, beside a teacher that sees other examples."""
    family = clusters()
    trained = scores.draw_tasks(family, jax.random.key(1), NUM_TASKS, "train")
    tasks = scores.draw_tasks(family, jax.random.key(0), NUM_TASKS, "held_out")
    ends = jax.vmap(by_means)(trained.contexts)
    codec = make_codec(
        THETA_0,
        channels=4,
        reference=THETA_0,
        scale=standard_scale(ends, THETA_0),
        class_axes=family.class_axes,
    )

    def run(produce):
        producer = scores.make_producer(produce)
        return honesty(
            family,
            producer,
            tasks,
            codec=codec,
            weights=producer.many(tasks.contexts, tasks.keys),
            teacher_weights=jax.vmap(by_means)(jax.vmap(family.context)(tasks.data, tasks.keys)),
            training_tokens=jax.vmap(codec.encode)(ends),
        )

    return run, family, trained, ends


def failed(found):
    return {name for name, verdict in found["verdicts"].items() if verdict["passed"] is False}


def test_a_generator_that_reads_its_context_passes_all(bench):
    run, *_ = bench
    found = run(lambda context, key: by_means(context))
    assert failed(found) == set()
    assert found["verdict"] == {
        "passed": True,
        "words": "Nothing found against it in 5 of 5 checks.",
    }
    assert found["verdicts"]["memory"]["words"].startswith("Not a memory: ")
    assert found["training_scores"]["noise"] < 0.8 and found["constant_predictions"] == 0
    assert found["error_overlap"]["generated"] < 0.5


def test_a_memory_is_found_under_other_names_of_the_labels(bench):
    """It copies the task that looks most alike, and renames the labels of the copy."""
    run, family, trained, ends = bench
    memory = nearest_task(family, trained.contexts, ends)
    found = run(lambda context, key: jax.tree.map(lambda x: x[0], generate(memory, context, key)))
    assert "memory" in failed(found) and "context" not in failed(found)
    assert found["nearest_training_distance"] < 1e-6
    assert found["error_overlap"]["generated"] == 1
    assert found["verdict"]["words"].startswith("Fails ") and "memory" in found["verdict"]["words"]
    words = found["verdicts"]["memory"]["words"]
    assert words.startswith("A memory: ") and "share 100 % of their errors" in words


def test_a_noisy_memory_is_no_more_than_training_weights(bench):
    run, family, trained, ends = bench
    memory = nearest_task(family, trained.contexts, ends)

    def produce(context, key):
        copied = jax.tree.map(lambda x: x[0], generate(memory, context, key))
        return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(key, x.shape), copied)

    found = run(produce)
    assert "memory" in failed(found)
    assert found["verdicts"]["memory"]["words"].startswith("No more than training weights: ")


def test_a_collapsed_generator(bench):
    run, *_, ends = bench
    mean = jax.tree.map(lambda leaf: leaf.mean(axis=0), ends)

    def produce(context, key):
        return jax.tree.map(lambda m, x: m + 0.01 * (x - m), mean, by_means(context))

    found = run(produce)
    assert "collapse" in failed(found) and "context" not in failed(found)
    assert found["verdicts"]["collapse"]["words"].startswith("Collapsed: for their size, weights")


def test_a_generator_that_ignores_its_context(bench):
    run, *_ = bench
    found = run(
        lambda context, key: {
            "w": 3 * jax.random.normal(key, (4, 3)),
            "b": -jnp.full(3, 9.0),
        }
    )
    assert {"context", "degenerate"} <= failed(found) and "collapse" not in failed(found)
    assert found["verdicts"]["context"]["words"].startswith("Ignores its context")
    assert (
        "no better than a prediction that sees no input"
        in (found["verdicts"]["degenerate"]["words"])
    )


def test_constant_predictions(bench):
    run, *_ = bench

    def produce(context, key):
        made = by_means(context)
        return {"w": made["w"], "b": made["b"].at[0].add(100.0)}

    found = run(produce)
    assert found["constant_predictions"] == 1
    assert found["verdicts"]["degenerate"]["words"] == (
        "Degenerate: one label for all examples on 100 % of tasks."
    )


def test_weights_of_another_size(bench):
    run, *_ = bench
    for factor, word in ((3.0, "Overshoots"), (0.3, "Timid")):
        found = run(lambda context, key, f=factor: jax.tree.map(lambda x: f * x, by_means(context)))
        assert failed(found) == {"size"}
        assert found["verdicts"]["size"]["words"].startswith(f"{word}: weights lie")


def test_weights_that_are_not_finite(bench):
    run, *_ = bench

    def produce(context, key):
        made = by_means(context)
        broken = jnp.where(jnp.sum(context["x"]) > 0, jnp.nan, 0.0)
        return {"w": made["w"], "b": made["b"] + broken}

    found = run(produce)
    assert failed(found) == {"degenerate"}
    assert 0 < found["non_finite"] < 1 and found["num_tasks"] < NUM_TASKS
    assert np.isfinite(found["rms_ratio"])
    found = run(lambda context, key: jax.tree.map(lambda x: jnp.nan * x, by_means(context)))
    assert found["non_finite"] == 1 and failed(found) == {"degenerate"}
    assert "Not measured: context, collapse, memory, size." in found["verdict"]["words"]


def of_bowls(family, produce):
    """Honesty for a family with an objective and a chance."""

    def evaluate(params, data):
        return bare(params, data) | {"chance": jnp.mean(data["target"] ** 2)}

    bare = family.evaluate
    family = dataclasses.replace(family, evaluate=evaluate)
    tasks = scores.draw_tasks(family, jax.random.key(0), NUM_TASKS, "held_out")
    codec = make_codec({"w": jnp.zeros(8)}, channels=3)
    producer = scores.make_producer(produce)
    training = jax.random.normal(jax.random.key(9), (40, 8))
    return honesty(
        family,
        producer,
        tasks,
        codec=codec,
        weights=producer.many(tasks.contexts, tasks.keys),
        teacher_weights={"w": tasks.data["target"]},
        training_tokens=jax.vmap(lambda w: codec.encode({"w": w}))(training),
    ), training


def test_of_an_objective(bowls):
    """No errors to be seen there, but all verdicts."""
    found, training = of_bowls(bowls, lambda context, key: {"w": 0.9 * context["seen"]})
    assert found["verdict"]["passed"] is True and found["error_overlap"] == {}

    def memory(context, key):
        distance = jnp.sum((training - context["seen"][None]) ** 2, axis=1)
        return {"w": training[jnp.argmin(distance)]}

    found, _ = of_bowls(bowls, memory)
    assert "memory" in failed(found) and "context" not in failed(found)
    found, _ = of_bowls(bowls, lambda context, key: {"w": 0.0 * context["seen"]})
    assert {"degenerate", "context", "collapse", "size"} <= failed(found)


def test_what_knows_the_answer_without_its_context():
    """It scores above chance with another task's context."""
    measures = {"non_finite": 0.0, "num_tasks": 100, "shuffled_wins": 0.9, "chance": 0.5}
    for shuffled, sign, passed in ((0.56, 1, False), (0.54, 1, True), (0.47, -1, False)):
        verdict = judge(measures | {"shuffled": shuffled}, sign)["verdicts"]["context"]
        assert verdict["passed"] is passed
        assert verdict["words"].startswith("Uses" if passed else "Does not need its context")


def test_wins_are_shares_of_tasks():
    one, other = np.array([1.0, 2.0, np.nan, 3.0]), np.array([1.0, 1.0, 0.0, np.inf])
    assert win_share(one, other, 1) == pytest.approx((0.5 + 1 + 0 + 1) / 4)
    assert win_share(one, other, -1) == pytest.approx((0.5 + 0 + 0 + 1) / 4)
    assert wins(0.61, 100) and not wins(0.6, 100)


def test_overlap_of_errors():
    one = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    other = np.array([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    assert overlap(one, other) == pytest.approx((1 / 3 + 1) / 2)
    assert np.isnan(overlap(one[1:2], other[1:2]))


def test_neighbours_are_the_nearest_under_any_names():
    """By definition: all tasks, all renamings, one after another."""
    family = clusters()
    codec = make_codec(THETA_0, channels=4, class_axes=family.class_axes)
    rng = np.random.default_rng(1)
    tokens, trained = (
        np.float32(rng.normal(size=(n, *codec.mask.shape)) * codec.mask) for n in (3, 20)
    )
    found = find_neighbours(family, codec, tokens, trained)
    blocks = trained.reshape(20, 3, -1)
    for row, network in enumerate(tokens):
        renamed = {
            (s, order): blocks[s][list(order)].reshape(network.shape)
            for s in range(20)
            for order in itertools.permutations(range(3))
        }
        distance = {at: np.sum((made - network) ** 2) for at, made in renamed.items()}
        best = min(distance, key=distance.get)
        np.testing.assert_array_equal(found.nearest[row], renamed[best])
        expected = np.sqrt(distance[best] / codec.mask.sum())
        assert found.distance[row] == pytest.approx(expected, rel=1e-5)
        of_task = {}
        for (s, order), d in distance.items():
            if s not in of_task or d < of_task[s][0]:
                of_task[s] = (d, renamed[s, order])
        alike = [of_task[s][1] for s in sorted(of_task, key=lambda s: of_task[s][0])[:8]]
        np.testing.assert_allclose(found.average[row], np.mean(alike, axis=0), rtol=1e-5, atol=1e-6)
