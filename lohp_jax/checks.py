"""Errors for arguments that many functions share."""

import difflib
import math
import numbers
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


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


def check_number_type(function: str, name: str, dtype: Any) -> None:
    """Raises: ValueError for a type of NumPy's that JAX has not: another byte order, or over 64 bits."""
    dtype = np.dtype(dtype)
    plain = dtype.newbyteorder("=")
    if jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize > (16 if dtype.kind == "c" else 8):
        plain = np.dtype(np.complex128 if dtype.kind == "c" else np.float64)
    if dtype != plain or not dtype.isnative:
        what = "in the byte order of this machine" if not dtype.isnative else "of 64 bits at most"
        raise ValueError(
            f"{function}: expected {name} {what}, got {dtype.str}; convert it by "
            f"`{name}.astype({plain.name!r})`."
        )


def check_held(function: str, name: str, array: np.ndarray) -> None:
    """Raises: ValueError for numbers that do not survive in the type that JAX holds them in.

    Without 64 bits an int64 wraps at 2^31, and a float64 beyond 3.4e38 is infinite.
    """
    check_number_type(function, name, array.dtype)
    held = jax.dtypes.canonicalize_dtype(array.dtype)
    if held == array.dtype or not array.size:
        return
    limit = (jnp.iinfo if jnp.issubdtype(held, jnp.integer) else jnp.finfo)(held).max
    sizes = np.abs(array[np.isfinite(array)]) if array.dtype.kind in "fc" else array
    low, high = (f(sizes, initial=0) for f in (np.min, np.max))
    if high > limit or (array.dtype.kind == "i" and low < jnp.iinfo(held).min):
        raise ValueError(
            f"{function}: expected numbers within the range of {held} in {name}, got {array.dtype} from "
            f"{array.min()} to {array.max()}; scale them, or set jax_enable_x64."
        )


def as_held(function: str, name: str, array: np.ndarray) -> np.ndarray:
    """Real numbers in the type that JAX holds them in, whatever their byte order and width.

    Raises: ValueError for complex numbers, for what is no number, and as `check_held`.
    """
    array = np.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.number) and array.dtype != bool:
        raise ValueError(f"{function}: expected numbers in {name}, got {array.dtype}; convert it.")
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise ValueError(
            f"{function}: expected real numbers in {name}, got {array.dtype}; take one of its parts, "
            "or stack both."
        )
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    if native.dtype.kind == "f" and native.dtype.itemsize > 8:
        with np.errstate(over="ignore"):  # found below
            wide, native = native, native.astype(np.float64)
        native = np.where(np.isfinite(wide) & np.isinf(native), np.finfo(np.float64).max, native)
    check_held(function, name, native)
    return native.astype(jax.dtypes.canonicalize_dtype(native.dtype))
