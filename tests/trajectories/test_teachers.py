"""Teachers from names and transformations: what they are called and what a step of them costs."""

import jax
import jax.numpy as jnp
import optax
import pytest

from lohp_jax.optimizers import hub, lgl2o, pretrained_optimizer, sam
from lohp_jax.trajectories.teachers import Teacher, count_gradients, make_teachers


def names(teachers):
    return [teacher.name for teacher in make_teachers(teachers, 4)]


@pytest.mark.parametrize(
    "teachers, expected",
    [
        (("sgd:1", "adam"), ["sgd", "adam"]),
        (("adam:0.1", "sgd", "adam"), ["adam:0.1", "sgd", "adam"]),
        (("sam:1", "sam:adam:0.1", "adam"), ["sam:1", "sam:adam:0.1", "adam"]),
        (("sgd", optax.adam(0.1), ("mine", optax.adam(0.2))), ["sgd", "1", "mine"]),
        ("adam:0.1", ["adam"]),
        (optax.adam(0.1), ["0"]),
        ([optax.MultiSteps(optax.sgd(0.1), 2)], ["0"]),
    ],
)
def test_teachers_are_named_by_what_they_are_asked_for_by(teachers, expected):
    assert names(teachers) == expected


def test_a_teacher_stays_what_it_is():
    made = make_teachers(["adam:0.1", optax.sgd(0.1)], 4)
    assert [teacher.spec for teacher in made] == ["adam:0.1", "1"]
    assert make_teachers(made, 4) == made
    assert make_teachers(made[0], 4) == made[:1]
    assert isinstance(made[0], Teacher)


@pytest.mark.parametrize(
    "teachers, message",
    [
        ((), "expected at least one teacher, got none"),
        (("adam:0.1", "adam:0.1"), "got two called 'adam:0.1'; give each a learning rate"),
        (("adam", ("adam", optax.adam(0.1))), "got two called 'adam'"),
        ((optax.sgd,), "expected names, optax transformations or pairs .* at 0"),
        (("sgd", ("", optax.sgd(0.1))), "expected names, optax .* at 1"),
        (("sgd", ("sgd", "adam", "sam")), "expected names, optax .* at 1"),
        (("sgdd",), "make_optimizer: .*did you mean 'sgd'"),
    ],
)
def test_what_makes_no_teachers(teachers, message):
    with pytest.raises(ValueError, match=message):
        make_teachers(teachers, 4)


def in_a_scan(num_rounds):
    """Asks for a gradient in every round of a loop."""

    def update(gradient, state, params, *, grad_fn, **_):
        def again(gradient, _):
            return jax.tree.map(jnp.add, gradient, grad_fn(params, 0)), None

        return jax.lax.scan(again, gradient, length=num_rounds)[0], state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


def by_value_fn(gradient, state, params, *, value_fn, **_):
    del gradient
    return jax.grad(value_fn)(params), (state, value_fn(params))[0]


@pytest.mark.parametrize(
    "optimizer, expected",
    [
        (optax.adam(0.1), 1),
        (hub(optax.adam(0.1), pretrained_optimizer("small", 4)), 1),
        (sam(optax.sgd(0.1)), 2),
        (sam(sam(optax.sgd(0.1))), 3),
        (lgl2o(optax.adam(0.1), optax.sgd(0.1), mode="race"), 2),
        (lgl2o(optax.adam(0.1), optax.sgd(0.1), mode="candidate"), 1),
        (hub(optax.adam(0.1), sam(optax.sgd(0.1))), 2),
        (optax.MultiSteps(sam(optax.sgd(0.1)), 3), 2),
        (in_a_scan(5), 6),
        (optax.GradientTransformationExtraArgs(lambda params: (), by_value_fn), 2),
        (optax.lbfgs(), 2),
    ],
    ids=[
        "adam",
        "hub",
        "sam",
        "sam_of_sam",
        "race",
        "candidate",
        "hub_of_sam",
        "multi_steps",
        "scan",
        "value_fn",
        "lbfgs",
    ],
)
def test_gradients_of_a_step_are_those_it_is_given_and_asks_for(optimizer, expected):
    assert count_gradients(optimizer) == expected


def test_gradients_are_counted_on_the_weights_that_a_transformation_takes():
    optimizer = optax.multi_transform({"sgd": optax.sgd(0.1)}, {"a": "sgd", "b": "sgd"})
    with pytest.raises(ValueError):
        make_teachers(optimizer, 4)
    theta_0 = {"a": jnp.ones(2), "b": (jnp.ones(3), None)}
    assert make_teachers(optimizer, 4, theta_0)[0].gradients == 1
