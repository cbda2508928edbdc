import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from lohp_jax.tasks import make_family
from lohp_jax.tasks.door import check_same_family, describe_family
from lohp_jax.types import TaskFamily
from lohp_jax.workloads.oscillating import oscillating

NUM_CLASSES = 4


def sample(key, split="train"):
    shift = 1.0 if split == "train" else -1.0
    return {"target": shift + jax.random.uniform(key, (3,)), "names": jnp.arange(NUM_CLASSES)}


def loss(params, data, key):
    return jnp.mean((params["w"][:, 0] - data["target"]) ** 2)


GOOD = TaskFamily(
    sample,
    init=lambda key: {"w": jax.random.normal(key, (3, NUM_CLASSES)), "no": None},
    loss=loss,
    evaluate=lambda params, data: dict.fromkeys(("objective", "loss"), loss(params, data, None)),
    context=lambda data, key: {"x": data["target"] + jax.random.normal(key, (3,))},
    name="tiny",
    num_classes=NUM_CLASSES,
    class_axes={"w": 1, "no": None},
    context_loss=lambda params, context: jnp.mean(params["w"][:, 0] * context["x"]),
    rename=lambda data, order: {**data, "names": order[data["names"]]},
)


def test_a_family_is_described():
    description = describe_family(GOOD)
    assert description.measure == "objective" and not description.higher_is_better
    assert json.loads(json.dumps(description._asdict())) == {
        "name": "tiny",
        "measure": "objective",
        "higher_is_better": False,
        "num_classes": 4,
        "params": {"['w']": "float32[3,4]"},
        "context": {"['x']": "float32[3]"},
    }


def test_our_own_families_fit():
    description = describe_family(make_family("digits_5way"))
    assert description.measure == "accuracy" and description.higher_is_better
    assert description.context["['y']"] == "int32[50]"


def test_nothing_is_computed():
    def refuse(*_):
        raise AssertionError("computed")

    def traced(params, data, key):
        return jax.pure_callback(refuse, jax.ShapeDtypeStruct((), jnp.float32), params["w"])

    assert describe_family(dataclasses.replace(GOOD, loss=traced)).name == "tiny"


def by_split(key, split):
    return jnp.zeros(3 if split == "train" else 4)


def only_train(key, split):
    if split != "train":
        raise KeyError("held_out")
    return sample(key)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"sample": only_train},
            r'sample\(key, "held_out"\) must be .* raised KeyError: \'held_out\'',
        ),
        (
            {"sample": by_split},
            r'sample\(key, "held_out"\) must return .* got float32\[4\]',
        ),
        ({"sample": lambda key, split: "a"}, r'sample\(key, "train"\) .* raised TypeError'),
        ({"init": lambda key: jnp.zeros(3, int)}, r"init\(key\) .* got int32\[3\] at the root"),
        (
            {"init": lambda key: {"w": jnp.zeros(3), "n": jnp.int32(0)}},
            r"init\(key\) must return .* floating-point arrays, got int32\[\] at \['n'\]",
        ),
        ({"init": lambda key: {}}, r"init\(key\) must return at least one .* got {}"),
        ({"init": lambda: 0}, r"init\(key\) must be .* raised TypeError"),
        (
            {"loss": lambda params, data, key: params["w"]},
            r"loss\(params, data, key\) must return one floating-point scalar, got float32\[3,4\]",
        ),
        ({"loss": lambda params, data, key: (0.0, {})}, "got tuple of"),
        ({"loss": lambda params, data, key: jnp.int32(0)}, r"loss.*scalar, got int32\[\]"),
        ({"loss": lambda params, data, key: params["v"]}, "loss.* raised KeyError: 'v'"),
        ({"evaluate": lambda params, data: 0.0}, r"evaluate.* got float32\[\]"),
        (
            {"evaluate": lambda params, data: {"loss": 0.0}},
            r"evaluate.* got dict of {\"\['loss'\]\"",
        ),
        (
            {"evaluate": lambda params, data: {"accuracy": 0.0}},
            r"evaluate.* got dict of {\"\['accuracy'\]\"",
        ),
        (
            {"evaluate": lambda params, data: {"loss": 0.0, "accuracy": jnp.zeros(2)}},
            r"evaluate.*, got float32\[2\] for 'accuracy'",
        ),
        (
            {"context": lambda data, key: ()},
            r"context\(data, key\) .* at least one array, got \(\)",
        ),
        ({"context": lambda data, key: {"x": "text"}}, "context.* raised TypeError"),
        ({"context_loss": lambda params, context: params["w"]}, r"context_loss.*float32\[3,4\]"),
        ({"class_axes": {"w": 0, "no": None}}, r"class_axes at \['w'\] .*num_classes=4 .* got 0"),
        ({"class_axes": {"w": 2, "no": None}}, r"class_axes at \['w'\] .* got 2"),
        ({"class_axes": {"w": 1}}, "class_axes must be a pytree like the params"),
        ({"class_axes": None}, "rename is given without class_axes"),
        ({"rename": None}, "class_axes is given without rename"),
        (
            {"rename": lambda data, order: data["names"]},
            r"rename\(data, order\) must return a task",
        ),
    ],
)
def test_a_family_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=f"family 'tiny': .*{message}"):
        describe_family(dataclasses.replace(GOOD, **change))


def test_a_task_without_context_is_refused():
    with pytest.raises(ValueError, match=r"context\(data, key\) must return"):
        describe_family(oscillating())


def test_the_error_of_the_users_function_is_the_cause():
    family = dataclasses.replace(GOOD, loss=lambda params, data, key: params["v"])
    with pytest.raises(ValueError, match="family") as caught:
        describe_family(family)
    assert isinstance(caught.value.__cause__, KeyError)


def test_what_is_no_family_is_refused():
    with pytest.raises(ValueError, match="expected a TaskFamily, got str; make one"):
        describe_family("digits_5way")


def saved():
    return json.loads(json.dumps(describe_family(GOOD)._asdict()))


def test_the_family_of_before_is_the_same():
    assert check_same_family(describe_family(GOOD), saved(), "runs/a") is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "other"}, "name is 'tiny' there and 'other' here"),
        (
            {"context": lambda data, key: {"x": jnp.zeros(5)}, "context_loss": None},
            r"context\['x'\] is 'float32\[3\]' there and 'float32\[5\]' here",
        ),
        (
            {"context": lambda data, key: {"z": jnp.zeros(3)}, "context_loss": None},
            r"context\['x'\] is 'float32\[3\]' there and absent here",
        ),
    ],
)
def test_another_family_is_refused(change, message):
    other = describe_family(dataclasses.replace(GOOD, **change))
    with pytest.raises(ValueError, match=f"runs/a holds a run of another family: {message}; give"):
        check_same_family(other, saved(), "runs/a")
