"""Sharpness-aware minimisation as one ordinary optimizer step."""

import jax
import optax
import optax.contrib

from lohp_jax.checks import check_positive
from lohp_jax.optimizers.extra_args import with_extra_args
from lohp_jax.optimizers.trees import check_params, check_same_params, check_whole, wide

_EPSILON = 1e-12  # a zero gradient climbs nowhere, instead of to NaN


def sam(
    inner: optax.GradientTransformation, rho: float = 0.05
) -> optax.GradientTransformationExtraArgs:
    """SAM (Foret et al., 2021) around `inner`, through `optax.contrib.sam` in its opaque mode.

    Every update climbs to the point at distance `rho` along the gradient and hands the gradient
    found there to `inner`; parameters never rest at the adversarial point, so each state that a
    caller records is a synchronised one. Costs a second gradient per step.

    Args:
      inner: the optimizer that descends, e.g. `optax.sgd(0.1)` or a learned one. It gets the extra
        arguments of `update`; `value` is the loss where the parameters are, not at the climbed point,
        and `grad`, if given, becomes the gradient found there.
      rho: length of the ascent step, in units of the weights, > 0.

    Returns: a transformation whose `update` needs `grad_fn(params, i) -> gradient` among its extra
      arguments (the same batch for every `i`).

    Raises: ValueError if `rho` is not positive; in `init` for parameters that are no floating-point or
      complex arrays; in `update` without `grad_fn`, and for other tensors than `init` saw.
    """
    check_positive("sam", "rho", rho)
    widen = optax.stateless(lambda gradient, _: jax.tree.map(wide, gradient))
    ascent = optax.chain(widen, optax.normalize_by_update_norm(eps=_EPSILON), optax.sgd(rho))
    inner = with_extra_args(inner)

    def around(descend):  # `optax.contrib.sam` would pass no extra arguments on
        return optax.contrib.sam(
            optax.GradientTransformation(inner.init, descend), ascent, opaque_mode=True
        )

    def init(params):
        check_params("sam", params)
        check_whole("sam", params)
        return around(inner.update).init(params)

    def update(updates, state, params=None, *, grad_fn=None, **extra):
        if grad_fn is None:
            raise ValueError("sam: update needs grad_fn=(params, i) -> gradient, got none.")
        check_same_params("sam", init, updates, params, state)

        def descend(climbed, state, params):
            own = {"grad": climbed} if "grad" in extra else {}
            return inner.update(climbed, state, params, grad_fn=grad_fn, **(extra | own))

        return around(descend).update(updates, state, params, grad_fn=grad_fn)

    return optax.GradientTransformationExtraArgs(init, update)
