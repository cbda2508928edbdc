import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.problems.lattice import lattice_search


@pytest.mark.parametrize("spread", [1.0, 0.02])
def test_the_lattice_search_finds_the_closest_of_all_wells(spread):
    """Against an enumeration of 4,913 wells in three dimensions, well conditioned and not."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(3, 3)))[0] for _ in range(2))
    matrix = left @ np.diag([1.5, 0.7, spread]) @ right
    c = np.array([1.0, -0.5, 0.2])
    b = matrix @ rng.normal(size=3)
    curvature = np.diag(40 * np.pi**2 * np.abs(c))
    inverse = np.linalg.inv(matrix.T @ matrix + curvature)

    def bottom(well):
        return inverse @ (matrix.T @ b + curvature @ well)

    def depth(well):
        x = bottom(well)
        return 0.5 * np.sum((matrix @ x - b) ** 2) + 0.5 * (x - well) @ curvature @ (x - well)

    wells = np.array(list(itertools.product(np.arange(-8, 9), repeat=3))) + np.where(c < 0, 0.5, 0)
    nearest = wells[np.argmin([depth(well) for well in wells])]
    points = lattice_search(*map(jnp.float32, (matrix, b, c)), num_beams=32, width=16)
    assert points.shape == (32, 3)
    np.testing.assert_allclose(points[0], bottom(nearest), atol=1e-4)


def test_a_singular_matrix_and_wells_without_depth_are_no_fault():
    points = lattice_search(jnp.ones((2, 2)), jnp.ones(2), jnp.array([0.0, 1.0]), num_beams=8)
    assert np.all(np.isfinite(points))
