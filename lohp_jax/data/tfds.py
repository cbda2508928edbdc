"""Image classification sets of TensorFlow Datasets (TFDS), read without TensorFlow or a network."""

import difflib
import io
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from lohp_jax.data.images import ImageSet, by_class, check_one_size, fit_square

_DEFAULT_DATA_DIR = "~/tensorflow_datasets"  # as in TFDS, which expands no "~" that it is given
FILE_FORMAT = "array_record"  # gives records at random positions, without TensorFlow
_RECORDS_AT_ONCE = 1024  # reading in bulk is four times as fast as record by record
_PIL_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # by number of channels


class _Keys(NamedTuple):
    """Where an example keeps its image and its label."""

    image: str
    label: str


class _Split(NamedTuple):
    """A split: its TFDS data source, with images still encoded, and its labels `[N]`."""

    name: str
    records: Any
    labels: np.ndarray


def tfds_images(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    train_per_class: int = 500,
    query_per_class: int = 100,
    image_size: int | None = None,
) -> ImageSet:
    """An image classification set of TFDS that was prepared beforehand; downloads nothing.

    The training pool is a fixed random choice from the split "train", over the classes that occur
    in it. The query pool comes from the first of "test" and "validation" with the same classes; if
    neither has them (there is no such split, its labels are withheld or, as in Omniglot, it holds
    classes of its own), from those images of "train" that the training pool leaves. All labels are
    read, but only the images of the two pools are decoded.

    Args:
      name: the set as `tfds.builder` takes it, e.g. "mnist", "emnist/letters" or "cifar10:3.0.2".
      data_dir: the folder of TFDS; by default `$TFDS_DATA_DIR`, or else `~/tensorflow_datasets`.
      train_per_class: images per class in the training pool.
      query_per_class: images per class in the query pool.
      image_size: the side in pixels to which every image is cut (to its central square) and
        resized (by area average); None leaves the images as they are.

    Returns: `ImageSet` with as many channels as TFDS declares, called "tfds:NAME".

    Raises:
      ValueError: TFDS has no such set; its examples are not an image with a class label; it has no
        split "train", too few images of a class or images of several sizes; or a number is not
        positive.
      FileNotFoundError: the set is not prepared in `data_dir` in the format "array_record".
    """
    if min(train_per_class, query_per_class, 1 if image_size is None else image_size) < 1:
        raise ValueError(
            "tfds_images: expected positive train_per_class, query_per_class and image_size, "
            f"got {train_per_class}, {query_per_class} and {image_size}."
        )
    builder = prepared_builder("tfds_images", name, data_dir)
    keys = _supervised_keys(builder.info)
    train = _open_split(builder, "train", keys)
    query = _query_split(builder, train, keys)
    positions = _choose_pools(train, query, train_per_class, query_per_class)
    mode = _PIL_MODES[builder.info.features[keys.image].shape[-1]]
    pools = [
        [
            _decode(record[keys.image], mode, image_size)
            for record in read_records(split.records, chosen)
        ]
        for split, chosen in zip((train, query), positions, strict=True)
    ]
    check_one_size("tfds_images", pools[0] + pools[1])
    return ImageSet(*map(_stack, pools, positions), f"tfds:{name}")


def read_all(
    name: str,
    splits: tuple[str, ...],
    data_dir: str | os.PathLike | None,
    image_size: int | None,
    *,
    mode: str,
) -> tuple[list[np.ndarray], np.ndarray]:
    """All images of some splits.

    Args:
      name: as of `tfds_images`, as are `data_dir` and `image_size`.
      splits: names of splits, all of which the set has.
      data_dir: see `name`.
      image_size: see `name`.
      mode: of Pillow's, e.g. "L" for one channel.

    Returns: images `[height, width, channels]` uint8, and their labels `[N]`.

    Raises: as `tfds_images`.
    """
    builder = prepared_builder("tfds_images", name, data_dir)
    keys = _supervised_keys(builder.info)
    opened = [_open_split(builder, split, keys) for split in splits]
    images = [
        _decode(record[keys.image], mode, image_size)
        for split in opened
        for record in read_records(split.records, np.arange(len(split.labels)))
    ]
    return images, np.concatenate([split.labels for split in opened])


