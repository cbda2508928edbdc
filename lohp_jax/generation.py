"""From what may be seen of a task to weights: roll-outs, samples, and generators from disk."""

import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lohp_jax.methods.setting import Frame, family_of, make_policy
from lohp_jax.methods.training import initial_state
from lohp_jax.methods.weight_diffusion import denoise_from_noise
from lohp_jax.policy.hybrid import Policy, roll_out
from lohp_jax.runs.config import RunConfig, from_json, resolve
from lohp_jax.tasks.support import canonical_order, check_context, relabel
from lohp_jax.training import checkpoint
from lohp_jax.types import Generator, Params, PyTree, TaskFamily


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
      context: what the generator may see of the task, e.g. `{"images": [n, height, width, channels],
        "labels": [n]}` with at least one example of every label.
      key: randomness of the samples.
      num_samples: independent samples.
      temperature: factor of the policy's standard deviations, or of a diffusion's noise; 0 follows
        the means, so that all samples agree.
      num_steps: how many of the policy's N steps to take, for a diffusion how many noise levels;
        None for N.
      guidance: how far to exaggerate the effect of the context; 0 leaves it as trained. A policy
        takes it only if it was trained with condition dropout; baselines ignore it.

    Returns: pytree of weights with leading axis `num_samples`.

    Raises: ValueError for a context that does not fit the generator, holds NaN or lacks a label, or
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


def policy_generator(
    policy: Policy,
    family: TaskFamily,
    params: dict,
    optimizer: jax.Array,
    config: Any = None,
    *,
    walk: Callable[..., jax.Array] = roll_out,
) -> Generator:
    """Wraps a trained policy as a `Generator`.

    Labels are first put into their canonical order and the generated weights are renamed back, so that
    permuting the labels of a support permutes the head and nothing else, whatever theta_0 is. A context
    may carry `optimizer`, the index of the kind of trajectory to imitate, in place of the default.

    Args:
      policy: of `make_policy`.
      family: gives the class axes.
      params: of the policy's network.
      optimizer: int32 scalar, the default kind of trajectory.
      config: kept with the generator.
      walk: makes the states, with the arguments of `roll_out`; the last one is the result.
    """

    def path(params, context, key, *, temperature=0.0, num_steps=None, guidance=0.0):
        """Weights at every state of the walk; a roll-out has `num_steps + 1`."""
        if guidance and not policy.config.condition_dropout:
            raise ValueError(
                f"generate: guidance must be 0, got {guidance}: this policy was never trained without "
                "its context; train one with condition_dropout > 0, e.g. 0.1."
            )
        network_params, default = params
        ordered, rank = canonical_order(family, context)
        encode = functools.partial(policy.network.encode, network_params, ordered)
        states = walk(
            policy,
            network_params,
            encode(1.0),
            jnp.asarray(context.get("optimizer", default)),
            key,
            temperature=temperature,
            num_steps=num_steps,
            unconditional=encode(0.0) if guidance else None,
            guidance=guidance,
        )
        weights = jax.vmap(policy.codec.decode)(states)
        return jax.vmap(lambda w: relabel(w, family.class_axes, rank))(weights)

    def apply(params, context, key, **options):
        return jax.tree.map(lambda leaf: leaf[-1], path(params, context, key, **options))

    return Generator(
        apply,
        (params, optimizer),
        family=family.name,
        config=config,
        check=functools.partial(
            check_context, num_classes=family.num_classes, image_shape=image_shape(family)
        ),
        path=path,
    )


def image_shape(family: TaskFamily) -> tuple[int, ...]:
    """(height, width, channels) of the images in a family's contexts."""
    key = jax.random.key(0)
    return jax.eval_shape(lambda: family.context(family.sample(key), key))["images"].shape[1:]


def load(directory: str | pathlib.Path, method: str = "lohp") -> Generator:
    """Loads a trained generator from a run directory.

    Args:
      directory: of `lohp run` or `lohp train`.
      method: which of the trained methods.

    Returns: a `Generator` with `config` (a `RunConfig`) and `family` (its name).

    Raises: FileNotFoundError if there is no checkpoint, ValueError if it is damaged or does not fit.
    """
    folder = pathlib.Path(directory) / "checkpoints" / method
    config = resolve(from_json(checkpoint.read_config(folder)))
    family = family_of(config)
    expected = jax.eval_shape(functools.partial(_untrained, config, family, method))
    _, saved = checkpoint.restore(folder, expected)
    policy = make_policy(config, family, saved["frame"], method)
    params, optimizer = saved["state"].params, saved["frame"].optimizer
    walk = denoise_from_noise if method == "lo_di" else roll_out
    return policy_generator(policy, family, params, optimizer, config, walk=walk)


def _untrained(config: RunConfig, family: TaskFamily, method: str) -> dict:
    """A checkpoint of `method` before training; only its shapes matter."""
    key = jax.random.key(0)
    theta_0 = family.init(key)
    scale = jax.tree.map(lambda leaf: jnp.ones((), jnp.float32), theta_0)
    frame = Frame(theta_0, scale, jnp.zeros((), jnp.int32))
    policy = make_policy(config, family, frame, method)
    return {"state": initial_state(config, family, policy, method, key), "frame": frame}
