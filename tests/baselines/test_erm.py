import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.baselines.erm import erm
from lohp_jax.types import TaskFamily

TARGETS = jnp.array([[1.0, 0.0], [0.0, 4.0], [2.0, 2.0]])
KEY = jax.random.key(0)


def make_family(evaluate=None):
    """A task is one of three points, to which the loss is the squared distance."""

    def sample(key, split="train"):
        return {"target": jax.random.choice(key, TARGETS)}

    def loss(params, data, key):
        return jnp.sum((params["w"] - data["target"]) ** 2)

    def measure(params, data):
        value = loss(params, data, None)
        return {"objective": value, "loss": value}

    def context(data, key):
        return {"z": data["target"]}

    def init(key):
        return {"w": jnp.zeros(2)}

    return TaskFamily(sample, init, loss, evaluate or measure, context, name="points")


def test_the_network_minimises_the_mean_loss_of_all_tasks():
    family = make_family()
    generator, tuned = erm(family, {"w": jnp.zeros(2)}, KEY, updates=300, batch_size=64)
    np.testing.assert_allclose(generator.params["w"], TARGETS.mean(axis=0), atol=0.3)
    assert 0.001 < tuned.learning_rate < 1
    assert generator.family == "points" and generator.gradients == 0


def test_it_ignores_the_context():
    family = make_family()
    generator, _ = erm(family, {"w": jnp.zeros(2)}, KEY, updates=5, batch_size=2)
    weights = [
        generator.apply(generator.params, {"z": jnp.full(2, value)}, jax.random.key(int(value)))
        for value in (0.0, 9.0)
    ]
    np.testing.assert_array_equal(weights[0]["w"], weights[1]["w"])


def nearness(params, data):
    return {"accuracy": -jnp.abs(params["w"][0] - 30), "loss": jnp.float32(0)}


def farness(params, data):
    value = jnp.abs(params["w"][0] - 30)
    return {"objective": value, "loss": value}


@pytest.mark.parametrize("evaluate", [nearness, farness], ids=["accuracy", "objective"])
def test_the_rate_is_the_best_by_the_score_on_training_tasks(evaluate):
    _, tuned = erm(make_family(evaluate), {"w": jnp.zeros(2)}, KEY, updates=2, batch_size=8)
    assert tuned == (1.0, 0.0)  # of all rates it comes nearest to 30 in two updates


def test_a_rate_whose_score_is_not_finite_is_not_picked():
    def evaluate(params, data):
        value = jnp.where(jnp.abs(params["w"][0]) < 0.5, params["w"][0], jnp.nan)
        return {"accuracy": value, "loss": value}

    _, tuned = erm(make_family(evaluate), {"w": jnp.zeros(2)}, KEY, updates=2, batch_size=8)
    assert tuned == (0.1, 0.0)


def test_decay_is_picked_where_the_score_wants_small_weights():
    def evaluate(params, data):
        value = jnp.sum(params["w"] ** 2)
        return {"objective": value, "loss": value}

    start = {"w": jnp.full(2, 9.0)}
    _, tuned = erm(make_family(evaluate), start, KEY, updates=3, batch_size=8)
    assert tuned == (1.0, 0.3)


def test_no_finite_score_at_all():
    def evaluate(params, data):
        return {"objective": jnp.float32(jnp.nan), "loss": jnp.float32(0)}

    with pytest.raises(ValueError, match=r"erm: training at rates .* gave no finite score"):
        erm(make_family(evaluate), {"w": jnp.zeros(2)}, KEY, updates=1, batch_size=1)


@pytest.mark.parametrize(
    "numbers", [{"updates": 0, "batch_size": 1}, {"updates": 1, "batch_size": 0}]
)
def test_numbers_must_be_positive(numbers):
    with pytest.raises(ValueError, match="erm: updates and batch_size must be at least 1"):
        erm(make_family(), {"w": jnp.zeros(2)}, KEY, **numbers)