def prepared_builder(function: str, name: str, data_dir: str | os.PathLike | None) -> Any:
    """The TFDS builder of a set that can be read at once.

    Args:
      function: named in errors.
      name: as of `tfds_images`, as is `data_dir`.
      data_dir: the folder of TFDS.

    Raises: ValueError for an unknown set, FileNotFoundError for one that is not prepared.
    """
    import tensorflow_datasets as tfds  # here, for a light `import lohp_jax`

    imports = "import tensorflow_datasets as tfds"
    if re.split("[/:]", name)[0] == "glue":
        import tensorflow_datasets.text.glue  # which registers it

        imports += ", tensorflow_datasets.text.glue"
    root = os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR", _DEFAULT_DATA_DIR))
    try:
        builder = tfds.builder(name, data_dir=root)
    except (ValueError, AssertionError) as error:  # the latter for a version that is not there
        known = tfds.list_builders(with_community_datasets=False)
        nearest = difflib.get_close_matches(re.split("[/:]", name)[0], known, n=5)
        raise ValueError(
            f"{function}: expected a set of TensorFlow Datasets, got {name!r}; nearest names: "
            f"{', '.join(nearest) or 'none'}. {str(error).splitlines()[0]}"
        ) from error
    formats = builder.info.available_file_formats() if builder.info.splits else ()
    if FILE_FORMAT not in (found := [f.value for f in formats]):
        raise FileNotFoundError(
            f"{function}: expected {name!r} prepared as {FILE_FORMAT} in {builder.data_dir}, "
            f"found {' and '.join(found) or 'nothing'}. Prepare it with (most sets need TensorFlow "
            f'for this, none to be read): python -c "{imports}; '
            f"tfds.builder({name!r}, data_dir={root!r}, file_format={FILE_FORMAT!r})"
            '.download_and_prepare()"'
        )
    return builder


def _supervised_keys(info: Any) -> _Keys:
    """Finds the image and its label: what the set declares as supervised, or else these names."""
    from tensorflow_datasets import features

    images = [
        key
        for key, feature in info.features.items()
        if isinstance(feature, features.Image)
        and feature.np_dtype == np.uint8
        and feature.shape[-1] in _PIL_MODES
    ]
    labels = [k for k, feature in info.features.items() if isinstance(feature, features.ClassLabel)]
    image, label = (info.supervised_keys or ("image", "label"))[:2]  # a third would be a weight
    if image not in images or label not in labels:
        raise ValueError(
            f"tfds_images: expected images with a class label, got {info.full_name!r} with input "
            f"{image!r} and target {label!r}; its 8-bit images are {images}, its class labels "
            f"{labels}."
        )
    return _Keys(image, label)


def _open_split(builder: Any, name: str, keys: _Keys) -> _Split:
    """Opens a split and reads its labels."""
    import tensorflow_datasets as tfds

    if name not in builder.info.splits:
        raise ValueError(
            f"tfds_images: expected a split {name!r} in {builder.info.full_name!r}, "
            f"got {list(builder.info.splits)}."
        )
    encoded = {keys.image: tfds.decode.SkipDecoding()}  # Pillow decodes the few that are chosen
    records = builder.as_data_source(name, decoders=encoded, file_format=FILE_FORMAT)
    labels = [record[keys.label] for record in read_records(records, np.arange(len(records)))]
    return _Split(name, records, np.array(labels))


def _query_split(builder: Any, train: _Split, keys: _Keys) -> _Split:
    """The first other split with the classes of `train`, or else `train` itself."""
    for name in ("test", "validation"):
        if name in builder.info.splits:
            split = _open_split(builder, name, keys)
            if np.array_equal(np.unique(split.labels), np.unique(train.labels)):
                return split
    return train


def read_records(records: Any, positions: np.ndarray) -> Iterator[dict[str, Any]]:
    """Yields the records of a data source at `positions`, an array of any shape, in C order."""
    flat = positions.ravel().tolist()
    for start in range(0, len(flat), _RECORDS_AT_ONCE):
        yield from records.__getitems__(flat[start : start + _RECORDS_AT_ONCE])


def _choose_pools(
    train: _Split, query: _Split, train_per_class: int, query_per_class: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions in `train` and in `query`, which may be the same split: `[classes, per_class]`."""
    if query is train:
        both = _choose(train, train_per_class + query_per_class)
        return both[:, :train_per_class], both[:, train_per_class:]
    return _choose(train, train_per_class), _choose(query, query_per_class)


def _choose(split: _Split, num_per_class: int) -> np.ndarray:
    """A fixed random choice of positions, `[classes, num_per_class]`."""
    order = np.random.default_rng(0).permutation(len(split.labels))
    try:
        return by_class(order, split.labels[order], num_per_class)
    except ValueError as error:
        raise ValueError(f"tfds_images: split {split.name!r} is too small; {error}") from error


def _decode(encoded: bytes, mode: str, image_size: int | None) -> np.ndarray:
    """`[height, width, channels]` uint8 from the bytes of a JPEG, PNG, ... file."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as file:
        image = file.convert(mode)
    return np.atleast_3d(np.asarray(fit_square(image, image_size)))


def _stack(images: list[np.ndarray], positions: np.ndarray) -> np.ndarray:
    """`[*positions.shape, height, width, channels]` float32 in [0, 1] from 8-bit images."""
    return (np.stack(images) / np.float32(255)).reshape(*positions.shape, *images[0].shape)
