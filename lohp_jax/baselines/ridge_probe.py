"""A linear layer fitted to the support in closed form."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.baselines.heads import Head
from lohp_jax.tasks.door import describe_family
from lohp_jax.tasks.support import support_of
from lohp_jax.types import Generator, Params, PyTree, TaskFamily

PENALTIES = tuple(float(penalty) for penalty in np.logspace(-4, 4, 9))


class TunedProbe(NamedTuple):
    """The best `penalty` found, of squared weights per support example's squared error."""

    penalty: float


def fit_probe(
    family: TaskFamily, head: Head, params: Params, context: PyTree, penalty: jax.Array | float
) -> Params:
    """Ridge regression from features of the support to its labels, one-hot, with a free offset.

    Args:
      family: the tasks.
      head: of `linear_head`.
      params: the layers below the head are left as they are.
      context: the support of one task.
      penalty: alpha > 0 in |F w + b - y|^2 + alpha |w|^2.
    """
    features = head.features(params, context)
    targets = jax.nn.one_hot(context["y"], family.num_classes, dtype=features.dtype)
    centre, mean = features.mean(axis=0), targets.mean(axis=0)
    centred = features - centre[None]
    gram = centred @ centred.T + penalty * jnp.eye(len(features), dtype=features.dtype)
    w = centred.T @ jnp.linalg.solve(gram, targets - mean[None])
    return head.put(params, w, mean - centre @ w)


def ridge_probe(family: TaskFamily, head: Head, theta_0: Params, tuned: TunedProbe) -> Generator:
    """Generator of `fit_probe` on the layers of theta_0: of pixels, where there are none.

    Args:
      family: the tasks.
      head: of `linear_head`.
      theta_0: the shared start.
      tuned: of `tune_probe`.
    """

    def apply(params, context, key, **_):
        return fit_probe(family, head, params, context, tuned.penalty)

    check = support_of(family).check
    return Generator(apply, theta_0, family=family.name, check=check, forward_passes=1)


def tune_probe(
    family: TaskFamily, head: Head, theta_0: Params, data: PyTree, contexts: PyTree
) -> TunedProbe:
    """Picks the penalty by the mean query score on training tasks, see `adaptation.tune`.

    Args:
      family: the tasks.
      head: of `linear_head`.
      theta_0: the shared start.
      data: training tasks, leading axis R.
      contexts: their contexts, leading axis R.
    """
    description = describe_family(family)
    sign = 1 if description.higher_is_better else -1

    @jax.jit
    def score(penalty):
        def one(data, context):
            fitted = fit_probe(family, head, theta_0, context, penalty)
            return family.evaluate(fitted, data)[description.measure]

        return jax.vmap(one)(data, contexts).mean()

    scores = np.array([sign * score(penalty) for penalty in PENALTIES])
    return TunedProbe(PENALTIES[int(np.where(np.isfinite(scores), scores, -np.inf).argmax())])
