from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.trajectories.matching import Matching, match
from lohp_jax.types import Trajectory

NUM_STEPS = 24
every_matching = pytest.mark.parametrize("how", get_args(Matching))


def random_walk(seed=0, num_steps=NUM_STEPS):
    """A trajectory whose moves vary in length by a factor of thousands."""
    rng = np.random.default_rng(seed)
    size = np.exp(2 * rng.normal(size=num_steps))
    moves = {"w": rng.normal(size=(num_steps, 2, 3)), "b": rng.normal(size=num_steps)}
    states = {
        name: np.concatenate([np.zeros((1, *m.shape[1:])), np.cumsum((m.T * size).T, axis=0)])
        for name, m in moves.items()
    }
    losses = np.cumsum(rng.normal(size=num_steps + 1) * np.append(size, 1.0))
    return Trajectory(jax.tree.map(np.float32, states), np.float32(losses), None)


def progress_oracle(trajectory, how):
    """How far along each state is, in [0, 1], by explicit loops in float64."""
    states = [
        np.concatenate([np.float64(leaf[t]).ravel() for leaf in jax.tree.leaves(trajectory.states)])
        for t in range(len(trajectory.losses))
    ]
    losses = np.float64(trajectory.losses)
    lengths, angles, changes = [], [], []
    for t in range(1, len(states)):
        move = states[t] - states[t - 1]
        lengths.append(np.sqrt(np.sum(move**2)))
        changes.append(abs(losses[t] - losses[t - 1]))
        angle = 0.0
        if t > 1:
            before = states[t - 1] - states[t - 2]
            angle = np.arccos(move @ before / np.sqrt((move @ move) * (before @ before)))
        angles.append(angle)
    growth = {
        "uniform": np.ones(len(lengths)),
        "arc_length": np.array(lengths),
        "loss": np.array(changes),
        "curvature": np.array(lengths) / sum(lengths) + np.array(angles) / sum(angles),
    }[how]
    return np.append(0.0, np.cumsum(growth)) / sum(growth)


def match_oracle(progress, num_states):
    """The nearest state to each even share, moved no further than a strict order requires."""
    total = len(progress) - 1
    indices = [0]
    for rank in range(1, num_states - 1):
        nearest = min(range(total + 1), key=lambda t: abs(progress[t] - rank / (num_states - 1)))
        left = num_states - 1 - rank
        indices.append(min(max(nearest, indices[-1] + 1), total - left))
    return [*indices, total]


@every_matching
@pytest.mark.parametrize("num_states", [2, 3, 8, 20, NUM_STEPS + 1])
def test_match_equals_its_definition(how, num_states):
    for seed in range(5):
        trajectory = random_walk(seed)
        expected = match_oracle(progress_oracle(trajectory, how), num_states)
        indices = match(trajectory, num_states, how=how)
        assert indices.dtype == jnp.int32
        np.testing.assert_array_equal(indices, expected)


@pytest.mark.parametrize("num_steps, k", [(6, 1), (24, 8), (1000, 10)])
def test_uniform_takes_every_kth_state_where_k_divides(num_steps, k):
    indices = match(random_walk(num_steps=num_steps), num_steps // k + 1)
    np.testing.assert_array_equal(indices, np.arange(0, num_steps + 1, k))


def test_uniform_rounds_where_no_k_divides():
    indices = np.asarray(match(random_walk(num_steps=23), 8))
    assert np.abs(indices - np.linspace(0, 23, 8)).max() <= 0.5


DEGENERATE = {
    "no movement": lambda t: 0 * t,
    "all movement in the first step": lambda t: 1.0 * (t > 0),
    "all movement in the last step": lambda t: 1.0 * (t == t[-1]),
    "movement too small to square": lambda t: 1e-25 * t,
    "a straight line": lambda t: 1.0 * t,
    "to and fro": lambda t: t % 2.0,
    "converging": lambda t: 1 - 0.1**t,
    "not finite": lambda t: np.where(t > 3, np.nan, t),
}


@every_matching
@pytest.mark.parametrize("course", DEGENERATE.values(), ids=DEGENERATE)
def test_indices_strictly_increase_from_start_to_end(course, how):
    t = np.arange(10)
    trajectory = Trajectory({"w": np.float32(course(t))}, np.float32(-course(t)), None)
    for num_states in (2, 5, 9, 10):
        indices = np.asarray(match(trajectory, num_states, how=how))
        assert indices.shape == (num_states,)
        assert (indices[0], indices[-1]) == (0, 9)
        assert (np.diff(indices) > 0).all()


def test_a_pause_is_no_turn():
    """Steps that move nothing add nothing, so only the corner (at 1) and lengths count."""
    path = np.float32([[0, 0], [1, 0], [1, 1], [1, 1], [1, 1], [1, 1], [1, 1], [1, 4]])
    trajectory = Trajectory(path, np.zeros(8, np.float32), None)
    np.testing.assert_array_equal(match(trajectory, 3, how="curvature"), [0, 2, 7])


@every_matching
def test_vmap_and_jit_equal_a_loop(how):
    walks = [random_walk(seed) for seed in range(3)]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *walks)
    indices = jax.jit(jax.vmap(lambda walk: match(walk, 7, how=how)))(batch)
    for walk, actual in zip(walks, indices, strict=True):
        np.testing.assert_array_equal(actual, match(walk, 7, how=how))


@pytest.mark.parametrize("num_states", [1, NUM_STEPS + 2])
def test_match_rejects_a_number_of_states(num_states):
    with pytest.raises(
        ValueError, match=rf"match: num_states must be between 2 and 25.*{num_states}"
    ):
        match(random_walk(), num_states)


def test_match_rejects_an_unknown_quantity():
    with pytest.raises(
        ValueError, match=r"match: how must be one of .*'arc_length'.*got 'arclength'"
    ):
        match(random_walk(), 3, how="arclength")
