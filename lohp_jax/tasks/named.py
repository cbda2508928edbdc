"""How the families of the table are made from the names of their data."""

import os
from typing import Any

import jax

from lohp_jax.data import ImageSet, domain_set, image_set
from lohp_jax.data import omniglot as read_omniglot
from lohp_jax.tasks.backbone import kept_backbone
from lohp_jax.tasks.domains import domain_family
from lohp_jax.tasks.images import image_family
from lohp_jax.tasks.n_way import n_way_tables
from lohp_jax.tasks.omniglot import omniglot_backbone, omniglot_family
from lohp_jax.tasks.partitions import partition_tables
from lohp_jax.tasks.pools import DealtPool
from lohp_jax.tasks.splits import Holdout
from lohp_jax.tasks.transfer import check_sets, transfer_family
from lohp_jax.types import TaskFamily

_OMNIGLOT = "tfds:omniglot"
_POOLS = {"train_per_class": 100, "query_per_class": 50}
_SOURCE_POOLS = {"train_per_class": 300, "query_per_class": 50}
_QUERY = 5


def n_way(
    name: str,
    *,
    data: str,
    data_dir: str | None,
    holdout: Holdout,
    seed: int,
    way: int,
    image_size: int | None,
    **options: Any,
) -> TaskFamily:
    """Tasks of `way` classes of an image set."""
    images = _sized(data, data_dir, image_size)
    tables = n_way_tables(len(images.train), way=way, holdout=holdout, seed=seed)
    return image_family(name, images, tables, **options)


def partitions(
    name: str,
    *,
    data: str,
    data_dir: str | None,
    holdout: Holdout,
    seed: int,
    image_size: int | None,
    **options: Any,
) -> TaskFamily:
    """All classes of an image set, split in two."""
    images = _sized(data, data_dir, image_size)
    tables = partition_tables(len(images.train), holdout=holdout, seed=seed)
    return image_family(name, images, tables, **options)


def omniglot(
    name: str, *, data: str, data_dir: str | None, holdout: Holdout, **options: Any
) -> TaskFamily:
    """Whole networks for characters of Omniglot."""
    _check_omniglot(name, data, holdout)
    return omniglot_family(read_omniglot(data_dir=data_dir), name=name, **options)


def omniglot_heads(
    name: str,
    *,
    data: str,
    data_dir: str | None,
    holdout: Holdout,
    backbone: str | None,
    filters: int,
    seed: int,
    **options: Any,
) -> TaskFamily:
    """Heads for characters of Omniglot over a backbone of the training ones."""
    _check_omniglot(name, data, holdout)
    characters = read_omniglot(data_dir=data_dir)
    frozen = omniglot_backbone(characters, backbone, filters=filters, seed=seed)
    return omniglot_family(
        characters, backbone=frozen, cache=backbone, seed=seed, name=name, **options
    )


def transfer(
    name: str,
    *,
    data: str,
    data_dir: str | None,
    holdout: Holdout,
    backbone: str | os.PathLike | None,
    filters: int,
    targets: tuple[str, ...],
    seed: int,
    **options: Any,
) -> TaskFamily:
    """Heads over a backbone of one image set, to be tested on others."""
    _check_new_classes(name, holdout)
    source = _read(data, data_dir, _SOURCE_POOLS)
    others = [_read(target, data_dir, _POOLS) for target in targets]
    check_sets(source, others, options["way"])  # before minutes of training
    pool, classes = DealtPool(source.train, _QUERY), range(len(source.train))
    frozen = kept_backbone(pool, classes, jax.random.key(seed), backbone, filters=filters)
    return transfer_family(source, others, frozen, fit=True, cache=backbone, name=name, **options)


def domains(
    name: str,
    *,
    data: str,
    data_dir: str | None,
    holdout: Holdout,
    domain: str | None,
    seed: int,
    **options: Any,
) -> TaskFamily:
    """All domains of a set but one, which is held out; `domain` None lets `seed` pick it."""
    if holdout != "tasks":
        raise ValueError(
            f"make_family: {name!r} holds out a domain over the same classes, got holdout={holdout!r}; "
            "leave it out, and name the domain if you like."
        )
    images = domain_set(data, data_dir=data_dir)
    held_out = images.domains[seed % len(images.domains)] if domain is None else domain
    return domain_family(images, held_out, name=name, **options)


def _sized(source: str, data_dir: str | None, image_size: int | None) -> ImageSet:
    sized = {} if image_size is None else {"image_size": image_size}
    return image_set(source, data_dir=data_dir, **sized)


def _read(source: str, data_dir: str | None, pools: dict[str, int]) -> ImageSet:
    if source == "digits":
        return image_set(source)
    return image_set(source, data_dir=data_dir, **pools)


def _check_omniglot(name: str, data: str, holdout: Holdout) -> None:
    _check_new_classes(name, holdout)
    if data != _OMNIGLOT:
        raise ValueError(
            f"make_family: {name!r} is made of data={_OMNIGLOT!r}, whose characters and rotations it "
            f"splits, got {data!r}; for other images take 'digits_5way', which takes any."
        )


def _check_new_classes(name: str, holdout: Holdout) -> None:
    if holdout != "classes":
        raise ValueError(
            f"make_family: {name!r} holds out whole classes, got holdout={holdout!r}; leave it out."
        )
