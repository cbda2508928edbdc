"""Sharpness-aware minimisation as one ordinary optimizer step."""

import optax
import optax.contrib

_EPSILON = 1e-12  # a zero gradient climbs nowhere, instead of to NaN


def sam(
    inner: optax.GradientTransformation, rho: float = 0.05
) -> optax.GradientTransformationExtraArgs:
    """SAM (Foret et al., 2021) around `inner`, through `optax.contrib.sam` in its opaque mode.

    Every update climbs to the point at distance `rho` along the gradient and hands the gradient
    found there to `inner`; parameters never rest at the adversarial point, so each state that a
    caller records is a synchronised one. Costs a second gradient per step.

    Args:
      inner: the optimizer that descends, e.g. `optax.sgd(0.1)`.
      rho: length of the ascent step, in units of the weights, > 0.

    Returns: a transformation whose `update` needs `grad_fn(params, i) -> gradient` among its extra
      arguments (the same batch for every `i`) and ignores all others.

    Raises: ValueError if `rho` is not positive or `update` gets no `grad_fn`.
    """
    if not rho > 0:
        raise ValueError(f"sam: rho must be positive, got {rho}.")
    ascent = optax.chain(optax.normalize_by_update_norm(eps=_EPSILON), optax.sgd(rho))
    base = optax.contrib.sam(inner, ascent, opaque_mode=True)

    def update(updates, state, params=None, *, grad_fn=None, **extra):
        del extra
        if grad_fn is None:
            raise ValueError("sam: update needs grad_fn=(params, i) -> gradient, got none.")
        return base.update(updates, state, params, grad_fn=grad_fn)

    return optax.GradientTransformationExtraArgs(base.init, update)
