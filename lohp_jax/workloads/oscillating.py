"""A test function with infinitely many local minima (HUB paper, eq. 6), for comparing optimizers."""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from lohp_jax.checks import check_option
from lohp_jax.types import TaskFamily
from lohp_jax.workloads.single import single_task

Form = Literal["radial", "separable"]


def oscillation(s: jax.Array, lambda_: float = 0.01) -> jax.Array:
    """f(s) = s + λ s² + s cos(1/s) and f(0) = 0, for s >= 0, entry by entry (eq. 6).

    f'(s) = 1 + 2λs + cos(1/s) + sin(1/s)/s is unbounded towards 0, so that local minima gather there;
    f >= λ s², so that 0 is the global one. At s = 1/((2k+1)π) f touches this bound, with f' = 2λs.

    Args:
      s: any shape. Below about 1e-19 in float32, where 1/s² overflows, the oscillation counts as 0.
      lambda_: λ; the default is that of the paper.
    """
    tiny = math.sqrt(jnp.finfo(s.dtype).tiny)
    safe = jnp.where(s > tiny, s, 1.0)
    return s + lambda_ * s**2 + jnp.where(s > tiny, safe * jnp.cos(1.0 / safe), 0.0)


def oscillating(
    dimension: int = 1000, *, form: Form = "radial", lambda_: float = 0.01, width: float = 1.0
) -> TaskFamily:
    """Minimise f of x in R^d from a random start; the minimum is 0, at x = 0.

    "radial", as published: f(||x||_1). Its gradient is f'(||x||_1) sign(x): all entries are equally
    large, so that a softmax over them, HUB's gate, is 1/d everywhere. "separable", ours, is
    Σ_i f(|x_i|), where they differ. At x_i = 0 the gradient's entry is 0.

    The defaults of `dimension` and `lambda_` are those of the HUB paper, which does not say where its
    runs start. The params are `{"x": [dimension]}`, uniform in (-width, width): from the default the
    radial form starts at ||x||_1 of about d/2, where f is all but convex; with `width=1 / dimension`
    within (0, 1), where it oscillates, as every |x_i| of the separable form does from the default.

    Args:
      dimension: d >= 1.
      form: "radial" or "separable".
      lambda_: λ > 0.
      width: of the start, > 0.

    Raises: ValueError for another form, or numbers out of range.
    """
    check_option("oscillating", "form", form, get_args(Form))
    if dimension < 1:
        raise ValueError(f"oscillating: dimension must be at least 1, got {dimension}.")
    for name, value in (("lambda_", lambda_), ("width", width)):
        if not 0 < value < math.inf:
            raise ValueError(f"oscillating: {name} must be positive and finite, got {value}.")

    def init(key):
        return {"x": jax.random.uniform(key, (dimension,), jnp.float32, -width, width)}

    def objective(params, data):
        size = params["x"] * jnp.sign(params["x"])  # |x|, with slope 0 at 0, where JAX's abs has 1
        if form == "radial":
            return oscillation(jnp.sum(size), lambda_)
        return jnp.sum(oscillation(size, lambda_))

    return single_task(f"oscillating_{form}", (), init=init, objective=objective)
