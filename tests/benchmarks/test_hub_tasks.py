"""The tasks on which HUB is compared have the settings that their rows are labelled with."""

import itertools

import jax
import numpy as np
import optax
import pytest

from benchmarks.hub.run import all_arms, learned_rules
from benchmarks.hub.tasks import TASKS, Task
from lohp_jax.workloads.oscillating import oscillating


@pytest.mark.parametrize(
    "decays, expected", [(False, [0.2] * 5), (True, 0.1 * (1 + np.cos(np.pi * np.arange(5) / 4)))]
)
def test_the_rate_of_the_hand_designed_arm(decays, expected):
    task = Task(oscillating(2), 4, hand=optax.sgd, decays=decays)
    optimizer = task.hand_designed(0.2, 4)
    gradient, steps = {"x": np.ones(2, np.float32)}, []
    state = optimizer.init(gradient)
    for _ in range(5):
        update, state = optimizer.update(gradient, state)
        steps.append(-update["x"][0])
    np.testing.assert_allclose(steps, expected, atol=1e-7)


def test_a_schedule_is_left_as_it_is():
    task = Task(oscillating(2), 4, hand=optax.sgd, decays=True)
    optimizer = task.hand_designed(lambda step: 0.3, 4)
    gradient = {"x": np.ones(2, np.float32)}
    update, _ = optimizer.update(gradient, optimizer.init(gradient))
    np.testing.assert_allclose(update["x"], -0.3, rtol=1e-6)


def test_volumes_have_the_settings_of_the_paper():
    task = TASKS["siren"](None)
    params = jax.eval_shape(task.family.init, jax.random.key(0))
    shapes = [params[f"linear_{i}"]["w"].shape for i in range(7)]
    assert shapes == list(itertools.pairwise((3, 17, 8, 8, 8, 8, 8, 1)))
    assert task.hand is optax.adamax and task.decays and 1e-3 in task.rates
    assert dict(task.settings)["batch_size"] == 100_000


def test_arms_as_published_have_one_softmax_for_all_tensors_of_a_layer():
    """Gradients of 1 in "w" and of 1 and 3 in "b": with K = 3, against one softmax for each tensor."""
    arms = all_arms(Task(oscillating(2), 10), learned_rules({}))
    params = {"layer": {"w": np.ones(1, np.float32), "b": np.ones(2, np.float32)}}
    gradients = {"layer": {"w": np.float32([1.0]), "b": np.float32([1.0, 3.0])}}
    for name, groups in (("hub_vanilla_layer", ["layer"]), ("hub_vanilla", ["layer/b", "layer/w"])):
        optimizer = arms[f"small/{name}"].make(1e-3, 10)
        state = optimizer.init(params)
        _, state = optimizer.update(gradients, state, params, value=1.0)
        assert list(state.mean_weight) == groups
        sizes = [3] if groups == ["layer"] else [2, 1]
        np.testing.assert_allclose(list(state.mean_weight.values()), 1 / np.array(sizes), rtol=1e-5)
