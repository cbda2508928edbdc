"""What diffusion learns from: training problems, their solutions, and points on the way to them."""

import dataclasses
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lohp_jax.problems.reference import TOLERANCE, certified, solve_exactly
from lohp_jax.types import ProblemFamily, PyTree

_LABEL = ("solution", "value", "excess")  # of `Solved`, in the order of `Reference`
_AT_ONCE = 256  # problems that are solved again


@dataclasses.dataclass(frozen=True)
class OracleConfig:
    """Where the points come from that training hides in noise; the target is always the solution."""

    solutions: float = 1.0
    """Share of the solutions themselves."""
    trajectories: float = 0.0
    """Share of the iterates of a classic optimizer from the family's start: of proximal gradient descent
    if the family is composite, else of Adam in the coordinates of its frame."""
    artificial: float = 0.0
    """Share of solutions with noise on them."""
    trajectory_steps: int = 20
    """Iterates of a trajectory."""
    noise: float = 0.3
    """Largest standard deviation of artificial noise, in units of the frame; drawn evenly from 0."""

    def __post_init__(self):
        shares = self.solutions, self.trajectories, self.artificial
        if not all(0 <= share < float("inf") for share in shares) or sum(shares) <= 0:
            raise ValueError(
                "solutions, trajectories and artificial must not be negative, and one of them "
                f"positive, got {shares}."
            )
        if self.trajectory_steps < 1:
            raise ValueError(f"trajectory_steps must be at least 1, got {self.trajectory_steps}.")
        if not 0 < self.noise < float("inf"):
            raise ValueError(f"noise must be finite and positive, got {self.noise}.")


class Solved(NamedTuple):
    """A training problem and what is known of it.

    Attributes:
      key: the problem is `family.sample(key, "train")`, drawn anew where it is needed.
      solution: `[n]`.
      value: the objective there.
      start_value: the objective at the family's start.
      iterates: `[S, n]`, of a classic optimizer; None where none are asked for.
      excess: how far the value is above the minimum at most; None where nothing proves it.
    """

    key: jax.Array
    solution: jax.Array
    value: jax.Array
    start_value: jax.Array
    iterates: jax.Array | None
    excess: jax.Array | None = None


def solved(family: ProblemFamily, oracle: OracleConfig, keys: jax.Array) -> Solved:
    """Training problems with their labels, one for each key."""

    def one(key):
        sample_key, solve_key = jax.random.split(key)
        problem = family.sample(sample_key, "train")
        solution, start = family.solve(problem, solve_key), family.start(problem)
        iterates = None
        if oracle.trajectories:
            iterates = _iterates(family, problem, oracle.trajectory_steps)
        values = (family.objective(x, problem) for x in (solution, start))
        excess = family.certificate and family.certificate(solution, problem)
        return Solved(sample_key, solution, *values, iterates, excess)

    return jax.lax.map(one, keys, batch_size=256)


def certify(family: ProblemFamily, pool: Solved) -> Solved:
    """Solves anew, in float64 on the host, the problems whose labels are not certified.

    Warns: UserWarning, if labels are left that are not.
    """
    if pool.excess is None:
        return pool
    count = len(pool.key)
    wrong = np.flatnonzero(~np.asarray(certified(family, pool.value, pool.excess)))
    pool, left = pool._replace(**{name: np.array(getattr(pool, name)) for name in _LABEL}), 0
    for some in np.array_split(wrong, -(-len(wrong) // _AT_ONCE)) if len(wrong) else ():
        problems = jax.jit(jax.vmap(lambda key: family.sample(key, "train")))(pool.key[some])
        exact = solve_exactly(family, problems, pool.key[some])
        better = exact.excess < pool.excess[some]
        for name, values in zip(_LABEL, exact, strict=False):
            getattr(pool, name)[some[better]] = values[better]
        left += np.sum(~exact.certified)
    if left:
        warnings.warn(
            f"train_diffusion: expected labels of {family.name!r} proven to be within {TOLERANCE} of "
            f"the minimum, got {left} of {count} that are not, so that gaps to them are no gaps to f*; "
            "give the family a better `solve`, or, of a LASSO, scale the columns of A.",
            stacklevel=2,
        )
    return pool._replace(**{name: jnp.asarray(getattr(pool, name)) for name in _LABEL})


def _iterates(family: ProblemFamily, problem: PyTree, num_steps: int) -> jax.Array:
    """`[num_steps, n]` from the start: of proximal gradient descent, or of Adam in the frame."""
    start = family.start(problem)
    if family.composite is not None:
        step = 1.0 / family.composite.lipschitz(problem)

        def descend(x, _):
            moved = x - step * jax.grad(family.composite.smooth)(x, problem)
            moved = family.composite.prox(moved, step, problem)
            return moved, moved

        return jax.lax.scan(descend, start, length=num_steps)[1]
    _, scale = family.frame(problem)
    adam = optax.adam(0.1)

    def adapt(carry, _):
        x, state = carry
        slope = scale * jnp.nan_to_num(jax.grad(family.objective)(x, problem))
        change, state = adam.update(slope, state)
        x = x + scale * change
        return (x, state), x

    return jax.lax.scan(adapt, (start, adam.init(start)), length=num_steps)[1]


def draw_point(
    oracle: OracleConfig,
    solution: jax.Array,
    iterates: jax.Array | None,
    chance: jax.Array,
    noise: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """What noise is to hide, and whether it is the solution.

    Args:
      oracle: shares of the kinds of points.
      solution: `[n]`, in the frame like all that follows.
      iterates: `[S, n]`; None where none are asked for.
      chance: `[3]` uniform in [0, 1).
      noise: `[n]` standard normal.
    """
    points = [solution, solution, solution + oracle.noise * chance[0] * noise]
    if iterates is not None:
        points[1] = iterates[(chance[1] * len(iterates)).astype(jnp.int32)]
    shares = np.cumsum([oracle.solutions, oracle.trajectories, oracle.artificial])
    kind = jnp.sum(chance[2] >= shares[:2] / shares[2])
    return jnp.stack(points)[kind], kind == 0
