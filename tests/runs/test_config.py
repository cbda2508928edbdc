"""Settings survive the disk, and a mistake in them is named at once."""

import dataclasses
import json
import re

import pytest

from lohp_jax.methods import METHODS
from lohp_jax.networks.policy import NetworkConfig
from lohp_jax.policy.config import HybridConfig
from lohp_jax.runs.config import (
    EvaluationConfig,
    FamilyConfig,
    PrepareConfig,
    RunConfig,
    TrainingConfig,
    from_json,
    resolve,
    to_json,
)
from lohp_jax.tasks import FAMILIES

EVERYTHING_SET = RunConfig(
    family="digits_partitions",
    seed=3,
    methods=("cloning", "lohp"),
    tasks=FamilyConfig("tfds:mnist", "/data", 14, "conv", 5, "support", "classes", 32),
    prepare=PrepareConfig(7, ("adam", "sgd:0.5"), 12, "independent", 0.5),
    network=NetworkConfig("mlp", (8, 16), 12),
    balance=HybridConfig(reward="end", perturb=False, lambda_=0.5),
    training=TrainingConfig(3, "loss", 4, batch_size=8, anchor=0.5),
    evaluation=EvaluationConfig(9),
)


@pytest.mark.parametrize("config", [RunConfig(), resolve(RunConfig()), EVERYTHING_SET])
def test_config_survives_json(config):
    text = json.dumps(to_json(config), allow_nan=False)
    restored = from_json(json.loads(text))
    assert restored == config and hash(restored) == hash(config)
    assert isinstance(restored.network.widths, tuple)


def test_fields_left_out_take_their_defaults():
    assert from_json({"seed": 4, "training": {"clip_norm": 2}}) == RunConfig(
        seed=4, training=TrainingConfig(clip_norm=2.0)
    )


@pytest.mark.parametrize(
    "values, path, nearest",
    [
        ({"famly": "digits_5way"}, "config", "family"),
        ({"tasks": {"shot": 1}}, "config.tasks", "shots"),
        ({"prepare": {"num_task": 5}}, "config.prepare", "num_tasks"),
        ({"network": {"width": [8]}}, "config.network", "widths"),
        ({"balance": {"lambda": 0.9}}, "config.balance", "lambda_"),
        ({"training": {"learning-rate": 1.0}}, "config.training", "learning_rate"),
        ({"evaluation": {"tasks": 5}}, "config.evaluation", "num_tasks"),
    ],
)
def test_unknown_field_is_named_with_the_nearest(values, path, nearest):
    message = rf"^{re.escape(path)}: a field must be one of .*; did you mean '{nearest}'\?"
    with pytest.raises(ValueError, match=message):
        from_json(values)


@pytest.mark.parametrize(
    "values, message",
    [
        ([], r"config: expected a group of fields, got \[\]"),
        ({"tasks": 3}, r"config\.tasks: expected a group of fields, got 3"),
        ({"seed": "0"}, r"config\.seed: expected int, got '0'"),
        ({"seed": 1.5}, r"config\.seed: expected int, got 1\.5"),
        ({"seed": True}, r"config\.seed: expected int, got True"),
        ({"seed": None}, r"config\.seed: expected int, got None"),
        ({"family": 5}, r"config\.family: expected str, got 5"),
        ({"methods": "lohp"}, r"config\.methods: expected a list, got 'lohp'"),
        ({"methods": ["lohp", 1]}, r"config\.methods\[1\]: expected str, got 1"),
        ({"network": {"widths": [8, "x"]}}, r"config\.network\.widths\[1\]: expected int"),
        ({"balance": {"perturb": 1}}, r"config\.balance\.perturb: expected bool, got 1"),
        ({"training": {"anchor": True}}, r"config\.training\.anchor: expected float, got True"),
        ({"training": {"matching": "loss_"}}, r"matching: expected one of \('uniform'.*'loss_'"),
        ({"prepare": {"optimizers": "adam"}}, r"prepare\.optimizers: expected a list, got 'adam'"),
        ({"tasks": {"network": "cnn"}}, r"tasks\.network: expected one of \('linear'.*'cnn'"),
    ],
)
def test_wrong_type_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        from_json(values)


