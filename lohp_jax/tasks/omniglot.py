"""Omniglot, the standard test of few-shot learning: new characters from one or five images of each."""

import os
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from lohp_jax.networks.classifiers import make_network
from lohp_jax.tasks.backbone import Backbone, kept_backbone
from lohp_jax.tasks.images import TeacherData, image_family
from lohp_jax.tasks.n_way import new_class_tables
from lohp_jax.tasks.pools import DealtPool
from lohp_jax.types import TaskFamily

NUM_TRAIN = 1200
TURNS = 4
_QUERY = 5  # images of a class that a step of a backbone classifies
Network = Literal["linear", "mlp", "conv", "conv4"]


class CharacterSplit(NamedTuple):
    """Classes of a `DealtPool` with four rotations: class 4 c + r is character c, turned r times.

    Attributes:
      train: for training, all rotations of a character.
      held_out: of the other characters.
    """

    train: tuple[int, ...]
    held_out: tuple[int, ...]


def split_characters(
    num_characters: int,
    *,
    num_train: int = NUM_TRAIN,
    rotate_held_out: bool = False,
    seed: int = 0,
) -> CharacterSplit:
    """The split of Vinyals et al. (2016, 4.1.1): 1,200 characters to train, whatever their alphabet.

    Their rotations by 90, 180 and 270 degrees are classes of their own. The paper does not name its
    characters; here the first of `np.random.default_rng(seed).permutation(num_characters)` train.

    Args:
      num_characters: 1,623 of Omniglot.
      num_train: characters to train on.
      rotate_held_out: whether rotations of the other characters are classes, too.
      seed: of the order.

    Raises: ValueError for a `num_train` that leaves no character on one side.
    """
    if not 1 <= num_train < num_characters:
        raise ValueError(
            f"split_characters: num_train must be between 1 and {num_characters - 1}, to leave some of "
            f"{num_characters} characters to hold out, got {num_train}."
        )
    order = np.random.default_rng(seed).permutation(num_characters)
    turned = [[TURNS * c + r for c in sorted(order[:num_train]) for r in range(TURNS)]]
    turns = range(TURNS) if rotate_held_out else (0,)
    turned.append([TURNS * c + r for c in sorted(order[num_train:]) for r in turns])
    return CharacterSplit(*(tuple(map(int, classes)) for classes in turned))


def omniglot_family(
    characters: np.ndarray,
    *,
    way: int = 5,
    shots: int = 1,
    num_query: int = 5,
    network: Network = "conv4",
    filters: int = 64,
    backbone: Backbone | None = None,
    cache: str | os.PathLike | None = None,
    teacher_data: TeacherData = "full",
    batch_size: int | None = None,
    num_train: int = NUM_TRAIN,
    rotate_held_out: bool = False,
    seed: int = 0,
    name: str = "omniglot",
) -> TaskFamily:
    """N-way K-shot episodes over Omniglot (Lake et al., 2015; protocol of Vinyals et al., 2016).

    A task draws `way` classes, of the training characters and their rotations or of held-out
    characters, and deals the images of each anew: `num_query` for `evaluate`, from the others the
    support. The weights are a network or, given a backbone, one over its features ("linear": a head).

    Args:
      characters: `[C, n, height, width, channels]` square images, bytes or floats in [0, 1], e.g. of
        `lohp_jax.data.omniglot`.
      way: classes of a task, 5 or 20 in the papers.
      shots: support images of a class, 1 or 5 in the papers.
      num_query: query images of a class.
      network: a name for `make_network`, which says what `filters` are.
      filters: see `network`.
      backbone: frozen; trained on the `train` classes of `split_characters` with the same arguments.
      cache: directory for its features, see `cached_features`.
      teacher_data: as of `image_family`, as is `batch_size`; "full": all but the query images.
      batch_size: see `teacher_data`.
      num_train: as of `split_characters`, as are `rotate_held_out` and `seed`.
      rotate_held_out: see `num_train`.
      seed: see `num_train`.
      name: of the family.

    Raises: ValueError for too few characters or images for a task, images that are not square, or of
      another shape than the backbone's, and what `image_family` and the networks raise.
    """
    check_characters(characters, shots, num_query)
    split = split_characters(
        len(characters), num_train=num_train, rotate_held_out=rotate_held_out, seed=seed
    )
    if len(split.held_out) < way:
        raise ValueError(
            f"omniglot_family: expected way={way} held-out classes at least, got {len(split.held_out)}; "
            "ask for a smaller way or num_train, or use more characters."
        )
    pool = DealtPool(characters, num_query, TURNS)
    if backbone is not None:
        features = backbone.features(_turn(characters, split.train + split.held_out), cache)
        pool, split = DealtPool(features, num_query), _numbered(split)
    net = make_network(network, pool.example_shape, way, filters=filters)
    options = {"shots": shots, "teacher_data": teacher_data, "batch_size": batch_size}
    tables = new_class_tables(*split, way=way)
    return image_family(name, pool, tables, network=net, **options)


def omniglot_backbone(
    characters: np.ndarray,
    directory: str | os.PathLike | None = None,
    *,
    num_train: int = NUM_TRAIN,
    seed: int = 0,
    **settings: Any,
) -> Backbone:
    """A backbone of the training characters, read from a directory where it was trained before.

    Args:
      characters: as of `omniglot_family`.
      directory: where it is kept; None trains it anew.
      num_train: as of `split_characters`.
      seed: of the split and of the training.
      **settings: of `train_backbone`.

    Raises: as `kept_backbone`.
    """
    check_characters(characters, 1, _QUERY)
    return kept_backbone(
        DealtPool(characters, _QUERY, TURNS),
        split_characters(len(characters), num_train=num_train, seed=seed).train,
        jax.random.key(seed),
        directory,
        **settings,
    )


def check_characters(characters: np.ndarray, shots: int, num_query: int) -> None:
    """Raises: ValueError for images that are not square, of another type, or too few for a task."""
    if characters.ndim != 5 or characters.shape[2] != characters.shape[3]:
        raise ValueError(
            "omniglot: expected characters [C, n, side, side, channels], got shape "
            f"{list(characters.shape)}."
        )
    if characters.dtype != np.uint8 and characters.dtype.kind != "f":
        raise ValueError(
            f"omniglot: expected bytes, or floats in [0, 1], got {characters.dtype}; convert them."
        )
    if min(shots, num_query) < 1 or shots + num_query > characters.shape[1]:
        raise ValueError(
            f"omniglot: expected shots and num_query of 1 or more and {characters.shape[1]} in all at "
            f"most, the images of a character, got {shots} and {num_query}; ask for fewer."
        )


def _numbered(split: CharacterSplit) -> CharacterSplit:
    """The same with classes by their place among all of the split."""
    count = len(split.train)
    return CharacterSplit(tuple(range(count)), tuple(range(count, count + len(split.held_out))))


def _turn(characters: np.ndarray, classes: tuple[int, ...]) -> np.ndarray:
    """`[len(classes), n, side, side, channels]`, the images of classes of a `CharacterSplit`."""
    images = np.empty((len(classes), *characters.shape[1:]), characters.dtype)
    row, turns = np.divmod(classes, TURNS)
    for turn in range(TURNS):
        images[turns == turn] = np.rot90(characters[row[turns == turn]], turn, (2, 3))
    return images
