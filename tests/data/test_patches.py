import numpy as np

from lohp_jax.data.patches import cosine_dictionary, image_patches


def test_patches_are_standardised_and_differ_by_photograph():
    pools = image_patches()
    for pool in pools:
        assert pool.shape == (10_000, 64) and pool.dtype == np.float32
        np.testing.assert_allclose(pool.mean(1), 0, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(pool, axis=1), 8, rtol=1e-4)
    seen = {patch.tobytes() for patch in pools[0]}
    assert not seen & {patch.tobytes() for patch in pools[1]}


def test_the_cosine_dictionary_is_overcomplete():
    atoms = cosine_dictionary()
    assert atoms.shape == (64, 128) and np.linalg.matrix_rank(atoms) == 64
    np.testing.assert_allclose(np.linalg.norm(atoms, axis=0), 1, rtol=1e-6)
    i, j, k, l = 3, 5, 7, 2  # pixel and frequencies
    wave = np.cos(np.pi * k * (np.arange(8) + 0.5) / 16)[:, None] * np.cos(
        np.pi * l * (np.arange(8) + 0.5) / 8
    )
    np.testing.assert_allclose(
        atoms[8 * i + j, 8 * k + l], (wave / np.linalg.norm(wave))[i, j], rtol=1e-5
    )
    product = np.abs(atoms.T @ atoms) - np.eye(128)
    assert 0.5 < product.max() < 1 - 1e-3
