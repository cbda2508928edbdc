"""From what may be seen of a task to weights."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.policy.windows import batch_of_windows, window_keys
from lohp_jax.tasks.support import canonical_order, relabel, support_of
from lohp_jax.types import Generator, Method, Params, Pieces, PyTree, Space, Windowed
from lohp_jax.windows import renamed, restore, spans_in


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
    """Generates weights for one task, without a gradient (Lo-Hp, its inference).

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
    _check_options(generator.check, context, temperature, guidance)
    temperature = jnp.asarray(temperature, jnp.float32)  # 1 and 1.0 are one program
    return _generate(generator, context, key, temperature, num_samples, num_steps, float(guidance))


def _check_options(check, context, temperature, guidance) -> None:
    """Refuses what no generator can use; what is traced cannot be looked at."""
    if not math.isfinite(guidance):
        raise ValueError(f"generate: guidance must be finite, got {guidance}.")
    concrete = not any(
        isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((context, temperature))
    )
    if concrete and not 0 <= float(temperature) < float("inf"):
        raise ValueError(
            f"generate: temperature must be finite and not negative, got {temperature}."
        )
    if concrete and check is not None:
        check(context)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _generate(generator, context, key, temperature, num_samples, num_steps, guidance):
    one = functools.partial(
        generator.apply, temperature=temperature, num_steps=num_steps, guidance=guidance
    )
    return jax.vmap(one, (None, None, 0))(
        generator.params, context, jax.random.split(key, num_samples)
    )


def familiarity(generator: Generator, context: PyTree) -> jax.Array:
    """How familiar a task is to a generator that measures it, e.g. `lohp_feedback`: to abstain by.

    Args:
      generator: of a method with `appraise`.
      context: as for `generate`.

    Returns: scalar in (0, 1]; on tasks like the training tasks it is spread evenly, so that abstaining
      below .05 refuses one of twenty of them, and near 0 on others.

    Raises: ValueError for a generator that does not measure it, or a context that does not fit.
    """
    if generator.appraise is None:
        raise ValueError(
            "familiarity: expected a generator that measures how familiar a task is, e.g. of "
            "lohp(feedback='gradient'); this one does not."
        )
    if generator.check is not None:
        generator.check(context)
    return _familiarity(generator, context)


@jax.jit
def _familiarity(generator, context):
    return generator.appraise(generator.params, context, jax.random.key(0))["familiarity"]


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

    def appraise(params, context, key):
        return method.appraise(params, canonical_order(family, context)[0], key)

    return Generator(
        apply,
        params,
        family=name or family.name,
        config=config,
        check=support_of(family).check,
        path=path,
        gradients=method.gradients,
        forward_passes=method.forward_passes,
        appraise=None if method.appraise is None else appraise,
        pieces=_make_pieces(method.windowed, space) if _in_pieces(method.windowed) else None,
    )


def _in_pieces(windowed: Windowed | None) -> bool:
    return windowed is not None and windowed.walk is not None


def _make_pieces(windowed: Windowed, space: Space) -> Pieces:
    """The same weights window by window: beside what it yields, a batch of windows is in memory."""
    family, codec, windows = space.family, space.codec, windowed.windows
    encode = jax.jit(windowed.encode, static_argnums=3)

    @functools.partial(jax.jit, static_argnums=(5, 6))
    def walk(params, seen, keys, view, temperature, num_steps, guidance):
        options = {"temperature": temperature, "num_steps": num_steps, "guidance": guidance}
        one = functools.partial(windowed.walk, params, seen, **options)
        return jax.vmap(lambda key, view: one(key, view)[-1])(keys, view)

    def make(params, context, key, *, temperature=0.0, num_steps=None, guidance=0.0):
        _check_options(support_of(family).check, context, temperature, guidance)
        options = jnp.float32(temperature), num_steps, float(guidance)
        ordered, rank = canonical_order(family, context)
        seen = encode(params, ordered, key, float(guidance))
        names = None if rank is None else np.argsort(rank)
        return _walk_pieces(windows, walk, (params, seen), windowed.view, key, options, names)

    shapes = jax.eval_shape(codec.decode, jax.ShapeDtypeStruct(codec.mask.shape, jnp.float32))
    return Pieces(shapes, make)


def _walk_pieces(windows, walk, given, view, key, options, names):
    """Walks all windows, a batch at a time, and yields what is in them as `Pieces.make` does."""
    codec, batch = windows.codec, batch_of_windows(windows)
    for first in range(0, windows.count, batch):
        wanted = np.arange(first, min(first + batch, windows.count), dtype=np.int32)
        index = np.resize(wanted, batch)  # the last batch has the shape of the others
        ends = np.asarray(walk(*given, window_keys(key, index), view(index), *options))
        for i, values in zip(wanted, ends.reshape(batch, -1), strict=False):
            spans = spans_in(windows, i), spans_in(windows, renamed(windows, i, names))
            for ours, theirs in zip(*spans, strict=True):
                restored = restore(codec, ours, values[ours.start : ours.stop])
                yield theirs.leaf.number, theirs.index, restored
