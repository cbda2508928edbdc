"""Sentences and their labels from TensorFlow Datasets (TFDS), and their bytes as tokens."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lohp_jax.data.tfds import FILE_FORMAT, prepared_builder, read_records

SEPARATOR = 255
"""Token between two sentences of an example: a byte that UTF-8 never has."""


class TextSplit(NamedTuple):
    """The examples of one split.

    Attributes:
      texts: `[N, fields]` strings, of NumPy's `StringDType`.
      labels: `[N]` int32 from 0, -1 where it is withheld; float32 where they are scores.
    """

    texts: np.ndarray
    labels: np.ndarray


class TextSet(NamedTuple):
    """Labelled sentences, or pairs of sentences.

    Attributes:
      splits: by name.
      fields: what the columns of `TextSplit.texts` are, e.g. ("sentence1", "sentence2").
      classes: names of the labels in their order; () where labels are scores.
      name: where they come from.
    """

    splits: dict[str, TextSplit]
    fields: tuple[str, ...]
    classes: tuple[str, ...]
    name: str


def tfds_text(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    splits: Sequence[str] = ("train", "validation"),
) -> TextSet:
    """A set of labelled sentences of TFDS that was prepared beforehand; downloads nothing.

    Args:
      name: the set as `tfds.builder` takes it, e.g. "glue/cola", "glue/mrpc" or "imdb_reviews".
      data_dir: the folder of TFDS; by default `$TFDS_DATA_DIR`, or else `~/tensorflow_datasets`.
      splits: which to read, whole.

    Returns: `TextSet`, called "tfds:NAME". Its fields are the declared input of the set or, where it
      declares none, as GLUE, all its texts in the order of their names.

    Raises:
      ValueError: TFDS has no such set, it has no such split, or its examples are not texts with a label
        or score.
      FileNotFoundError: the set is not prepared in `data_dir` in the format "array_record".
    """
    builder = prepared_builder("tfds_text", name, data_dir)
    fields, label = _keys(builder.info)
    for split in splits:
        if split not in builder.info.splits:
            raise ValueError(
                f"tfds_text: expected splits of {list(builder.info.splits)}, which "
                f"{builder.info.full_name!r} has, got {split!r}."
            )
    scored = builder.info.features[label]
    classes = tuple(getattr(scored, "names", ()))
    dtype = np.int32 if classes else np.float32
    read = {split: _read(builder, split, fields, label, dtype) for split in splits}
    return TextSet(read, fields, classes, f"tfds:{name}")


def byte_tokens(texts: np.ndarray | Sequence[str], length: int) -> np.ndarray:
    """The UTF-8 bytes of texts as tokens, cut or padded to one length.

    >>> byte_tokens([["No", "way"]], 8)
    array([[ 78, 111, 255, 119,  97, 121,   0,   0]], dtype=uint8)

    Args:
      texts: `[N]` strings, or `[N, fields]`; the fields of an example follow each other with `SEPARATOR`
        between them.
      length: tokens of an example; longer ones lose their end, which may cut a letter in two.

    Returns: `[N, length]` uint8; padding is 0. UTF-8 has no byte 255.

    Raises: ValueError for a length that is not positive, texts of another shape, or a character 0, which
      means padding here.
    """
    if length < 1:
        raise ValueError(f"byte_tokens: length must be at least 1, got {length}.")
    texts = np.asarray(texts, np.dtypes.StringDType())
    if texts.ndim not in (1, 2):
        raise ValueError(
            f"byte_tokens: expected texts of shape [N] or [N, fields], got {list(texts.shape)}."
        )
    tokens = np.zeros((len(texts), length), np.uint8)
    for row, fields in zip(tokens, texts.reshape(len(texts), -1), strict=True):
        parts = [field.encode() for field in fields]
        if any(0 in part for part in parts):
            raise ValueError(
                "byte_tokens: expected texts without the character 0, which means padding, got "
                f"{[part.decode()[:40] for part in parts]}; take it out."
            )
        joined = bytes([SEPARATOR]).join(parts)[:length]
        row[: len(joined)] = np.frombuffer(joined, np.uint8)
    return tokens


def _keys(info: Any) -> tuple[tuple[str, ...], str]:
    """Names of the texts and of the label: what the set declares as supervised, or else all texts."""
    from tensorflow_datasets import features

    texts = sorted(k for k, feature in info.features.items() if isinstance(feature, features.Text))
    declared, label = (info.supervised_keys or (None, "label"))[:2]
    fields = texts if declared is None else [declared]
    numbers = [k for k, f in info.features.items() if k not in texts and f.shape == ()]
    if not fields or not set(fields) <= set(texts) or label not in numbers:
        raise ValueError(
            f"tfds_text: expected texts with a label, got {info.full_name!r} with input {declared!r} "
            f"and target {label!r}; its texts are {texts}, its numbers {numbers}."
        )
    return tuple(fields), label


def _read(builder: Any, split: str, fields: tuple[str, ...], label: str, dtype: type) -> TextSplit:
    records = builder.as_data_source(split, file_format=FILE_FORMAT)
    texts, labels = [], []
    for record in read_records(records, np.arange(len(records))):
        texts.append([record[field].decode() for field in fields])
        labels.append(record[label])
    shape = (len(labels), len(fields))
    strings = np.array(texts, np.dtypes.StringDType()).reshape(shape)
    return TextSplit(strings, np.array(labels, dtype))
