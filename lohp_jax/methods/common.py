"""What methods that train a policy share."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lohp_jax.networks.policy import NetworkConfig
from lohp_jax.policy.config import HybridConfig
from lohp_jax.policy.kernels import Policy, make_policy, roll_out
from lohp_jax.types import Example, Method, PyTree, Space

Loss = Callable[[PyTree, Example, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def policy_method(
    name: str,
    make_loss: Callable[[Policy, Space], Loss],
    *,
    network: NetworkConfig,
    balance: HybridConfig,
    num_steps: int | None = None,
    step_features: Callable[[jax.Array], jax.Array] | None = None,
    sampler: Callable[..., jax.Array] = roll_out,
    **fields: Any,
) -> Method:
    """A method that trains a policy.

    Args:
      name: of the method.
      make_loss: `(policy, space) -> loss`, once the space is known.
      network: sizes of its network.
      balance: the objective, which fixes its kernels.
      num_steps: of a walk; None for those of the space.
      step_features: of `make_policy_network`.
      sampler: makes the states, with the arguments of `roll_out`.
      **fields: other fields of the `Method`.
    """

    def bind(space: Space) -> Method:
        policy = make_policy(
            space, network, balance, num_steps=num_steps, step_features=step_features
        )
        return dataclasses.replace(
            method,
            init=lambda key, example: policy.network.init(key, example.context),
            loss=make_loss(policy, space),
            walk=functools.partial(walk, policy, space.teacher, sampler),
            bind=None,
        )

    method = Method(name, bind=bind, **fields)
    return method


def walk(
    policy: Policy,
    teacher: int,
    sampler: Callable[..., jax.Array],
    params: PyTree,
    context: PyTree,
    key: jax.Array,
    *,
    temperature: jax.Array | float = 0.0,
    num_steps: int | None = None,
    guidance: float = 0.0,
) -> jax.Array:
    """`Method.walk` of a policy; `[S, length, channels]`.

    Raises: ValueError for guidance of a policy that was never trained without its context.
    """
    if guidance and not policy.config.condition_dropout:
        raise ValueError(
            f"generate: guidance must be 0, got {guidance}: this policy was never trained without "
            "its context; train one with condition_dropout > 0, e.g. 0.1."
        )
    encode = functools.partial(policy.network.encode, params, context)
    return sampler(
        policy,
        params,
        encode(1.0),
        jnp.asarray(teacher, jnp.int32),
        key,
        temperature=temperature,
        num_steps=num_steps,
        unconditional=encode(0.0) if guidance else None,
        guidance=guidance,
    )


def weighted(terms: Sequence[tuple[float, Loss]]) -> Loss:
    """Weighted sum of losses; a term of weight zero is not computed."""
    active = [(weight, loss) for weight, loss in terms if weight]

    def total(params, example, key):
        results = [
            loss(params, example, k)
            for (_, loss), k in zip(active, jax.random.split(key, len(active)), strict=True)
        ]
        value = sum(weight * value for (weight, _), (value, _) in zip(active, results, strict=True))
        return value, {name: x for _, info in results for name, x in info.items()}

    return total


def settings(**values: Any) -> dict[str, Any]:
    """`Method.config` of keyword arguments: dataclasses become dicts."""
    return {
        name: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
        for name, value in values.items()
    }
