import dataclasses
import doctest
import functools
from typing import NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lohp_jax.tasks import supervised
from lohp_jax.tasks.door import describe_family
from lohp_jax.tasks.supervised import supervised_family

NUM_TASKS, COUNT, WIDTH, NUM_CLASSES = 10, 16, 3, 3
RNG = np.random.default_rng(0)
X = RNG.normal(size=(NUM_TASKS, COUNT, WIDTH)).astype(np.float32)
# unbalanced and in any order: 8, 4 and 4 of each label
LABELS = RNG.permuted(np.tile(np.repeat([0, 1, 2, 0], 4), (NUM_TASKS, 1)), axis=1)
TARGETS = RNG.normal(size=(NUM_TASKS, COUNT, 2)).astype(np.float32)
KEY = jax.random.key(0)


def init(key):
    return {"w": jax.random.normal(key, (WIDTH, NUM_CLASSES)), "b": jnp.arange(1.0 * NUM_CLASSES)}


def apply(params, x):
    return x @ params["w"] + params["b"][None]


def init_two(key):
    return {"w": jax.random.normal(key, (WIDTH, 2)), "b": jnp.ones(2)}


def classify(**options):
    return supervised_family(init, apply, X, LABELS, **{"shots": 2, **options})


def regress(**options):
    return supervised_family(init_two, apply, X, TARGETS, **{"shots": 5, **options})


both_kinds = pytest.mark.parametrize("make", [classify, regress])


def every_context(family, data, count=60):
    """`[count]` contexts of one task."""
    return jax.vmap(family.context, (None, 0))(data, jax.random.split(KEY, count))


def numbers_of(x, task):
    """Numbers, among those of a task, of examples `[..., WIDTH]`; each must be one of them."""
    same = (np.asarray(x)[..., None, :] == X[task]).all(-1)
    np.testing.assert_array_equal(same.sum(-1), 1)
    return same.argmax(-1)


def cross_entropy_oracle(params, x, y):
    logits = np.float64(x) @ np.float64(params["w"]) + np.float64(params["b"])
    return np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y])


def mse_oracle(params, x, y):
    return np.mean((np.float64(x) @ np.float64(params["w"]) + np.float64(params["b"]) - y) ** 2)


def pools_of(family, task):
    """Numbers of the training examples of a task, and of the others."""
    data = family.sample(KEY) | {"task": jnp.int32(task)}
    train = set(numbers_of(every_context(family, data)["x"], task).ravel().tolist())
    return sorted(train), sorted(set(range(COUNT)) - train)


@both_kinds
def test_splits_are_disjoint_by_task_and_cover_all(make):
    family = make(held_out=0.3)
    keys = jax.random.split(KEY, 300)
    tasks = {
        split: set(jax.vmap(lambda k, s=split: family.sample(k, s))(keys)["task"].tolist())
        for split in ("train", "held_out")
    }
    assert len(tasks["held_out"]) == 3
    assert sorted(tasks["train"] | tasks["held_out"]) == list(range(NUM_TASKS))
    assert not tasks["train"] & tasks["held_out"]


def test_held_out_takes_numbers_of_tasks():
    family = classify(held_out=[7, 2])
    tasks = jax.vmap(lambda k: family.sample(k, "held_out"))(jax.random.split(KEY, 50))["task"]
    assert set(tasks.tolist()) == {2, 7}


def test_classification_values():
    family, params = classify(num_query=8), init(KEY)
    data = family.sample(KEY)
    task = int(data["task"])
    train, query = pools_of(family, task)
    assert (len(train), len(query)) == (8, 8)
    np.testing.assert_array_equal(np.bincount(LABELS[task][train]), [4, 2, 2])
    np.testing.assert_allclose(
        family.loss(params, data, KEY),
        cross_entropy_oracle(params, X[task][train], LABELS[task][train]),
        rtol=1e-5,
    )
    scores, y = family.evaluate(params, data), LABELS[task][query]
    expected = cross_entropy_oracle(params, X[task][query], y)
    np.testing.assert_allclose(scores["loss"], expected, rtol=1e-5)
    hits = np.argmax(np.asarray(apply(params, X[task][query])), 1) == y
    np.testing.assert_allclose(scores["accuracy"], np.mean(hits))
    np.testing.assert_allclose(scores["chance"], 4 / 8)


