"""What networks answer, of families that only say what answers cost."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

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
    if family.context_loss is None or not family.num_classes:
        return None
    like = jax.eval_shape(lambda key: family.context(family.sample(key), key), jax.random.key(0))
    if not _labelled(like):
        return None
    sets = [name for name in like if like[name].shape[:1] == like["x"].shape[:1]]

    def predict(params, context):
        def cost(example, label):
            one = {name: value[None] for name, value in example.items()} | {"y": label[None]}
            return family.context_loss(params, {**context, **one})

        labels = jnp.arange(family.num_classes, dtype=context["y"].dtype)
        costs = jax.vmap(jax.vmap(cost, (None, 0)), (0, None))
        return jnp.argmin(costs({name: context[name] for name in sets}, labels), axis=1)

    return predict


def _labelled(like: Any) -> bool:
    if not isinstance(like, Mapping) or not {"x", "y"} <= set(like):
        return False
    if any(not hasattr(leaf, "shape") for leaf in like.values()):
        return False
    x, y = like["x"], like["y"]
    return jnp.issubdtype(y.dtype, jnp.integer) and y.shape == x.shape[:1] != ()
