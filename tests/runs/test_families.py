import dataclasses

import jax
import pytest

from lohp_jax.runs.config import FamilyConfig, RunConfig, resolve
from lohp_jax.runs.families import family_of

CONFIG = resolve(RunConfig())


def test_family_follows_the_config_and_is_made_once():
    family = family_of(CONFIG)
    assert family_of(CONFIG) is family
    changed = dataclasses.replace(CONFIG, tasks=FamilyConfig(network="mlp", shots=3))
    other = family_of(changed)
    data = other.sample(jax.random.key(0))
    assert other.context(data, jax.random.key(1))["x"].shape[0] == 15
    first, second = (jax.eval_shape(f.init, jax.random.key(0)) for f in (family, other))
    assert first.keys() != second.keys()


@pytest.mark.parametrize(
    "tasks, message",
    [
        (FamilyConfig(shots=0), "shots must be between 1 and"),
        (FamilyConfig(batch_size=0), "batch_size must be at least 1, got 0"),
        (FamilyConfig(data="mnist"), "'digits' or 'tfds:NAME', got 'mnist'"),
    ],
)
def test_tasks_that_do_not_exist(tasks, message):
    with pytest.raises(ValueError, match=message):
        family_of(dataclasses.replace(CONFIG, tasks=tasks))