def test_regression_values():
    family, params = regress(num_query=6), init_two(KEY)
    data = family.sample(KEY)
    task = int(data["task"])
    train, query = pools_of(family, task)
    assert (len(train), len(query)) == (10, 6)
    expected = mse_oracle(params, X[task][train], TARGETS[task][train])
    np.testing.assert_allclose(family.loss(params, data, KEY), expected, rtol=1e-5)
    scores = family.evaluate(params, data)
    expected = mse_oracle(params, X[task][query], TARGETS[task][query])
    np.testing.assert_allclose([scores["objective"], scores["loss"]], [expected] * 2, rtol=1e-5)
    constant = TARGETS[task][train].mean(0)
    np.testing.assert_allclose(
        scores["chance"], np.mean((TARGETS[task][query] - constant) ** 2), rtol=1e-5
    )


def test_a_loss_of_ones_own_is_the_objective():
    family = regress(loss=lambda predictions, y: jnp.mean(jnp.abs(predictions - y)))
    params, data = init_two(KEY), family.sample(KEY)
    _, query = pools_of(family, int(data["task"]))
    scores = family.evaluate(params, data)
    task = int(data["task"])
    error = np.abs(np.asarray(apply(params, X[task][query])) - TARGETS[task][query]).mean()
    np.testing.assert_allclose([scores["objective"], scores["loss"]], [error] * 2, rtol=1e-5)
    assert set(scores) == {"objective", "loss"}


def test_a_context_has_shots_of_each_label_without_repeats():
    family = classify()
    data = family.sample(KEY)
    contexts = every_context(family, data)
    np.testing.assert_array_equal(contexts["y"], np.tile([0, 0, 1, 1, 2, 2], (60, 1)))
    numbers = numbers_of(contexts["x"], int(data["task"]))
    np.testing.assert_array_equal(LABELS[int(data["task"])][numbers], contexts["y"])
    assert all(len(set(row)) == 6 for row in numbers.tolist())
    assert len({tuple(row) for row in numbers.tolist()}) > 10


def test_tasks_may_have_some_of_the_labels():
    y = (
        LABELS + np.arange(NUM_TASKS)[:, None] % 2
    )  # labels 0, 1, 2 in one half and 1, 2, 3 in the other
    wide = functools.partial(jnp.zeros, (WIDTH, 4))
    family = supervised_family(lambda key: wide(), lambda w, x: x @ w, X, y, shots=1)
    for task in (0, 1):
        context = family.context({"task": jnp.int32(task)}, KEY)
        np.testing.assert_array_equal(context["y"], task + np.arange(3))
    assert family.num_classes == 4


@both_kinds
def test_a_dealt_support_is_all_that_loss_and_context_see(make):
    family = make(teacher_data="support")
    data = family.sample(jax.random.key(3))
    first, second = (family.context(data, jax.random.key(seed)) for seed in (1, 2))
    chex.assert_trees_all_equal(first, second)
    params = family.init(KEY)
    np.testing.assert_allclose(
        family.loss(params, data, KEY), family.context_loss(params, first), rtol=1e-6
    )


def test_a_batch_is_drawn_from_what_the_teacher_sees():
    family, params = regress(batch_size=1, teacher_data="support"), init_two(KEY)
    data = family.sample(KEY)
    context = family.context(data, KEY)
    each = jax.vmap(lambda x, y: family.context_loss(params, {"x": x[None], "y": y[None]}))(
        context["x"], context["y"]
    )
    drawn = jax.vmap(lambda key: family.loss(params, data, key))(jax.random.split(KEY, 100))
    np.testing.assert_allclose(np.unique(np.round(drawn, 4)), np.unique(np.round(each, 4)), 1e-3)


