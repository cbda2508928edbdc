"""The linear layer at the end of a classifier, found in a family that hands out its loss alone."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lohp_jax.types import Params, PyTree, TaskFamily


class Head(NamedTuple):
    """A classifier as features and a linear layer, `logits = features @ w + b`.

    Attributes:
      features: `(params, context) -> [n, F]` of the examples of a context.
      put: `(params, w [F, labels], b [labels]) -> params` with another layer.
      alone: whether the network is this layer and nothing else.
    """

    features: Callable[[Params, PyTree], jax.Array]
    put: Callable[[Params, jax.Array, jax.Array], Params]
    alone: bool


def linear_head(family: TaskFamily) -> Head | None:
    """The linear layer of a family's network, if it ends in one.

    It is the layer of the leaves that count labels, w `[F, labels]` and b `[labels]`. Features come from
    the cross-entropy at w = 0 and b = 0: its gradient with regard to the column of w of a label that the
    example does not have is features / labels. That they make up the family's `context_loss` is tried on
    one task.

    Returns: None for a family without labels, class axes or a `context_loss`, or with another layer or
      loss at its end.
    """
    entries = example_entries(family)
    if entries is None or family.class_axes is None:
        return None
    axes, structure = jax.tree.flatten(family.class_axes)
    shapes = jax.tree.leaves(jax.eval_shape(family.init, jax.random.key(0)))
    found = {len(shapes[i].shape): i for i, axis in enumerate(axes) if axis >= 0}
    if sorted(found) != [1, 2] or axes[found[2]] != 1 or sum(axis >= 0 for axis in axes) != 2:
        return None

    def put(params, w, b):
        leaves = list(structure.flatten_up_to(params))
        leaves[found[2]], leaves[found[1]] = w, b
        return structure.unflatten(leaves)

    def features(params, context):
        def of_one(example):
            one = {name: value[None] for name, value in example.items()}
            one["y"] = jnp.zeros_like(one["y"])
            w, b = (jnp.zeros(shapes[found[i]].shape, shapes[found[i]].dtype) for i in (2, 1))
            gradient = jax.grad(lambda w: family.context_loss(put(params, w, b), context | one))(w)
            return family.num_classes * gradient[:, 1]

        return jax.vmap(of_one)({name: context[name] for name in entries})

    head = Head(features, put, alone=len(axes) == 2)
    return head if family.num_classes > 1 and _fits(family, head) else None


def example_entries(family: TaskFamily) -> list[str] | None:
    """Entries of a context that describe examples, in a family of labelled ones; None in others.

    Those are the entries with the leading axis of "x"; the labels are the integers "y" `[n]`.
    """
    if family.context_loss is None or not family.num_classes:
        return None
    like = jax.eval_shape(lambda key: family.context(family.sample(key), key), jax.random.key(0))
    if not isinstance(like, Mapping) or not {"x", "y"} <= set(like) or not _arrays(like):
        return None
    x, y = like["x"], like["y"]
    if not jnp.issubdtype(y.dtype, jnp.integer) or not y.shape == x.shape[:1] != ():
        return None
    return [name for name in like if like[name].shape[:1] == y.shape]


def _arrays(like: Mapping[str, Any]) -> bool:
    return all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in like.values())


def _fits(family: TaskFamily, head: Head) -> bool:
    """Whether features and a random layer give the context loss of one task."""

    @jax.jit
    def both(key):
        task_key, context_key, init_key, w_key, b_key = jax.random.split(key, 5)
        context = family.context(family.sample(task_key), context_key)
        params = family.init(init_key)
        features = head.features(params, context)
        scale = jnp.sqrt(jnp.mean(features**2) * features.shape[1]) + 1e-6
        w = jax.random.normal(w_key, (features.shape[1], family.num_classes)) / scale
        b = jax.random.normal(b_key, (family.num_classes,))
        logits = features @ w + b[None]
        wanted = optax.softmax_cross_entropy_with_integer_labels(logits, context["y"]).mean()
        return wanted, family.context_loss(head.put(params, w, b), context)

    wanted, got = both(jax.random.key(0))
    return bool(np.isclose(wanted, got, rtol=1e-3))
