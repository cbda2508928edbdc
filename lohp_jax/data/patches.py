"""Patches of two real photographs, which come with scikit-learn, and a dictionary for them."""

import functools

import numpy as np

_SIDE = 8
_PER_PHOTOGRAPH = 10_000
_LEAST_DEVIATION = 0.02  # of grey values in [0, 1]; flatter patches are mostly noise


@functools.cache
def image_patches() -> tuple[np.ndarray, np.ndarray]:
    """10,000 patches of 8x8 grey values from each of two photographs, a temple and a flower.

    They are drawn once, with a fixed seed and without the flat ones, which deviate by less than 0.02
    from their mean; each is brought to mean 0 and standard deviation 1.

    Returns: `[10000, 64]` float32 of each photograph.
    """
    from sklearn.datasets import load_sample_images  # here, for a light `import lohp_jax`

    temple, flower = load_sample_images().images
    return _patches_of(temple, seed=0), _patches_of(flower, seed=1)


def _patches_of(photograph: np.ndarray, seed: int) -> np.ndarray:
    grey = photograph.mean(axis=2, dtype=np.float32) / 255.0
    windows = np.lib.stride_tricks.sliding_window_view(grey, (_SIDE, _SIDE))
    windows = windows.reshape(-1, _SIDE, _SIDE)
    order = np.random.default_rng(seed).permutation(len(windows))[: 4 * _PER_PHOTOGRAPH]
    patches = windows[order].reshape(-1, _SIDE**2)
    patches = patches - patches.mean(axis=1, keepdims=True)
    deviation = patches.std(axis=1, keepdims=True)
    textured = deviation[:, 0] >= _LEAST_DEVIATION
    return (patches[textured] / deviation[textured])[:_PER_PHOTOGRAPH]


def cosine_dictionary(side: int = _SIDE, *, overcomplete: int = 2) -> np.ndarray:
    """An overcomplete dictionary of cosines for square patches, without a free parameter.

    Atoms are products of cosines of `side` frequencies along one axis and `overcomplete * side` along
    the other, cos(π k (i + 1/2) / number of frequencies); scaled to unit length.

    Returns: `[side², overcomplete side²]` float32, a row for every pixel, in C order.
    """
    dense, sparse = (
        np.cos(np.pi * np.outer(np.arange(side) + 0.5, np.arange(count)) / count)
        for count in (overcomplete * side, side)
    )
    atoms = np.einsum("ik,jl->ijkl", dense, sparse).reshape(side**2, -1)
    return np.float32(atoms / np.linalg.norm(atoms, axis=0))
