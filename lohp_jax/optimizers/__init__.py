"""Optimizers by name; each is an optax transformation."""

import math

import optax

from lohp_jax.checks import check_option
from lohp_jax.optimizers.sam import sam

OPTIMIZERS = {
    "sgd": (optax.sgd, 0.5),
    "momentum": (lambda rate: optax.sgd(rate, momentum=0.9), 0.1),
    "adam": (optax.adam, 0.05),
    "adamw": (optax.adamw, 0.05),
    "sam": (lambda rate: sam(optax.sgd(rate)), 0.5),
}
"""Factory of each optimizer and its default learning rate."""


def make_optimizer(name: str) -> optax.GradientTransformationExtraArgs:
    """Builds an optimizer by name.

    Args:
      name: a key of `OPTIMIZERS`, e.g. "adam", or "adam:0.01" for a learning rate of one's own.

    Raises: ValueError for an unknown name, with the nearest one, or a bad learning rate.
    """
    kind, colon, rate = name.partition(":")
    check_option("make_optimizer", "name", kind, OPTIMIZERS)
    factory, default = OPTIMIZERS[kind]
    learning_rate = _parse_learning_rate(rate) if colon else default
    if not 0 < learning_rate < math.inf:
        raise ValueError(
            f"make_optimizer: expected a positive learning rate after the colon, got {name!r}; "
            f"write e.g. '{kind}:{default}'."
        )
    return optax.with_extra_args_support(factory(learning_rate))


def _parse_learning_rate(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