def test_renaming_the_labels_permutes_the_class_axes():
    family = classify(class_axes={"w": 1, "b": 0}, teacher_data="support")
    params, data, order = init(KEY), family.sample(KEY), jnp.array([2, 0, 1])
    renamed = family.rename(data, order)
    back = jnp.argsort(order)
    permuted = {"w": params["w"][:, back], "b": params["b"][back]}
    chex.assert_trees_all_close(
        family.evaluate(params, data), family.evaluate(permuted, renamed), rtol=1e-6
    )
    np.testing.assert_allclose(
        family.loss(params, data, KEY), family.loss(permuted, renamed, KEY), rtol=1e-6
    )
    before, after = (family.context(d, KEY) for d in (data, renamed))
    np.testing.assert_array_equal(after["y"], order[before["y"]])
    fresh = classify(class_axes={"w": 1, "b": 0})
    np.testing.assert_array_equal(
        fresh.context({"task": data["task"], "names": order}, KEY)["y"], [0, 0, 1, 1, 2, 2]
    )


class Weights(NamedTuple):
    w: jax.Array
    b: jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["w", "b"], meta_fields=[])
@dataclasses.dataclass
class Layer:
    w: jax.Array
    b: jax.Array


def plain(build, read):
    def apply(params, x):
        w, b = read(params)
        return x @ w + b[None]

    return lambda key: build(jax.random.normal(key, (WIDTH, 2)), jnp.zeros(2)), apply


def haiku_model():
    model = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(2)(x)))
    return model.init, model.apply


def flax_model():
    return nn.Dense(2).init, nn.Dense(2).apply


def nnx_model():
    def make(key):
        return nnx.split(nnx.Linear(WIDTH, 2, rngs=nnx.Rngs(key)))

    graph = make(KEY)[0]
    return lambda key: make(key)[1], lambda state, x: nnx.merge(graph, state)(x)


def equinox_model():
    def make(key):
        return eqx.partition(eqx.nn.MLP(WIDTH, 2, 4, 1, key=key), eqx.is_inexact_array)

    static = make(KEY)[1]
    return lambda key: make(key)[0], lambda arrays, x: jax.vmap(eqx.combine(arrays, static))(x)


MODELS = {
    "list": plain(lambda w, b: [w, b], lambda p: p),
    "tuple": plain(lambda w, b: (w, (b,)), lambda p: (p[0], p[1][0])),
    "none": plain(lambda w, b: {"w": w, "b": b, "no": None}, lambda p: (p["w"], p["b"])),
    "namedtuple": plain(Weights, lambda p: (p.w, p.b)),
    "dataclass": plain(Layer, lambda p: (p.w, p.b)),
    "haiku": haiku_model(),
    "flax": flax_model(),
    "nnx": nnx_model(),
    "equinox": equinox_model(),
}


@pytest.mark.parametrize("name", MODELS)
def test_any_model_is_trained_by_its_gradient(name):
    init, apply = MODELS[name]
    family = supervised_family(init, apply, X, TARGETS, shots=5)
    assert describe_family(family).measure == "objective"
    params, data = family.init(KEY), family.sample(KEY)
    value, grads = jax.jit(jax.value_and_grad(family.loss))(params, data, KEY)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    nearer = jax.tree.map(lambda p, g: p - 1e-2 * g, params, grads)
    assert family.loss(nearer, data, KEY) < value


def test_an_optional_second_argument_of_init_is_left_alone():
    family = supervised_family(
        lambda key, width=2: jnp.zeros((WIDTH, width)), lambda w, x: x @ w, X, TARGETS, shots=1
    )
    assert family.init(KEY).shape == (WIDTH, 2)


def test_the_example_of_the_module_runs():
    with jax.numpy_rank_promotion("raise"):
        assert doctest.testmod(supervised).failed == 0


def with_nan(array):
    array = array.copy()
    array[2, 5, 1] = np.nan
    return array


