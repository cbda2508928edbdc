"""Meta-training of learned optimizers by persistent evolution strategies (PES).

A meta-loss is the inner loss along an unroll of hundreds of steps. PES (Vicol et al., 2021, arXiv
2112.13835) moves the meta-parameters after every few of them, and stays unbiased by multiplying each
partial loss with all perturbations that its unroll has seen so far. Nothing is differentiated.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from lohp_jax.optimizers.extra_args import with_extra_args
from lohp_jax.types import Params, PyTree, TaskFamily

LARGEST_LOSS = 10.0
"""What an inner loss above it, or one that is not a number, counts as."""


class Unroll(NamedTuple):
    """A long computation that meta-parameters steer, cut into truncations.

    Attributes:
      start: `(meta, key, portion) -> state`; of `meta` it uses shapes alone. The unroll ends after
        `portion` in (0, 1] of its length, so that several can be started at different phases.
      advance: `(meta, state, key, step_key) -> (state, loss, done)`, one truncation; `key` is that of
        `start` and stays, `step_key` is new.
    """

    start: Callable[[PyTree, jax.Array, jax.Array], PyTree]
    advance: Callable[..., tuple[PyTree, jax.Array, jax.Array]]


class Pair(NamedTuple):
    """Two copies of one unroll under opposite perturbations.

    Attributes:
      states: of the unroll, leading axis 2.
      drift: like the meta-parameters, the sum of the first copy's perturbations since its start.
      key: of the unroll.
    """

    states: PyTree
    drift: PyTree
    key: jax.Array


def start_pairs(unroll: Unroll, meta: PyTree, key: jax.Array, num_pairs: int) -> Pair:
    """`num_pairs` pairs; the i-th ends its first unroll at i / `num_pairs` of it, to be out of step."""
    portions = (1.0 + jnp.arange(num_pairs)) / num_pairs
    keys = jax.random.split(key, num_pairs)
    return jax.vmap(lambda k, portion: _start(unroll, meta, k, portion))(keys, portions)


def advance_pair(
    unroll: Unroll, meta: PyTree, pair: Pair, key: jax.Array, *, sigma: float
) -> tuple[Pair, PyTree, jax.Array]:
    """One truncation of a pair and its estimate of the meta-gradient.

    With perturbations +e_t and -e_t, e_t ~ N(0, sigma²), in truncation t and losses L+ and L-:
    gradient = (L+ - L-) / (2 sigma²) * (e_1 + ... + e_t).

    Returns: the pair, started anew where its unroll ended; the estimate; the mean of both losses.
    """
    noise_key, step_key, start_key = jax.random.split(key, 3)
    flat, unravel = ravel_pytree(meta)
    noise = unravel(sigma * jax.random.normal(noise_key, flat.shape, flat.dtype))
    perturbed = jax.tree.map(lambda m, e: jnp.stack([m + e, m - e]), meta, noise)
    both = jax.vmap(unroll.advance, (0, 0, None, None))
    states, losses, done = both(perturbed, pair.states, pair.key, step_key)
    drift = optax.tree.add(pair.drift, noise)
    gradient = optax.tree.scale((losses[0] - losses[1]) / (2 * sigma**2), drift)
    fresh = _start(unroll, meta, start_key, jnp.ones(()))
    kept = Pair(states, drift, pair.key)
    return jax.tree.map(lambda f, k: jnp.where(done[0], f, k), fresh, kept), gradient, losses.mean()


class Training(NamedTuple):
    """State of the unroll of `training_unroll`.

    Attributes:
      weights: of the task's network, each divided by its `scale`.
      opt_state: of the learned optimizer.
      scale: a positive scalar for every tensor.
      step: int32 scalar, inner steps so far.
      num_steps: int32 scalar, the length that the learned optimizer is told.
      stop: int32 scalar, where the unroll ends.
    """

    weights: Params
    opt_state: optax.OptState
    scale: PyTree
    step: jax.Array
    num_steps: jax.Array
    stop: jax.Array


def training_unroll(
    family: TaskFamily,
    make_optimizer: Callable[[PyTree, jax.Array], optax.GradientTransformation],
    *,
    truncation: int,
    lengths: tuple[int, int],
    scale_range: float = 1.0,
    query_weight: float = 0.0,
) -> Unroll:
    """Training on a random task of a family, by an optimizer with meta-parameters.

    The loss of a truncation is (1 - w) * mean training loss along it + w * loss on the task's query
    examples at its end, w = `query_weight`; both as `bounded` has them.

    Args:
      family: tasks are sampled from its split "train".
      make_optimizer: `(meta, num_steps) -> optimizer`, both arguments traced.
      truncation: inner steps.
      lengths: the shortest and longest unroll; lengths are log-uniform multiples of `truncation`.
      scale_range: r >= 1; every tensor is trained divided by a factor that is log-uniform in
        [1 / r, r], which changes the task for the optimizer but not its solutions.
      query_weight: w in [0, 1].

    Raises: ValueError for settings that make no sense.
    """
    _check_unroll(truncation, lengths, scale_range, query_weight)
    fewest, most = (n // truncation for n in lengths)

    def start(meta, key, portion):
        _, length_key, init_key, scale_key = jax.random.split(key, 4)
        log_length = jax.random.uniform(
            length_key, minval=math.log(fewest), maxval=math.log(most + 1)
        )
        count = jnp.clip(jnp.int32(jnp.exp(log_length)), fewest, most)
        params = family.init(init_key)
        scale = _draw_scale(scale_key, params, scale_range)
        weights = jax.tree.map(jnp.divide, params, scale)
        num_steps = count * truncation
        opt_state = make_optimizer(meta, num_steps).init(weights)
        stop = jnp.int32(jnp.ceil(portion * count)) * truncation
        step = jnp.zeros((), jnp.int32)
        return Training(weights, opt_state, scale, step, num_steps, stop)

    def advance(meta, state, key, step_key):
        data = family.sample(jax.random.split(key, 4)[0], "train")
        optimizer = with_extra_args(make_optimizer(meta, state.num_steps))

        keys = jax.random.split(step_key, truncation)
        (weights, opt_state), losses = _train_on(family, optimizer, data, state, keys)
        loss = losses.mean()
        if query_weight:
            params = jax.tree.map(jnp.multiply, weights, state.scale)
            query = bounded(family.evaluate(params, data)["loss"])
            loss = (1 - query_weight) * loss + query_weight * query
        reached = state.step + truncation
        state = state._replace(weights=weights, opt_state=opt_state, step=reached)
        return state, loss, reached >= state.stop

    return Unroll(start, advance)


def _train_on(
    family: TaskFamily,
    optimizer: optax.GradientTransformationExtraArgs,
    data: PyTree,
    state: Training,
    keys: jax.Array,
) -> tuple[tuple[Params, optax.OptState], jax.Array]:
    """Weights and state of the optimizer after a step for each key, and the losses on the way."""

    def loss_fn(weights, key):
        return family.loss(jax.tree.map(jnp.multiply, weights, state.scale), data, key)

    def step(carry, key):
        weights, opt_state = carry
        value, gradients = jax.value_and_grad(loss_fn)(weights, key)
        updates, opt_state = optimizer.update(gradients, opt_state, weights, value=value)
        return (optax.apply_updates(weights, updates), opt_state), bounded(value)

    return jax.lax.scan(step, (state.weights, state.opt_state), keys)


def bounded(loss: jax.Array) -> jax.Array:
    """A loss as it counts: at most `LARGEST_LOSS`, which NaN counts as, too."""
    return jnp.where(jnp.isnan(loss), LARGEST_LOSS, jnp.minimum(loss, LARGEST_LOSS))


def _start(unroll: Unroll, meta: PyTree, key: jax.Array, portion: jax.Array) -> Pair:
    state = unroll.start(meta, key, portion)
    states = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
    return Pair(states, optax.tree.zeros_like(meta), key)


def _draw_scale(key: jax.Array, params: Params, scale_range: float) -> PyTree:
    """Log-uniform in [1 / scale_range, scale_range], one for every tensor."""
    leaves, structure = jax.tree.flatten(params)
    bound = float(np.log(scale_range))
    logs = jax.random.uniform(key, (len(leaves),), minval=-bound, maxval=bound)
    return structure.unflatten(list(jnp.exp(logs)))


def _check_unroll(truncation, lengths, scale_range, query_weight) -> None:
    if truncation < 1 or not truncation <= lengths[0] <= lengths[1]:
        raise ValueError(
            "training_unroll: expected 1 <= truncation <= shortest <= longest unroll, got truncation="
            f"{truncation} and lengths={lengths}."
        )
    if not 1 <= scale_range < math.inf:
        raise ValueError(f"training_unroll: scale_range must be at least 1, got {scale_range}.")
    if not 0 <= query_weight <= 1:
        raise ValueError(f"training_unroll: query_weight must be in [0, 1], got {query_weight}.")