@pytest.mark.parametrize(
    "kind, values, message",
    [
        (PrepareConfig, {"num_tasks": 1}, "num_tasks must be at least 2, got 1"),
        (PrepareConfig, {"num_steps": 0}, "num_steps must be at least 1, got 0"),
        (PrepareConfig, {"optimizers": ()}, "number of optimizers must be at least 1, got 0"),
        (PrepareConfig, {"start": "share"}, "start must be 'shared' or 'independent', got 'share'"),
        (PrepareConfig, {"start_noise": -1.0}, "start_noise must be finite and not negative"),
        (PrepareConfig, {"start_noise": float("nan")}, "start_noise must be finite"),
        (TrainingConfig, {"compression": 0}, "compression must be at least 1, got 0"),
        (TrainingConfig, {"updates": 0}, "updates must be at least 1, got 0"),
        (TrainingConfig, {"log_every": 0}, "log_every must be at least 1, got 0"),
        (TrainingConfig, {"batch_size": 3}, "batch_size must be even and at least 2, got 3"),
        (TrainingConfig, {"batch_size": 0}, "batch_size must be even and at least 2, got 0"),
        (TrainingConfig, {"learning_rate": 0.0}, "learning_rate must be finite and positive"),
        (TrainingConfig, {"learning_rate": float("inf")}, "learning_rate must be finite"),
        (TrainingConfig, {"clip_norm": float("nan")}, "clip_norm must be finite and positive"),
        (TrainingConfig, {"anchor": -0.1}, "anchor must be finite and not negative, got -0.1"),
        (TrainingConfig, {"consolidation": -1.0}, "consolidation must be finite and not negative"),
        (TrainingConfig, {"log_every": 30}, "checkpoint_every must be a multiple of log_every=30"),
        (EvaluationConfig, {"num_tasks": 1}, "num_tasks must be at least 2, got 1"),
        (RunConfig, {"seed": -1}, "seed must be at least 0, got -1"),
        (RunConfig, {"methods": ()}, r"must name one at least and none of them twice, got \(\)"),
        (RunConfig, {"methods": ("lohp", "lohp")}, "none of them twice"),
        (RunConfig, {"methods": ("lohpp",)}, "got 'lohpp'; did you mean 'lohp'"),
        (RunConfig, {"methods": ("lohp", "clonning")}, "got 'clonning'; did you mean 'cloning'"),
    ],
)
def test_what_makes_no_sense_is_refused(kind, values, message):
    with pytest.raises(ValueError, match=message):
        kind(**values)


def test_every_method_can_be_asked_for():
    config = RunConfig(methods=tuple(METHODS))
    made = {name: config.method(name) for name in METHODS}
    assert len({method.name for method in made.values()}) == len(METHODS)
    for name, method in made.items():
        assert method.config["network"] == dataclasses.asdict(config.network), name


def test_a_method_takes_the_settings_that_concern_it():
    config = RunConfig(
        network=NetworkConfig("mlp", widths=(8,)),
        balance=HybridConfig(lambda_=0.5),
        training=TrainingConfig(anchor=0.25, consolidation=2.0),
    )
    settings = config.method("lohp_consolidated").config
    assert settings["anchor"] == 0.25 and settings["consolidation"] == 2.0
    assert settings["balance"]["lambda_"] == 0.5 and settings["network"]["widths"] == (8,)
    assert "anchor" not in config.method("cloning").config


@pytest.mark.parametrize("family", FAMILIES)
def test_resolve_fills_what_is_unset(family):
    config = resolve(RunConfig(family=family))
    assert config.tasks.network == FAMILIES[family].network
    assert config.tasks.shots == FAMILIES[family].shots
    for section, fields in (
        (config.prepare, ("optimizers", "num_steps")),
        (config.training, ("compression", "updates")),
    ):
        assert all(getattr(section, field) is not None for field in fields)
    assert resolve(config) == config


def test_resolve_leaves_what_is_set():
    assert resolve(EVERYTHING_SET) == EVERYTHING_SET
    some = RunConfig(training=TrainingConfig(updates=7), prepare=PrepareConfig(num_steps=40))
    resolved = resolve(some)
    assert (resolved.training.updates, resolved.prepare.num_steps) == (7, 40)
    assert resolved.training.compression == resolve(RunConfig()).training.compression


def test_compression_must_divide_the_steps():
    config = RunConfig(prepare=PrepareConfig(num_steps=12), training=TrainingConfig(compression=5))
    with pytest.raises(
        ValueError, match=r"must divide num_steps=12, got 5; .*\[1, 2, 3, 4, 6, 12\]"
    ):
        resolve(config)
    with pytest.raises(ValueError, match=r"got 24"):
        resolve(dataclasses.replace(config, training=TrainingConfig(compression=24)))


@pytest.mark.parametrize(
    "given, nearest", [("digits_5wy", "digits_5way"), ("partitions", "digits_partitions")]
)
def test_unknown_family_is_named_with_the_nearest(given, nearest):
    with pytest.raises(ValueError, match=rf"got '{given}'; did you mean '{nearest}'\?"):
        resolve(RunConfig(family=given))


def test_a_family_of_ones_own_has_defaults_and_no_settings_of_the_tables():
    config = resolve(RunConfig(family="mine.py:family"))
    assert config.prepare.optimizers == ("adam:0.01",) and config.training.updates == 1000
    assert resolve(config) == config and config.tasks == FamilyConfig()
    with pytest.raises(ValueError, match=r"tasks\.\* are settings of .*with 'mine\.py:family'"):
        resolve(RunConfig(family="mine.py:family", tasks=FamilyConfig(shots=5)))


def test_what_concerns_preparation_and_training_is_handed_on():
    config = resolve(EVERYTHING_SET)
    given = dataclasses.asdict(config.fitting())
    asked = dataclasses.asdict(config.prepare) | dataclasses.asdict(config.training)
    assert given.items() <= asked.items() and given["num_tasks"] == 7 and given["compression"] == 3
