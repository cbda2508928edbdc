"""Heads over a frozen backbone for characters of Omniglot: `heads_5way_1shot` and the like.

Omniglot is read from `$TFDS_DATA_DIR`, where TensorFlow Datasets prepared it; the backbone and its
features are kept in `$OMNIGLOT_BACKBONE`, and made there once, which takes minutes.
"""

import functools
import os
import re

import numpy as np

from lohp_jax.data import omniglot
from lohp_jax.tasks.backbone import Backbone
from lohp_jax.tasks.omniglot import omniglot_backbone, omniglot_family
from lohp_jax.types import TaskFamily

FILTERS, NUM_STEPS = 32, 1500
"""Of the backbone, a prototypical network of twenty ways and one shot; the papers have 64 channels."""


@functools.cache
def characters() -> np.ndarray:
    """All of them, `[1623, 20, 28, 28, 1]`."""
    return omniglot()


@functools.cache
def backbone() -> Backbone:
    """Of the 1,200 training characters and their rotations, the same for all ways and shots."""
    kept = os.environ.get("OMNIGLOT_BACKBONE", "runs/omniglot/backbone")
    return omniglot_backbone(characters(), kept, filters=FILTERS, num_steps=NUM_STEPS)


@functools.cache
def heads(way: int, shots: int) -> TaskFamily:
    """The tasks of so many ways and shots."""
    frozen, kept = backbone(), os.environ.get("OMNIGLOT_BACKBONE", "runs/omniglot/backbone")
    return omniglot_family(
        characters(), way=way, shots=shots, network="linear", backbone=frozen, cache=kept
    )


def __getattr__(name: str) -> TaskFamily:
    if found := re.fullmatch(r"heads_(\d+)way_(\d+)shot", name):
        return heads(*map(int, found.groups()))
    raise AttributeError(name)
