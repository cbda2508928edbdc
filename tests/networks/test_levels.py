import jax.numpy as jnp
import numpy as np

from lohp_jax.networks.levels import level_features


def test_level_features_tell_levels_apart():
    """Half a period of the slowest, sixteen of the fastest, between λ = -10 and 10."""
    levels = np.linspace(-10, 10, 41)
    seen = np.stack([level_features(jnp.float32(level)) for level in levels])
    angles = np.pi * levels[:, None] / 10 * np.array([0.5, 1, 2, 4, 8, 16])
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    np.testing.assert_allclose(seen, expected, atol=1e-4)
    distance = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
    assert distance[~np.eye(41, dtype=bool)].min() > 0.1
