"""Ridge regression from mean support images to weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.codec import Codec
from lohp_jax.tasks.support import canonical_order, check_context, class_means, relabel
from lohp_jax.types import Generator, TaskFamily

_ALPHAS = np.logspace(-3, 4, 15)


def ridge(family: TaskFamily, codec: Codec, contexts: dict, tokens: jax.Array) -> Generator:
    """Generator linear in the mean support images of the labels, in their canonical order.

    The penalty is the best of 15 by leave-one-out error (scikit-learn's `RidgeCV`).

    Args:
      family: gives the number of labels.
      codec: decodes tokens.
      contexts: of the stored tasks, leading axis R.
      tokens: `[R, length, channels]` their end weights.
    """
    from sklearn.linear_model import RidgeCV  # here, for a light `import lohp_jax`

    means = jax.vmap(lambda c: class_means(c, family.num_classes).reshape(-1))(contexts)
    targets = np.asarray(tokens).reshape(len(tokens), -1)
    model = RidgeCV(alphas=_ALPHAS).fit(np.asarray(means), targets)
    params = (jnp.asarray(model.coef_, jnp.float32), jnp.asarray(model.intercept_, jnp.float32))

    def apply(params, context, key, **_):
        matrix, offset = params
        ordered, rank = canonical_order(family, context)
        flat = matrix @ class_means(ordered, family.num_classes).reshape(-1) + offset
        return relabel(codec.decode(flat.reshape(codec.mask.shape)), family.class_axes, rank)

    check = functools.partial(
        check_context, num_classes=family.num_classes, image_shape=contexts["images"].shape[2:]
    )
    return Generator(apply, params, family=family.name, check=check)
