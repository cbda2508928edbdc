"""Optimizers by name; each is an optax transformation."""

import difflib

import optax

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
    """Builds "adam", or "adam:0.01" for a learning rate of one's own.

    Raises: ValueError for an unknown name, with the nearest one, or a bad learning rate.
    """
    kind, _, rate = name.partition(":")
    if kind not in OPTIMIZERS:
        nearest = difflib.get_close_matches(kind, OPTIMIZERS, 1, 0)[0]
        raise ValueError(
            f"make_optimizer: expected one of {sorted(OPTIMIZERS)}, got {kind!r}; "
            f"did you mean {nearest!r}?"
        )
    factory, default = OPTIMIZERS[kind]
    try:
        learning_rate = float(rate) if rate else default
    except ValueError:
        learning_rate = 0.0
    if not 0 < learning_rate < float("inf"):
        raise ValueError(
            f"make_optimizer: expected a positive learning rate after the colon, got {name!r}."
        )
    return optax.with_extra_args_support(factory(learning_rate))
