"""What networks answer, of families that only say what answers cost."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lohp_jax.baselines.heads import example_entries
from lohp_jax.types import Params, PyTree, TaskFamily


def make_predictor(family: TaskFamily) -> Callable[[Params, PyTree], jax.Array] | None:
    """The labels that a network gives to the examples of a context.

    The prediction for an example is the label with which `context_loss` of this example alone is
    least: for a cross-entropy, the likeliest.

    Args:
      family: whose contexts are `{"x": [n, ...], "y": [n] labels, ...}`.

    Returns: `(params, context) -> [n]` int32; None for a family without such contexts, without
      `num_classes` or without a `context_loss`.
    """
    if (entries := example_entries(family)) is None:
        return None

    def predict(params, context):
        def cost(example, label):
            one = {name: value[None] for name, value in example.items()} | {"y": label[None]}
            return family.context_loss(params, {**context, **one})

        labels = jnp.arange(family.num_classes, dtype=context["y"].dtype)
        costs = jax.vmap(jax.vmap(cost, (None, 0)), (0, None))
        return jnp.argmin(costs({name: context[name] for name in entries}, labels), axis=1)

    return predict
