import functools

import jax
import numpy as np
import pytest

from lohp_jax.data import digits
from lohp_jax.tasks import FAMILIES, make_family

NUM_TASKS = 600
OF_CLASSES = ("digits_5way", "digits_partitions")


@jax.jit(static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, 0))
def sample_both(family, key):
    return family.sample(key, "train"), family.sample(key, "held_out")


def sampled_tasks(family):
    """Tasks of both splits, each as the set of its labels' classes: as it is under any names."""
    keys = jax.random.split(jax.random.key(0), NUM_TASKS)
    for data in jax.device_get(sample_both(family, keys)):
        yield {
            frozenset(frozenset(c[labels == n].tolist()) for n in range(family.num_classes))
            for c, labels in zip(data["classes"], data["labels"], strict=True)
        }


def classes_of(tasks):
    return frozenset().union(*(side for task in tasks for side in task))


@pytest.mark.parametrize("name", OF_CLASSES)
def test_splits_share_no_task(name):
    train, held_out = sampled_tasks(make_family(name))
    assert not train & held_out
    assert classes_of(train) == classes_of(held_out) == set(range(10))


@pytest.mark.parametrize("name", OF_CLASSES)
def test_held_out_classes_are_never_trained_on(name):
    train, held_out = sampled_tasks(make_family(name, holdout="classes", seed=1))
    unseen = set(range(10)) - classes_of(train)
    assert len(unseen) == 3
    assert all(unseen <= classes_of([task]) for task in held_out)


@pytest.mark.parametrize("name, num_labels", [("digits_5way", 5), ("digits_partitions", 2)])
def test_defaults_of_the_family(name, num_labels):
    family = make_family(name)
    assert (family.name, family.num_classes) == (name, num_labels)
    context = family.context(family.sample(jax.random.key(0)), jax.random.key(1))
    assert context["x"].shape == (num_labels * FAMILIES[name].shots, 8, 8, 1)
    expected = make_family(name, network=FAMILIES[name].network).class_axes
    assert family.class_axes == expected


@pytest.mark.parametrize("shots", [1, 100])
def test_the_size_of_the_support_is_an_option(shots):
    family = make_family("digits_5way", shots=shots)
    context = family.context(family.sample(jax.random.key(0)), jax.random.key(1))
    assert context["x"].shape[0] == 5 * shots
    pool = {image.tobytes() for image in digits().train.reshape(-1, 64)}
    assert all(np.asarray(image).tobytes() in pool for image in context["x"])


def test_the_number_of_classes_is_an_option():
    family = make_family("digits_5way", way=3)
    assert family.num_classes == 3
    assert family.sample(jax.random.key(0))["classes"].shape == (3,)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("digits_5wya", {}, "make_family: .*got 'digits_5wya'; did you mean 'digits_5way'"),
        ("partitions", {}, "did you mean 'digits_partitions'"),
        ("digits_5way", {"network": "mpl"}, "make_network: .*did you mean 'mlp'"),
        ("digits_5way", {"network": ""}, "make_network: .*got ''"),
        ("digits_5way", {"holdout": "all"}, "make_family: holdout must be .* got 'all'"),
        ("digits_5way", {"teacher_data": "some"}, "image_family: teacher_data .* got 'some'"),
        ("digits_5way", {"shots": 0}, "image_family: shots .* got 0"),
        ("digits_5way", {"shots": 101}, "image_family: shots must be between 1 and 100"),
        (
            "digits_5way",
            {"image_size": 14},
            "image_set: expected no image_size with 'digits', .* 8 x 8",
        ),
        (
            "digits_partitions",
            {"way": 3},
            "'digits_partitions' takes no way, got 3; .*'digits_5way'",
        ),
        ("digits_5way", {"backbone": "b"}, "takes no backbone, got 'b'; .*'omniglot_heads'"),
        ("transfer", {"holdout": "tasks"}, "'transfer' holds out whole classes, got .*'tasks'"),
        ("digits_5way", {"domain": "45"}, "takes no domain, got '45'; .*'domains'"),
        ("domains", {"domain": "44"}, "domain_family: .*got '44'; did you mean '45'"),
        (
            "domains",
            {"holdout": "classes"},
            "make_family: 'domains' holds out a domain .*'classes'",
        ),
        ("domains", {"data": "mnist"}, "domain_set: expected source .*'folder:PATH', got 'mnist'"),
        (
            "digits_5way",
            {"wya": 3},
            "make_family: an option must be .* got 'wya'; did you mean 'way'",
        ),
        ("digits_5way", {"data": "mnist"}, "image_set: expected source .* got 'mnist'"),
    ],
)
def test_make_family_rejects(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_family(name, **options)
