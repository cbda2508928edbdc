"""From what may be seen of a task to weights."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from lohp_jax.tasks.support import canonical_order, relabel, support_of
from lohp_jax.types import Generator, Method, Params, PyTree, Space


def generate(
    generator: Generator,
    context: PyTree,
    key: jax.Array,
    *,
    num_samples: int = 1,
    temperature: float | jax.Array = 0.0,
    num_steps: int | None = None,
    guidance: float = 0.0,
) -> Params:
    """Generates weights for one task, without a gradient (Lo-Hp, stage 3).

    Compiled once per shape of context and setting of `num_samples`, `num_steps` and `guidance`;
    `jax.vmap` over contexts and keys serves many tasks in one call.

    Args:
      generator: of `load`, or a baseline.
      context: what the generator may see of the task, as `context` of its family makes it, e.g.
        `{"x": [n, ...], "y": [n, ...]}`, a set of examples of any number.
      key: randomness of the samples.
      num_samples: independent samples.
      temperature: factor of the policy's standard deviations, or of a diffusion's noise; 0 follows
        the means, so that all samples agree.
      num_steps: how many of the policy's N steps to take, for a diffusion how many noise levels;
        None for N.
      guidance: how far to exaggerate the effect of the context; 0 leaves it as trained. A policy
        takes it only if it was trained with condition dropout; baselines ignore it.

    Returns: pytree of weights with leading axis `num_samples`.

    Raises: ValueError for a context that does not fit the generator, e.g. of another shape, or
      for a bad `num_samples`, `temperature`, `num_steps` or `guidance`.
    """
    if num_samples < 1:
        raise ValueError(f"generate: num_samples must be at least 1, got {num_samples}.")
    if not math.isfinite(guidance):
        raise ValueError(f"generate: guidance must be finite, got {guidance}.")
    concrete = not any(
        isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((context, temperature))
    )
    if concrete and not 0 <= float(temperature) < float("inf"):
        raise ValueError(
            f"generate: temperature must be finite and not negative, got {temperature}."
        )
    if concrete and generator.check is not None:
        generator.check(context)
    temperature = jnp.asarray(temperature, jnp.float32)  # 1 and 1.0 are one program
    return _generate(generator, context, key, temperature, num_samples, num_steps, float(guidance))


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _generate(generator, context, key, temperature, num_samples, num_steps, guidance):
    one = functools.partial(
        generator.apply, temperature=temperature, num_steps=num_steps, guidance=guidance
    )
    return jax.vmap(one, (None, None, 0))(
        generator.params, context, jax.random.split(key, num_samples)
    )


def make_generator(
    method: Method, space: Space, params: PyTree, config: Any = None, *, name: str = ""
) -> Generator:
    """Wraps what a method was trained to as a `Generator`.

    Labels are first put into their canonical order and the generated weights are renamed back, so that
    permuting the labels of a support permutes the head and nothing else, whatever theta_0 is.

    Args:
      method: bound to `space`, or to be bound.
      space: where it walks.
      params: of the method.
      config: kept with the generator.
      name: of the family; "" for that of the space.
    """
    method, family = method.bound(space), space.family

    def path(params, context, key, *, temperature=0.0, num_steps=None, guidance=0.0):
        """Weights at every state of the walk."""
        ordered, rank = canonical_order(family, context)
        states = method.walk(
            params, ordered, key, temperature=temperature, num_steps=num_steps, guidance=guidance
        )
        weights = jax.vmap(space.codec.decode)(states)
        return jax.vmap(lambda w: relabel(w, family.class_axes, rank))(weights)

    def apply(params, context, key, **options):
        return jax.tree.map(lambda leaf: leaf[-1], path(params, context, key, **options))

    return Generator(
        apply,
        params,
        family=name or family.name,
        config=config,
        check=support_of(family).check,
        path=path,
    )
