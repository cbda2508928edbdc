"""Fitting a small classifier as an optimization problem: x holds all of its weights."""

import functools
import math
from collections.abc import Callable

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

from lohp_jax.data.digits import digits
from lohp_jax.data.images import ImageSet
from lohp_jax.networks.mlp import apply_mlp, init_mlp
from lohp_jax.problems.family import Problem, check_problem, check_sizes, problem_family
from lohp_jax.solvers.descent import lbfgs
from lohp_jax.types import ProblemFamily

_LABEL_STEPS = 100  # of L-BFGS
_MOVED = 0.5  # typical distance of a weight from its start, measured at 64-20-10


def fit_mlp(
    images: ImageSet | None = None,
    *,
    hidden: int = 20,
    num_examples: int = 200,
    penalty: float = 1e-3,
    seed: int = 0,
) -> ProblemFamily:
    """Minimise the cross-entropy of a network with one sigmoid layer, plus penalty |x|² / 2.

    A problem is `{"images": [num_examples, pixels], "labels": [num_examples]}`: images drawn from one
    pool of the image set, "train" or, for held-out problems, "query", with the classes renamed at
    random. Without a penalty there is no minimum. All start from one point with weights after Glorot,
    drawn with `seed`, so that solutions lie in corresponding valleys; `solve` descends from there.

    Args:
      images: e.g. `image_set("tfds:mnist", data_dir=...)` for a 784-20-10 network; None for `digits()`,
        64-20-10, n = 1510.
      hidden: sigmoid units.
      num_examples: images in a problem.
      penalty: 0 or more.
      seed: draws the start.

    Raises: ValueError for numbers out of range, or more examples than either pool has images.
    """
    images = digits() if images is None else images
    num_classes, train, query = len(images.train), _flat(images.train), _flat(images.query)
    check_sizes("fit_mlp", hidden=hidden, num_examples=num_examples)
    _check_options(num_examples, min(len(train), len(query)), penalty)
    sizes = (train.shape[1], hidden, num_classes)
    draw = functools.partial(init_mlp, sizes=sizes, w_init=jax.nn.initializers.glorot_uniform())
    x0, unpack = jax.flatten_util.ravel_pytree(draw(jax.random.key(seed)))

    def sample(key, split):
        pool = jnp.asarray(train if split == "train" else query)
        index_key, name_key = jax.random.split(key)
        index = jax.random.choice(index_key, len(pool), (num_examples,), replace=False)
        names = jax.random.permutation(name_key, num_classes)
        return {"images": pool[index], "labels": names[index // (len(pool) // num_classes)]}

    def objective(x, problem):
        logits = apply_mlp(unpack(x), problem["images"], jax.nn.sigmoid)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, problem["labels"])
        return jnp.mean(losses) + 0.5 * penalty * jnp.sum(x**2)

    family = problem_family(
        "fit_mlp",
        sample=sample,
        objective=objective,
        start=lambda problem: x0,
        init=lambda key: jax.flatten_util.ravel_pytree(draw(key))[0],
        solve=lambda problem, key: lbfgs(family, problem, x0, _LABEL_STEPS).x,
        frame=lambda problem: (x0, jnp.full_like(x0, _MOVED)),
        features=_mean_images(train, num_classes),
        check=lambda problem: check_images(problem, *sizes[::2]),
    )
    return family


def _mean_images(train: np.ndarray, num_classes: int) -> Callable[[Problem], jax.Array]:
    """`(problem) -> [num_classes * pixels]`, the standardised mean image of every label."""
    pixel_mean, pixel_width = float(train.mean()), float(train.std())

    def features(problem):
        member = jax.nn.one_hot(problem["labels"], num_classes).T
        count = jnp.maximum(jnp.sum(member, axis=1, keepdims=True), 1.0)
        return ((member @ problem["images"] / count - pixel_mean) / pixel_width).reshape(-1)

    return features


def check_images(problem: Problem, pixels: int, num_classes: int) -> None:
    """Refuses a problem of another image size, with labels out of range or numbers not finite.

    Raises: ValueError that says what was expected, what came and what to do.
    """
    arrays = check_problem("fit_mlp", problem, {"images": "N pixels", "labels": "N"})
    images, labels = arrays["images"], arrays["labels"]
    if images.shape[1] != pixels or not len(images):
        raise ValueError(
            f"fit_mlp: expected images of shape [N, {pixels}], N >= 1, got {list(images.shape)}; "
            "flatten them, or make the family with an image set of their size."
        )
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"fit_mlp: expected integer labels from 0 to {num_classes - 1}, got {labels.dtype} "
            f"from {labels.min()} to {labels.max()}; number the classes from 0."
        )


def _check_options(num_examples: int, most: int, penalty: float) -> None:
    if num_examples > most:
        raise ValueError(
            f"fit_mlp: expected at most {most} examples, the images of the "
            f"smaller pool, got {num_examples}."
        )
    if not 0 <= penalty < math.inf:
        raise ValueError(f"fit_mlp: penalty must be finite and not negative, got {penalty}.")


def _flat(pool: np.ndarray) -> np.ndarray:
    """`[classes, images_per_class, height, width, channels]` -> `[N, pixels]`, class by class."""
    return pool.reshape(pool.shape[0] * pool.shape[1], -1)
