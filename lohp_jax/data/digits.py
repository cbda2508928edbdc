"""The default data: 1,797 real 8x8 images of handwritten digits, which come with scikit-learn."""

import functools

import numpy as np

from lohp_jax.data.images import ImageSet, by_class

_TRAIN_PER_CLASS = 100
_QUERY_PER_CLASS = 74  # the scarcest digit has 174 images


@functools.cache
def digits() -> ImageSet:
    """The UCI handwritten digits: 100 training and 74 query images for each of ten classes.

    Returns: `ImageSet` with images of shape `[8, 8, 1]` in [0, 1]. The pools are drawn once, with a
    fixed seed: scikit-learn's order follows the writers, so that a cut by position would put
    different handwriting into the two pools.
    """
    from sklearn.datasets import load_digits  # here, for a light `import lohp_jax`

    source = load_digits()
    order = np.random.default_rng(0).permutation(len(source.target))
    images = (source.images[order, :, :, None] / 16.0).astype(np.float32)
    pool = by_class(images, source.target[order], _TRAIN_PER_CLASS + _QUERY_PER_CLASS)
    return ImageSet(pool[:, :_TRAIN_PER_CLASS], pool[:, _TRAIN_PER_CLASS:], "digits")
