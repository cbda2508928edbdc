import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.networks.mlp import apply_mlp
from lohp_jax.tasks.door import describe_family
from lohp_jax.tasks.regression import sine_regression

KEY = jax.random.key(0)
SHOTS, NUM_TRAIN, NUM_QUERY = 4, 20, 50


def make(**options):
    return sine_regression(
        **{"shots": SHOTS, "num_train": NUM_TRAIN, "num_query": NUM_QUERY, **options}
    )


def slope(key):
    return [jnp.ones(1)]


def line(params, x):
    return params[0][None] * x


def tasks(split, count=500):
    family = make()
    keys = jax.random.split(KEY, count)
    return jax.jit(jax.vmap(lambda key: family.sample(key, split)))(keys)


def targets(data, x):
    return np.float64(data["amplitude"]) * np.sin(np.float64(x) - np.float64(data["phase"]))


def test_tasks_are_those_of_the_paper():
    data = tasks("train")
    for name, low, high in (("amplitude", 0.1, 5), ("phase", 0, np.pi), ("x", -5, 5)):
        values = np.asarray(data[name])
        assert low <= values.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < values.max() <= high
        np.testing.assert_allclose(values.mean(), (low + high) / 2, atol=0.05 * (high - low))


def test_no_task_is_in_both_splits():
    train, held_out = (
        set(map(tuple, np.stack([data["amplitude"], data["phase"]], 1).tolist()))
        for data in (tasks("train"), tasks("held_out"))
    )
    assert len(train) == len(held_out) == 500 and not train & held_out
    with pytest.raises(ValueError, match=r"split must be one of .* got 'test'"):
        make().sample(KEY, "test")


def test_values():
    family = make(init=slope, apply=line)
    data, params = family.sample(KEY), slope(KEY)
    x = np.asarray(data["x"])
    np.testing.assert_allclose(
        family.loss(params, data, KEY), np.mean((x - targets(data, x)) ** 2), rtol=1e-5
    )
    query = -5 + 10 * (np.arange(NUM_QUERY) + 0.5) / NUM_QUERY
    y = targets(data, query)
    scores = family.evaluate(params, data)
    expected = np.mean((query - y) ** 2)
    np.testing.assert_allclose([scores["objective"], scores["loss"]], [expected] * 2, rtol=1e-5)
    np.testing.assert_allclose(
        scores["chance"], np.mean((targets(data, x).mean() - y) ** 2), rtol=1e-4
    )


def test_a_context_is_some_of_the_training_points():
    family = make(init=slope, apply=line)
    data = family.sample(KEY)
    contexts = jax.jit(jax.vmap(family.context, (None, 0)))(data, jax.random.split(KEY, 50))
    assert contexts["x"].shape == contexts["y"].shape == (50, SHOTS, 1)
    drawn = contexts["x"][..., 0].tolist()
    assert {x for row in drawn for x in row} == set(data["x"][:, 0].tolist())
    assert all(len(set(row)) == SHOTS for row in drawn)
    np.testing.assert_allclose(contexts["y"], targets(data, contexts["x"]), atol=1e-5)
    one = jax.tree.map(lambda leaf: leaf[0], contexts)
    error = np.mean((one["x"] - one["y"]) ** 2)
    np.testing.assert_allclose(family.context_loss(slope(KEY), one), error, rtol=1e-5)


def test_a_support_is_all_that_loss_and_context_see():
    family = make(init=slope, apply=line, teacher_data="support")
    data, params = family.sample(KEY), slope(KEY)
    context = family.context(data, KEY)
    np.testing.assert_array_equal(context["x"], data["x"][:SHOTS])
    np.testing.assert_allclose(
        family.loss(params, data, KEY), family.context_loss(params, context), rtol=1e-6
    )


def test_a_batch_is_drawn_from_the_training_points():
    family = make(init=slope, apply=line, batch_size=1)
    data = family.sample(KEY)
    drawn = jax.jit(jax.vmap(family.loss, (None, None, 0)))(
        slope(KEY), data, jax.random.split(KEY, 100)
    )
    each = (np.asarray(data["x"]) - targets(data, data["x"])) ** 2
    np.testing.assert_allclose(np.abs(drawn[:, None] - each[None, :, 0]).min(1), 0, atol=1e-4)
    assert len(np.unique(drawn)) > 10


def test_the_network_is_a_perceptron_of_forty_forty():
    family = sine_regression()
    shapes = jax.tree.map(jnp.shape, family.init(KEY))
    assert [shapes[f"layer_{i}"]["w"] for i in range(3)] == [(1, 40), (40, 40), (40, 1)]
    description = describe_family(family)
    assert description.measure == "objective"
    assert description.context == {"['x']": "float32[10,1]", "['y']": "float32[10,1]"}
    data, params = family.sample(KEY), family.init(KEY)
    error = np.asarray(apply_mlp(params, data["x"])) - targets(data, data["x"])
    np.testing.assert_allclose(family.loss(params, data, KEY), np.mean(error**2), rtol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"init": slope}, "init and apply of one model, or neither, got no apply"),
        ({"apply": line}, "or neither, got no init"),
        (
            {"init": slope, "apply": lambda params, x: x[:, 0]},
            r"predictions of shape \[3, 1\] .* got float32\[3\]",
        ),
        (
            {"init": lambda key: jnp.zeros(1, int), "apply": line},
            r"floating-point arrays, got int32",
        ),
        ({"shots": 21}, "shots must be between 1 and num_train=20, got 21"),
        ({"shots": 0}, "shots must be between 1 and num_train=20, got 0"),
        ({"num_query": 0}, "num_query must be at least 1, got 0"),
        ({"num_train": 0}, "num_train must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"teacher_data": "all"}, "teacher_data must be one of .* got 'all'"),
    ],
)
def test_sine_regression_rejects(options, message):
    with pytest.raises(ValueError, match=f"sine_regression: .*{message}"):
        make(**options)
