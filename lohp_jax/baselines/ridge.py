"""Ridge regression from a summary of the context to weights."""

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.tasks.support import canonical_order, relabel, support_of
from lohp_jax.types import Codec, Generator, PyTree, TaskFamily

_ALPHAS = np.logspace(-3, 4, 15)


def ridge(family: TaskFamily, codec: Codec, contexts: PyTree, tokens: jax.Array) -> Generator:
    """Generator linear in `Support.describe` of the context, labels in their canonical order.

    The penalty is the best of 15 by leave-one-out error (scikit-learn's `RidgeCV`).

    Args:
      family: says how contexts are read.
      codec: decodes tokens.
      contexts: of the stored tasks, leading axis R.
      tokens: `[R, length, channels]` their end weights.
    """
    from sklearn.linear_model import RidgeCV  # here, for a light `import lohp_jax`

    support = support_of(family)
    described = jax.jit(jax.vmap(lambda c: support.describe(c).reshape(-1)))(contexts)
    targets = np.asarray(tokens).reshape(len(tokens), -1)
    model = RidgeCV(alphas=_ALPHAS).fit(np.asarray(described), targets)
    params = (jnp.asarray(model.coef_, jnp.float32), jnp.asarray(model.intercept_, jnp.float32))

    def apply(params, context, key, **_):
        matrix, offset = params
        ordered, rank = canonical_order(family, context)
        flat = matrix @ support.describe(ordered).reshape(-1) + offset
        return relabel(codec.decode(flat.reshape(codec.mask.shape)), family.class_axes, rank)

    return Generator(apply, params, family=family.name, check=support.check)
