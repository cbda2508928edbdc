"""One pure update of any learned method."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lohp_jax.methods.common import Loss
from lohp_jax.trajectories.dataset import Dataset
from lohp_jax.types import Example, PyTree, TaskFamily, View


class TrainState(NamedTuple):
    """Everything that an update changes.

    Attributes:
      params: of the method.
      opt_state: of the optimizer.
      step: int32 scalar, updates so far.
    """

    params: dict
    opt_state: optax.OptState
    step: jax.Array


class Batch(NamedTuple):
    """Which examples an update sees; every example has its own key, wherever it is computed.

    Attributes:
      index: `[B]` int32, rows of the data set.
      key: `[B]` keys.
      tokens: `[B, N + 1, size, channels]`, where the data set leaves them in a store.
      view: the windows that these are of; leading axis B.
      around: `[B, N + 1, length, channels]`, see `Example`.
    """

    index: jax.Array
    key: jax.Array
    tokens: jax.Array | None = None
    view: View | None = None
    around: jax.Array | None = None


def make_update(
    family: TaskFamily, loss: Loss, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Builds `update(state, batch, dataset, axis_name=None) -> (state, metrics)`, pure.

    The support of each example is drawn anew from its task with the example's key. The gradient is
    that of two half-batches, every other example in each, whose agreement gives `gradient_snr`, the
    ratio of the norms of the mean gradient's signal and noise.

    Metrics: `loss`, `gradient_norm`, `gradient_snr`, and the means of what the loss reports.

    `update` raises ValueError for an odd number of examples, on each device under `pmap`.
    """

    def loss_fn(params, batch, dataset):
        def of_example(index, key, tokens, view, around):
            context_key, key = jax.random.split(key)
            example = example_at(family, dataset, index, context_key)
            if view is not None:
                example = example._replace(tokens=tokens, view=view, around=around)
            return loss(params, example, key)

        losses, info = jax.vmap(of_example)(*batch)
        return jnp.mean(losses), jax.tree.map(lambda leaf: leaf.mean(axis=0), info)

    def update(state, batch, dataset, axis_name=None):
        if len(batch.index) % 2:
            raise ValueError(
                f"update: expected an even number of examples on each device, got {len(batch.index)}; "
                "choose a batch size that is a multiple of twice the number of devices."
            )
        halves = jax.tree.map(
            lambda leaf: leaf.reshape(-1, 2, *leaf.shape[1:]).swapaxes(0, 1), batch
        )
        grad_fn = jax.vmap(jax.value_and_grad(loss_fn, has_aux=True), (None, 0, None))
        (loss, info), grads = grad_fn(state.params, halves, dataset)
        loss, info = jax.tree.map(lambda leaf: leaf.mean(axis=0), (loss, info))
        if axis_name is not None:
            grads, loss, info = jax.lax.pmean((grads, loss, info), axis_name)
        mean = jax.tree.map(lambda g: g.mean(axis=0), grads)
        updates, opt_state = optimizer.update(mean, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(mean), **info}
        metrics["gradient_snr"] = _signal_to_noise(grads)
        return TrainState(params, opt_state, state.step + 1), metrics

    return update


def example_at(
    family: TaskFamily, dataset: Dataset, index: jax.Array | int, key: jax.Array
) -> Example:
    """Row `index` of the data set, with a context that `key` draws from its task."""
    data, tokens = jax.tree.map(lambda leaf: leaf[index], (dataset.data, dataset.tokens))
    return Example(tokens, dataset.teacher[index], family.context(data, key), data)


def draw_batches(
    key: jax.Array, dataset: Dataset, first_step: jax.Array, *, num_steps: int, batch_size: int
) -> Batch:
    """Batches `[num_steps, batch_size]` of steps `first_step` and on; step t depends on t alone."""

    def draw(step):
        index_key, example_key = jax.random.split(jax.random.fold_in(key, step))
        index = jax.random.randint(index_key, (batch_size,), 0, len(dataset.teacher))
        return Batch(index, jax.random.split(example_key, batch_size))

    return jax.vmap(draw)(first_step + jnp.arange(num_steps))


def _signal_to_noise(grads: PyTree) -> jax.Array:
    """`[2, ...]` gradients of two half-batches -> |signal| / |noise| of their mean."""
    first = jax.tree.map(lambda g: g[0], grads)
    second = jax.tree.map(lambda g: g[1], grads)
    signal = jnp.maximum(optax.tree.vdot(first, second), 0.0)
    difference = optax.tree.norm(optax.tree.sub(first, second))
    return jnp.sqrt(signal) / jnp.maximum(difference / 2, jnp.finfo(jnp.float32).tiny)
