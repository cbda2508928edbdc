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
from lohp_jax.policy.windows import at_window, views_of, walk_all
from lohp_jax.types import MIXED, Example, Method, PyTree, Space, Windowed

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
    needs_whole: str | None = None,
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
      needs_whole: why windows of the weights are not enough; None where they are.
      **fields: other fields of the `Method`.

    Raises: ValueError for a network of windows, where the method needs whole networks.
    """
    check_windows(name, network, balance, needs_whole)

    def bind(space: Space) -> Method:
        policy = make_policy(
            space, network, balance, num_steps=num_steps, step_features=step_features
        )
        bound = dataclasses.replace(
            method,
            init=lambda key, example: policy.network.init(key, example.context),
            loss=make_loss(policy, space),
            walk=functools.partial(walk, policy, space, sampler),
            forward_passes=policy.num_steps,
            bind=None,
        )
        if policy.windows is None:
            return bound
        return _over_windows(bound, policy, space, make_loss, sampler)

    method = Method(name, bind=bind, window=network.window, **fields)
    return method


def check_windows(
    name: str, network: NetworkConfig, balance: HybridConfig, needs_whole: str | None = None
) -> None:
    """Whether a method can be trained on windows of the weights, if its network is one of windows.

    Raises: ValueError where it needs whole networks.
    """
    if network.window is None:
        return
    if needs_whole is None and not balance.per_dimension:
        needs_whole = "residuals that are summed over the weights need all of them"
    if needs_whole is not None:
        raise ValueError(
            f"{name}: network.window must be None, got {network.window}: {needs_whole}; leave the "
            "window out, or take a method whose loss separates over weights, such as `lohp`."
        )


def _over_windows(
    method: Method,
    policy: Policy,
    space: Space,
    make_loss: Callable[[Policy, Space], Loss],
    sampler: Callable[..., jax.Array],
) -> Method:
    """The bound method with the loss of one window, and walks window by window."""

    def loss(params, example, key):
        return make_loss(at_window(policy, example.view), space)(params, example, key)

    def encode(params, context, key, guidance=0.0):
        _check_guidance(policy, guidance)
        read = functools.partial(policy.network.encode, params, context)
        return read(1.0), read(0.0) if guidance else None, teacher_of(space, key)

    def walk_one(params, seen, key, view, *, temperature=0.0, num_steps=None, guidance=0.0):
        embedding, unconditional, teacher = seen
        return sampler(
            at_window(policy, view),
            params,
            embedding,
            teacher,
            key,
            temperature=temperature,
            num_steps=num_steps,
            unconditional=unconditional,
            guidance=guidance,
        )

    def walk_whole(params, context, key, **options):
        seen = encode(params, context, key, options.get("guidance", 0.0))
        one = functools.partial(walk_one, params, seen, **options)
        return walk_all(policy, one, key)

    views = functools.partial(views_of, policy)
    windowed = Windowed(policy.windows, views, encode, walk_one)
    return dataclasses.replace(method, loss=loss, walk=walk_whole, windowed=windowed)


def walk(
    policy: Policy,
    space: Space,
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
    _check_guidance(policy, guidance)
    encode = functools.partial(policy.network.encode, params, context)
    return sampler(
        policy,
        params,
        encode(1.0),
        teacher_of(space, key),
        key,
        temperature=temperature,
        num_steps=num_steps,
        unconditional=encode(0.0) if guidance else None,
        guidance=guidance,
    )


def teacher_of(space: Space, key: jax.Array) -> jax.Array:
    """The kind of trajectory that a walk with this key imitates; int32 scalar."""
    if space.teacher != MIXED:
        return jnp.asarray(space.teacher, jnp.int32)
    apart = jax.random.fold_in(key, 2**31)  # no window has this number
    return jax.random.randint(apart, (), 0, space.num_teachers)


def _check_guidance(policy: Policy, guidance: float) -> None:
    if guidance and not policy.config.condition_dropout:
        raise ValueError(
            f"generate: guidance must be 0, got {guidance}: this policy was never trained without "
            "its context; train one with condition_dropout > 0, e.g. 0.1."
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
