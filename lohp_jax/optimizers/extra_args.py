"""Offering an optimizer what others ask for, and giving it what it takes."""

import inspect
from collections.abc import Callable

import optax


def with_extra_args(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose `update` may be offered any extra arguments; it gets those that it takes.

    `optax.with_extra_args_support` drops all of them for what is no `GradientTransformationExtraArgs`,
    such as `optax.MultiSteps`, which would hand them on to an optimizer that needs them, and hands all
    to what is one, such as `optax.contrib.sam`, which takes `grad_fn` alone.
    """
    takes = _taken(optimizer.update)

    def update(updates, state, params=None, **extra):
        return optimizer.update(updates, state, params, **{n: extra[n] for n in extra if takes(n)})

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _taken(update: Callable) -> Callable[[str], bool]:
    """Whether `update` takes an argument of a name beside gradient, state and parameters."""
    parameters = list(inspect.signature(update).parameters.values())
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return lambda name: True
    named = {p.name for p in parameters[3:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return named.__contains__
