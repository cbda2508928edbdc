"""Errors for arguments that many functions share."""

import difflib
import math
import numbers
from collections.abc import Iterable
from typing import Any

import jax


def check_option(function: str, name: str, value: Any, options: Iterable[str]) -> None:
    """Raises: ValueError with the nearest option, if `value` is none of them."""
    options = tuple(options)
    if value not in options:
        plain = {str(option).lower(): option for option in reversed(options)}
        nearest = plain[difflib.get_close_matches(str(value).lower(), plain, 1, 0)[0]]
        raise ValueError(
            f"{function}: {name} must be one of {options}, got {value!r}; did you mean {nearest!r}?"
        )


def check_positive(function: str, name: str, value: Any) -> None:
    """Raises: ValueError unless finite and positive; arrays of `inject_hyperparams` pass."""
    if not isinstance(value, jax.Array) and not 0 < value < math.inf:
        raise ValueError(f"{function}: {name} must be positive and finite, got {value}.")


def check_fraction(function: str, name: str, value: Any, *, below_one: bool = False) -> None:
    """Raises: ValueError for a number outside [0, 1]; arrays of `inject_hyperparams` pass."""
    if not isinstance(value, jax.Array) and not (0 <= value <= 1 and (value < 1 or not below_one)):
        raise ValueError(
            f"{function}: {name} must be in [0, 1{')' if below_one else ']'}, got {value}."
        )


def check_num_steps(function: str, num_steps: Any) -> None:
    """Raises: ValueError for a number of steps that is not positive and whole, or not static."""
    if isinstance(num_steps, jax.Array):
        raise ValueError(
            f"{function}: num_steps is static, got an array; with optax.inject_hyperparams name it in "
            "static_args."
        )
    whole = isinstance(num_steps, numbers.Integral) and not isinstance(num_steps, bool)
    if not whole or num_steps <= 0:
        raise ValueError(
            f"{function}: num_steps must be a positive whole number, got {num_steps!r}."
        )
