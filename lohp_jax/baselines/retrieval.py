"""Copying the weights of the nearest training task."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp

from lohp_jax.tasks.support import check_context, class_means, relabel
from lohp_jax.types import Generator, Params, TaskFamily

_MOST_ORDERS = 720


def nearest_task(family: TaskFamily, contexts: dict, weights: Params) -> Generator:
    """Generator that returns the stored weights of the task whose support looks most alike.

    Tasks are compared by the squared distance between the mean support images of their labels, under
    the renaming of labels that brings them closest (up to six labels; otherwise in the order given);
    the stored weights are renamed with them.

    Args:
      family: gives the number of labels and the class axes.
      contexts: of the stored tasks, leading axis R.
      weights: end weights of the stored tasks, leading axis R.
    """
    labels = range(family.num_classes)
    renamed = math.factorial(family.num_classes) <= _MOST_ORDERS
    orders = jnp.array(list(itertools.permutations(labels)) if renamed else [labels])
    renaming = jax.nn.one_hot(orders, family.num_classes)
    keys = jax.vmap(lambda c: class_means(c, family.num_classes))(contexts)

    def apply(params, context, key, **_):
        stored, weights = params
        query = class_means(context, family.num_classes)
        distance = jnp.sum((query[None, :, None] - stored[:, None]) ** 2, axis=-1)
        totals = jnp.einsum("rcd,ocd->ro", distance, renaming, precision="highest")
        task, order = jnp.unravel_index(jnp.argmin(totals), totals.shape)
        nearest = jax.tree.map(lambda leaf: leaf[task], weights)
        return relabel(nearest, family.class_axes, orders[order])

    check = functools.partial(
        check_context, num_classes=family.num_classes, image_shape=contexts["images"].shape[2:]
    )
    return Generator(apply, (keys, weights), family=family.name, check=check)
