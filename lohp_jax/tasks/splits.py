"""How tasks are held out."""

from typing import Literal

import numpy as np

Holdout = Literal["tasks", "classes"]
HELD_OUT_FRACTION = 0.2
_UNSEEN_CLASSES = 0.3


def split_classes(num_classes: int, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Classes seen in training, and the three in ten that are not, picked by `seed`."""
    order = np.random.default_rng(seed).permutation(num_classes)
    cut = max(1, int(num_classes * _UNSEEN_CLASSES))
    return tuple(sorted(order[cut:].tolist())), tuple(sorted(order[:cut].tolist()))
