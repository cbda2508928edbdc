"""Copying the weights of the nearest training task."""

import itertools
import math

import jax
import jax.numpy as jnp

from lohp_jax.tasks.support import relabel, support_of
from lohp_jax.types import Generator, Params, PyTree, TaskFamily

_MOST_ORDERS = 720


def nearest_task(family: TaskFamily, contexts: PyTree, weights: Params) -> Generator:
    """Generator that returns the stored weights of the task whose context looks most alike.

    Tasks are compared by the squared distance between `Support.describe` of their contexts. Where labels
    have class axes, it is that under the renaming of labels that brings them closest (up to six labels;
    otherwise in the order given); the stored weights are renamed with them.

    Args:
      family: says how contexts are read, and gives the class axes.
      contexts: of the stored tasks, leading axis R.
      weights: end weights of the stored tasks, leading axis R.
    """
    support = support_of(family)
    stored = jax.jit(jax.vmap(support.describe))(contexts)
    class_axes = _class_axes(family)
    orders = renamings(family, stored.shape[1])

    def apply(params, context, key, **_):
        stored, weights = params
        totals = _squared_distances(support.describe(context), stored, orders)
        task, order = jnp.unravel_index(jnp.argmin(totals), totals.shape)
        nearest = jax.tree.map(lambda leaf: leaf[task], weights)
        return relabel(nearest, class_axes, orders[order])

    return Generator(apply, (stored, weights), family=family.name, check=support.check)


def task_distance(family: TaskFamily, stored: PyTree, contexts: PyTree) -> jax.Array:
    """How far tasks are from the nearest stored one, as `nearest_task` compares them.

    Args:
      family: says how contexts are read, and gives the class axes.
      stored: contexts of the stored tasks, leading axis R.
      contexts: of the tasks, leading axis S.

    Returns: `[S]` root mean squares over the numbers of `Support.describe`.
    """
    describe = jax.jit(jax.vmap(support_of(family).describe))
    stored, queries = describe(stored), describe(contexts)
    orders = renamings(family, stored.shape[1])
    nearest = jax.jit(lambda query: jnp.min(_squared_distances(query, stored, orders)))
    return jnp.sqrt(jax.lax.map(nearest, queries) / queries[0].size)


def _class_axes(family: TaskFamily) -> PyTree | None:
    return family.class_axes if support_of(family).order is not None else None


def renamings(family: TaskFamily, num_labels: int) -> jax.Array:
    """`[O, labels]` the renamings of labels that tasks are compared under.

    Those of up to six labels whose names mean nothing; otherwise the names as they are.
    """
    renamed = _class_axes(family) is not None and math.factorial(num_labels) <= _MOST_ORDERS
    labels = range(num_labels)
    return jnp.array(list(itertools.permutations(labels)) if renamed else [labels])


def _squared_distances(query: jax.Array, stored: jax.Array, orders: jax.Array) -> jax.Array:
    """`[R, O]` of one description from the stored ones, under each renaming."""
    renaming = jax.nn.one_hot(orders, orders.shape[1])
    distance = jnp.sum((query[None, :, None] - stored[:, None]) ** 2, axis=-1)
    return jnp.einsum("rcd,ocd->ro", distance, renaming, precision="highest")
