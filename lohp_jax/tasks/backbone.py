"""A frozen backbone: features of images, from a network that was trained on other classes."""

import dataclasses
import json
import os
import pathlib
import shlex
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lohp_jax.data.features import cached_features, digest
from lohp_jax.files import damaged, first_difference, writing_atomically
from lohp_jax.networks.classifiers import make_conv4_body
from lohp_jax.tasks.n_way import Episodes, Part
from lohp_jax.tasks.pools import DealtPool
from lohp_jax.training.gradient import scheduled_adam
from lohp_jax.types import Params

_FILE = "backbone.npz"
_ABOUT = "about"


@dataclasses.dataclass(frozen=True, eq=False)
class Backbone:
    """Maps images to features.

    Attributes:
      apply: `(params, images [N, *image_shape] in [0, 1]) -> features [N, F]`, pure.
      params: its weights, a pytree.
      image_shape: (height, width, channels).
    """

    apply: Callable[[Params, jax.Array], jax.Array]
    params: Params
    image_shape: tuple[int, int, int]

    def features(
        self, images: np.ndarray, directory: str | os.PathLike | None = None
    ) -> np.ndarray:
        """Features `[..., F]` of images `[..., *image_shape]`, see `cached_features`.

        Raises: ValueError for images of another shape; what `cached_features` raises.
        """
        if images.shape[-3:] != self.image_shape:
            raise ValueError(
                f"Backbone: expected images of shape {self.image_shape}, which it was made for, got "
                f"{images.shape[-3:]}; read them with image_size={self.image_shape[0]}, or bring them "
                "to that shape with `fit_images`."
            )
        return cached_features(self.apply, self.params, images, directory)


def train_backbone(
    pool: DealtPool,
    classes: Sequence[int],
    key: jax.Array,
    *,
    filters: int = 64,
    num_steps: int = 500,
    way: int = 20,
    shots: int = 1,
    learning_rate: float = 1e-2,
) -> Backbone:
    """Trains the blocks of `make_conv4` as a prototypical network (Snell et al., 2017, algorithm 1).

    Every step deals `way` of the classes: the features of `shots` images of each are averaged to its
    prototype, and the pool's `num_query` others are classified by their squared distance to the
    prototypes. One compiled loop of Adam, whose rate falls along a cosine; a pure function of its
    arguments.

    Args:
      pool: of images.
      classes: the classes to train on, no others are looked at.
      key: of the start and of the draws.
      filters: as of `make_conv4`.
      num_steps: updates.
      way: classes of a step, or all if there are fewer.
      shots: images of a prototype.
      learning_rate: at the start.

    Raises: ValueError for fewer than two classes, more shots than the pool has, or numbers that are not
      positive; what `make_conv4` raises.
    """
    way = min(way, len(classes))
    if way < 2 or not 1 <= shots <= pool.num_train:
        raise ValueError(
            f"train_backbone: expected two classes or more and 1 to {pool.num_train} shots, the images "
            f"of a class beside its {pool.num_query} query ones; got way={way}, shots={shots}."
        )
    body = make_conv4_body(pool.example_shape, filters=filters)
    optimizer = scheduled_adam(num_steps, learning_rate)
    tasks = Episodes((Part(tuple(classes), way),))

    def loss(params, key):
        return _prototype_loss(lambda x: body.apply(params, x), pool, tasks, shots, key)

    def step(carry, step_key):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, step_key), state)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def train(key):
        init_key, loss_key = jax.random.split(key)
        params = body.init(init_key, jnp.zeros((1, *pool.example_shape)))
        start = (params, optimizer.init(params))
        (params, _), _ = jax.lax.scan(step, start, jax.random.split(loss_key, num_steps))
        return params

    return Backbone(body.apply, train(key), pool.example_shape)


def _prototype_loss(
    embed: Callable[[jax.Array], jax.Array],
    pool: DealtPool,
    tasks: Episodes,
    shots: int,
    key: jax.Array,
) -> jax.Array:
    """Cross-entropy of one task's query images, by their squared distances to its prototypes."""
    draw_key, deal_key = jax.random.split(key)
    chosen, labels = tasks.draw(draw_key)
    data = {"classes": chosen, "labels": labels} | pool.deal(deal_key, chosen)
    way = tasks.num_labels
    of_support = jnp.arange(way * pool.num_train).reshape(way, -1)[:, :shots].reshape(-1)
    support, _ = pool.training(data, of_support)
    query, wanted = pool.queries(data, jnp.arange(way * pool.num_query))
    features = embed(jnp.concatenate([support, query]))
    prototypes = features[: way * shots].reshape(way, shots, -1).mean(axis=1)
    difference = features[way * shots :, None] - prototypes[None]
    logits = -jnp.sum(difference**2, axis=-1)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, wanted))


def kept_backbone(
    pool: DealtPool,
    classes: Sequence[int],
    key: jax.Array,
    directory: str | os.PathLike | None,
    **settings: Any,
) -> Backbone:
    """`train_backbone`, whose result is kept in a directory and read from there the next time.

    Args:
      pool: as of `train_backbone`, as are `classes` and `key`.
      classes: see `pool`.
      key: see `pool`.
      directory: None keeps nothing.
      **settings: of `train_backbone`.

    Raises: ValueError for a directory with a backbone of other arguments, with the first difference, or
      a damaged one; nothing is deleted. What `train_backbone` raises; OSError if the disk is full.
    """
    if directory is None:
        return train_backbone(pool, classes, key, **settings)
    about = {
        "key": jax.random.key_data(key).tolist(),
        "images": digest(pool.examples),
        "classes": digest(np.asarray(classes)),
        "num_query": pool.num_query,
        "rotations": pool.rotations,
        **settings,
    }
    path = pathlib.Path(directory) / _FILE
    if path.exists():
        return _load(path, pool.example_shape, about)
    backbone = train_backbone(pool, classes, key, **settings)
    _save(path, backbone, about)
    return backbone


def _save(path: pathlib.Path, backbone: Backbone, about: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    leaves = {
        jax.tree_util.keystr(place): np.asarray(leaf)
        for place, leaf in jax.tree.leaves_with_path(backbone.params)
    }
    with writing_atomically(path) as file:
        np.savez(file, **leaves, **{_ABOUT: json.dumps(about)})


def _load(path: pathlib.Path, image_shape: tuple[int, int, int], about: dict[str, Any]) -> Backbone:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        there = json.loads(str(arrays.pop(_ABOUT)))
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise damaged(path, error) from error
    if difference := first_difference(there, about):
        command = f"rm -r {shlex.quote(str(path.parent))}"
        raise ValueError(
            f"kept_backbone: {path} was made with other arguments: {difference}; give another "
            f"directory, or make it anew after `{command}`. Nothing was deleted."
        )
    filters = {"filters": about["filters"]} if "filters" in about else {}
    body = make_conv4_body(image_shape, **filters)
    like = jax.eval_shape(body.init, jax.random.key(0), jnp.zeros((1, *image_shape)))
    wanted = {jax.tree_util.keystr(place): leaf for place, leaf in jax.tree.leaves_with_path(like)}
    shapes = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    if shapes != {name: (leaf.shape, leaf.dtype) for name, leaf in wanted.items()}:
        raise damaged(path, "it does not hold the weights of such a network")
    params = jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted])
    return Backbone(body.apply, params, image_shape)
