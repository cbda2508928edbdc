"""Rivals that are trained over tasks: starts for gradient descent, and an embedding with class means.

MAML (Finn et al., 2017) and Reptile (Nichol et al., 2018) learn where descent on a context starts,
prototypical networks (Snell et al., 2017) an embedding in which the mean of each class classifies.
Labels go by their canonical order, in training and in use, see `lohp_jax.tasks.support`. Each training
is one compiled loop, pure in its key and rates.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from lohp_jax.baselines.heads import Head
from lohp_jax.tasks.support import canonical_order, name_canonically, relabel, support_of
from lohp_jax.types import Generator, Params, PyTree, TaskFamily

QueryLoss = Callable[[Params, PyTree, jax.Array], jax.Array]


def descend(
    family: TaskFamily,
    params: Params,
    context: PyTree,
    *,
    rate: jax.Array | float,
    num_steps: int,
    first_order: bool = False,
) -> Params:
    """Weights after `num_steps` of gradient descent on the context loss of one task.

    Args:
      family: with a `context_loss`.
      params: the start.
      context: of the task.
      rate: of descent.
      num_steps: unrolled one by one.
      first_order: whether the gradient counts as constant when this is differentiated.
    """
    for _ in range(num_steps):
        grads = jax.grad(family.context_loss)(params, context)
        if first_order:
            grads = jax.lax.stop_gradient(grads)
        params = jax.tree.map(lambda p, g: p - rate * g, params, grads)
    return params


def train_maml(
    family: TaskFamily,
    key: jax.Array,
    *,
    updates: int,
    inner_rate: jax.Array | float,
    inner_steps: int = 1,
    first_order: bool = False,
    outer_rate: float = 1e-3,
    num_tasks: int = 25,
    query_loss: QueryLoss | None = None,
) -> Params:
    """The start from which descent on a context gives the lowest loss on other examples (MAML).

    Args:
      family: with a `context_loss`.
      key: of the start, tasks, contexts and queries.
      updates: of the start, by Adam.
      inner_rate: of descent.
      inner_steps: of descent.
      first_order: leaves second derivatives out (FOMAML).
      outer_rate: of Adam; falls to zero along a cosine.
      num_tasks: per update.
      query_loss: `(params, data, key) -> scalar`; None for the loss on another context of the task.

    Returns: weights.
    """
    query_loss = _on_another_context(family) if query_loss is None else query_loss

    def task_loss(params, data, context, key):
        adapted = descend(
            family,
            params,
            context,
            rate=inner_rate,
            num_steps=inner_steps,
            first_order=first_order,
        )
        return query_loss(adapted, data, key)

    return _train(family, task_loss, key, updates, outer_rate, num_tasks)


def train_reptile(
    family: TaskFamily,
    key: jax.Array,
    *,
    updates: int,
    inner_rate: jax.Array | float,
    inner_steps: int = 5,
    outer_rate: float = 1.0,
    num_tasks: int = 25,
) -> Params:
    """The start that lies near what descent on contexts ends in (Reptile, its batched version).

    Args:
      family: with a `context_loss`.
      key: of the start, tasks and contexts.
      updates: of the start, each towards the mean of the ends.
      inner_rate: of descent.
      inner_steps: of descent, each on another context of the task.
      outer_rate: share of the way that an update goes, at first; falls to zero along a line.
      num_tasks: per update.

    Returns: weights.
    """

    def end(params, key):
        task_key, context_key, *step_keys = jax.random.split(key, inner_steps + 2)
        data, context = _draw(family, task_key, context_key)
        for step_key in step_keys:
            params = descend(family, params, context, rate=inner_rate, num_steps=1)
            context = family.context(data, step_key)
        return params

    def update(params, step):
        number, key = step
        ends = jax.vmap(end, (None, 0))(params, jax.random.split(key, num_tasks))
        share = outer_rate * (1 - number / updates)
        return jax.tree.map(lambda p, e: p + share * (e.mean(axis=0) - p), params, ends), None

    init_key, update_key = jax.random.split(key)
    steps = jnp.arange(updates), jax.random.split(update_key, updates)
    return jax.lax.scan(update, family.init(init_key), steps)[0]


def descent_from(family: TaskFamily, start: Params, *, rate: float, num_steps: int) -> Generator:
    """Generator by `num_steps` of gradient descent on the context, from a start that was learned.

    Args:
      family: with a `context_loss`.
      start: of `train_maml` or `train_reptile`.
      rate: of descent.
      num_steps: gradients that it spends on a task.
    """

    def apply(params, context, key, **_):
        ordered, rank = canonical_order(family, context)
        adapted = descend(family, params, ordered, rate=rate, num_steps=num_steps)
        return relabel(adapted, family.class_axes, rank)

    check = support_of(family).check
    return Generator(apply, start, family=family.name, check=check, gradients=num_steps)


def train_prototypes(
    family: TaskFamily,
    head: Head,
    key: jax.Array,
    *,
    updates: int,
    outer_rate: float = 1e-3,
    num_tasks: int = 25,
) -> Params:
    """Layers below the head in whose features class means classify (prototypical networks).

    Args:
      family: of labelled examples.
      head: of `linear_head`.
      key: of the start, episodes and queries.
      updates: by Adam; none where the network is its head alone.
      outer_rate: of Adam; falls to zero along a cosine.
      num_tasks: episodes per update, of one context as support and another as queries.

    Returns: weights.
    """
    query_loss = _on_another_context(family)

    def task_loss(params, data, context, key):
        return query_loss(by_class_means(family, head, params, context), data, key)

    if head.alone:
        return family.init(jax.random.split(key)[0])
    return _train(family, task_loss, key, updates, outer_rate, num_tasks)


def by_class_means(family: TaskFamily, head: Head, params: Params, context: PyTree) -> Params:
    """The head that assigns to the nearest class mean: -|f - c_k|^2 is linear up to |f|^2.

    Its columns are w_k = 2 c_k and b_k = -|c_k|^2, with c_k the mean feature of label k in the context.
    """
    features = head.features(params, context)
    member = jax.nn.one_hot(context["y"], family.num_classes, dtype=features.dtype)
    means = (member.T @ features) / jnp.maximum(member.sum(axis=0), 1)[:, None]
    return head.put(params, 2 * means.T, -jnp.sum(means**2, axis=1))


def prototypes(family: TaskFamily, head: Head, params: Params) -> Generator:
    """Generator of the family's own weights: layers shared by all tasks, and `by_class_means`.

    Args:
      family: of labelled examples.
      head: of `linear_head`.
      params: of `train_prototypes`.
    """

    def apply(params, context, key, **_):
        return by_class_means(family, head, params, context)

    check = support_of(family).check
    return Generator(apply, params, family=family.name, check=check, forward_passes=1)


def _train(
    family: TaskFamily,
    task_loss: Callable[..., jax.Array],
    key: jax.Array,
    updates: int,
    outer_rate: float,
    num_tasks: int,
) -> Params:
    """Adam on the mean of `task_loss(params, data, context, key)` over training tasks."""
    optimizer = optax.adam(optax.cosine_decay_schedule(outer_rate, updates))

    def one(params, key):
        task_key, context_key, loss_key = jax.random.split(key, 3)
        return task_loss(params, *_draw(family, task_key, context_key), loss_key)

    def update(carry, key):
        params, state = carry
        keys = jax.random.split(key, num_tasks)
        grads = jax.grad(lambda p: jnp.mean(jax.vmap(one, (None, 0))(p, keys)))(params)
        steps, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, steps), state), None

    init_key, update_key = jax.random.split(key)
    params = family.init(init_key)
    start = (params, optimizer.init(params))
    return jax.lax.scan(update, start, jax.random.split(update_key, updates))[0][0]


def _draw(family: TaskFamily, task_key: jax.Array, context_key: jax.Array) -> tuple[PyTree, PyTree]:
    """A training task and a context of it, by which its labels are named."""
    data = name_canonically(family, family.sample(task_key), context_key)
    return data, family.context(data, context_key)


def _on_another_context(family: TaskFamily) -> QueryLoss:
    return lambda params, data, key: family.context_loss(params, family.context(data, key))
