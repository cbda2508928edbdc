import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.codec import make_codec
from lohp_jax.evaluation import scores
from lohp_jax.evaluation.honesty import honesty


@pytest.fixture
def check(family):
    """Honesty of a producer of weights from contexts, on six tasks."""
    return make_check(family)


def make_check(family):
    tasks = scores.draw_tasks(family, jax.random.key(0), 6, "held_out")
    theta_0 = {"w": jnp.zeros(8)}
    codec = make_codec(theta_0, channels=3, reference=theta_0, scale={"w": jnp.float32(2.0)})
    training = jax.random.normal(jax.random.key(9), (5, 8))

    def run(produce):
        producer = scores.make_producer(produce)
        return honesty(
            family,
            producer,
            tasks,
            codec=codec,
            weights=producer.many(tasks.contexts, tasks.keys),
            teacher_weights={"w": tasks.data["target"]},
            training_tokens=jax.vmap(lambda w: codec.encode({"w": w}))(training),
        )

    return run, np.asarray(tasks.data["target"]), np.asarray(training)


def test_of_a_family_with_an_objective(bowls):
    """`shuffled` is its mean; without a `chance` there is none."""
    run, targets, _ = make_check(bowls)
    found = run(lambda context, key: {"w": context["seen"]})
    expected = np.mean((np.roll(targets, 1, 0) - targets) ** 2)
    assert found["shuffled"] == pytest.approx(expected, rel=1e-5)
    assert "chance" not in found
    assert found["rms_ratio"] == pytest.approx(1.0)


def test_a_perfect_generator(check):
    run, targets, training = check
    found = run(lambda context, key: {"w": context["seen"]})
    agree = [
        np.mean(np.sign(a) == np.sign(b))
        for a, b in zip(np.roll(targets, 1, 0), targets, strict=False)
    ]
    assert found["shuffled"] == pytest.approx(np.mean(agree))
    assert found["chance"] == 0.75
    assert found["rms_ratio"] == pytest.approx(1.0)
    assert found["teacher_distance"] == pytest.approx(0.0, abs=1e-6)
    nearest = [min(np.sqrt(np.mean((t - s) ** 2)) for s in training) / 2.0 for t in targets]
    assert found["nearest_training_distance"] == pytest.approx(np.mean(nearest), rel=1e-4)
    assert found["teacher_nearest_training_distance"] == found["nearest_training_distance"]


def test_a_memory_shows_its_distance(check):
    run, _, training = check
    found = run(lambda context, key: {"w": jnp.asarray(training[2])})
    assert found["nearest_training_distance"] == pytest.approx(0.0, abs=1e-3)
    assert found["teacher_nearest_training_distance"] > 0.1


def test_a_timid_generator_shows_its_ratio(check):
    run, *_ = check
    assert run(lambda context, key: {"w": 0.5 * context["seen"]})["rms_ratio"] == pytest.approx(0.5)


def test_the_names_of_the_labels_do_not_carry_over_to_another_task(family):
    """A generator that always answers by the canonical names is at chance on another task."""
    renamable = dataclasses.replace(
        family,
        num_classes=8,
        rename=lambda data, order: {"target": jnp.where(order[0] < 4, 1, -1) * data["target"]},
        class_axes={"w": 0},
    )
    tasks = scores.draw_tasks(family, jax.random.key(0), 64, "held_out")
    data = {"target": jnp.ones_like(tasks.data["target"])}
    theta_0 = {"w": jnp.zeros(8)}
    codec = make_codec(theta_0, channels=4, reference=theta_0, scale={"w": jnp.float32(1.0)})
    producer = scores.make_producer(lambda context, key: {"w": jnp.ones(8)})
    found = honesty(
        renamable,
        producer,
        tasks._replace(data=data),
        codec=codec,
        weights=producer.many(tasks.contexts, tasks.keys),
        teacher_weights={"w": data["target"]},
        training_tokens=codec.encode({"w": jnp.ones(8)})[None],
    )
    assert abs(found["shuffled"] - 0.5) < 0.2