def not_floating(key):
    return {"w": jnp.zeros((WIDTH, 2)), "steps": jnp.zeros((), jnp.int32)}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": with_nan(X)}, r"finite x, got NaN or infinity, first in task 2, example 5"),
        ({"y": with_nan(np.repeat(TARGETS, 1, 2))}, r"finite y, got NaN"),
        ({"x": X[:-1]}, r"x \[9, 16, 3\] and y \[10, 16, 2\]"),
        ({"x": X[:, :-1]}, r"x \[10, 15, 3\] and y \[10, 16, 2\]"),
        ({"x": X[:1], "y": TARGETS[:1]}, "2 or more tasks, .* got 1"),
        ({"x": X[0, 0]}, r"x of shape \[R, n, ...\], .* got \[3\]"),
        ({"x": np.array([["a"]])}, "x of numbers, got <U1"),
        ({"y": TARGETS + 1j}, "real y, got complex"),
        ({"y": LABELS, "loss": "mse"}, "floating-point y for the loss 'mse', got int32"),
        ({"loss": "cross_entropy"}, r"integer y of shape \[R, n\] .* got float32\[10, 16, 2\]"),
        ({"loss": "mae"}, "loss must be one of .* got 'mae'"),
        ({"loss": lambda p, y: p - y}, r"loss\(predictions, y\) must return one .* float32\[3,2\]"),
        ({"shots": 9}, "shots must be between 1 and 8, the training examples that task 0 .* got 9"),
        ({"shots": 0}, "shots must be between 1 and 8"),
        ({"num_query": 16}, "num_query must be between 1 and 15, .* got 16"),
        ({"held_out": 1.5}, r"held_out must be a share .* got 1.5"),
        ({"held_out": [10]}, r"numbers from 0 to 9; got \[10\]"),
        ({"held_out": range(10)}, "held_out names all 10 tasks"),
        ({"held_out": 3}, r"held_out must be a share .* got 3"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"teacher_data": "all"}, "teacher_data must be one of .* got 'all'"),
        ({"num_classes": 3}, "num_classes is for loss='cross_entropy'"),
        ({"class_axes": {"w": 1, "b": 0}}, "class_axes is for loss='cross_entropy'"),
        ({"init": not_floating}, r"init must return .* floating-point arrays, got int32\[\]"),
        ({"init": lambda key: ()}, "init must return at least one floating-point array"),
        (
            {"init": lambda key: jnp.zeros(99)},
            r"apply\(params, x float32\[3,3\]\) .* raised TypeError",
        ),
        ({"init": lambda a, b, c: 0}, r"init\(key\) or \(key, x\), got a function of 3 arguments"),
        ({"apply": lambda params, key, x: x}, r"apply\(params, x\), got a function of 3 .* Haiku"),
        ({"apply": lambda params, x: x}, r"shape \[3, 2\] .* got float32\[3,3\]; make them agree"),
        ({"apply": lambda params, x: (x,)}, "got a tuple"),
    ],
)
def test_a_regression_that_does_not_fit_is_refused(change, message):
    given = {"init": init_two, "apply": apply, "x": X, "y": TARGETS, "shots": 5, **change}
    with pytest.raises(ValueError, match=f"supervised_family: .*{message}"):
        supervised_family(**given)


lacking = np.where(np.arange(NUM_TASKS)[:, None] == 4, np.minimum(LABELS, 1), LABELS)
rare = np.where(np.arange(COUNT)[None] == 0, 2, np.tile(np.arange(COUNT) % 2, (NUM_TASKS, 1)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"y": LABELS - 1}, r"labels y from 0 to num_classes - 1 = 1, got -1 to 1"),
        ({"num_classes": 2}, "labels y from 0 to num_classes - 1 = 1, got 0 to 2"),
        ({"num_classes": 4}, r"shape \[3, 4\] .* got float32\[3,3\]; give each of num_classes=4"),
        ({"y": LABELS.astype(bool), "loss": "cross_entropy"}, "integer y .* got bool"),
        (
            {"y": lacking},
            "number of different labels in every task, got 3 in task 0 and 2 in task 4",
        ),
        ({"y": rare}, "between 1 and [01], the training examples of label 2 that task"),
        ({"shots": 3}, "shots must be between 1 and 2, the training examples of label"),
        ({"class_axes": {"w": 0, "b": 0}, "x": X[..., :2]}, "raised TypeError"),
        ({"class_axes": {"w": 1}}, "class_axes must be a pytree like the params"),
        (
            {"class_axes": {"w": -1, "b": 1}},
            r"class_axes at \['b'\] must be an axis of num_classes=3",
        ),
        ({"class_axes": {"w": -1, "b": -1}}, "at least one leaf, got -1 for all"),
    ],
)
def test_a_classification_that_does_not_fit_is_refused(change, message):
    given = {"init": init, "apply": apply, "x": X, "y": LABELS, "shots": 2, **change}
    with pytest.raises(ValueError, match=f"supervised_family: .*{message}"):
        supervised_family(**given)
