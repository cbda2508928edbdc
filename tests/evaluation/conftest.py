"""A family of four tiny tasks whose right answers are known."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from lohp_jax.types import TaskFamily


@pytest.fixture
def family() -> TaskFamily:
    """Tasks are vectors; weights are right where their signs agree with the task's."""

    def sample(key, split="train"):
        return {"target": jax.random.normal(key, (8,))}

    def evaluate(params, data):
        hits = jnp.sign(params["w"]) == jnp.sign(data["target"])
        loss, chance = jnp.mean((params["w"] - data["target"]) ** 2), jnp.float32(0.75)
        return {"accuracy": jnp.mean(hits), "loss": loss, "chance": chance}

    return TaskFamily(
        sample,
        init=lambda key: {"w": jnp.zeros(8)},
        loss=lambda params, data, key: jnp.mean((params["w"] - data["target"]) ** 2),
        evaluate=evaluate,
        context=lambda data, key: {"seen": data["target"]},
        name="signs",
        context_loss=lambda params, context: jnp.mean((params["w"] - context["seen"]) ** 2),
    )


@pytest.fixture
def bowls(family) -> TaskFamily:
    """The same tasks, scored by an objective: how far weights are from the target."""

    def evaluate(params, data):
        distance = jnp.mean((params["w"] - data["target"]) ** 2)
        return {"objective": distance, "loss": distance}

    return dataclasses.replace(family, evaluate=evaluate, name="bowls")
