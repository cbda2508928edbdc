"""What families of optimization problems share: their making, their checks, and reading problems."""

import os
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.checks import as_held, check_held, check_option
from lohp_jax.tasks.splits import check_split
from lohp_jax.types import Composite, ProblemFamily, Split

Problem = dict[str, jax.Array]


def problem_family(
    name: str,
    *,
    sample: Callable[[jax.Array, Split], Problem],
    objective: Callable[[jax.Array, Problem], jax.Array],
    start: Callable[[Problem], jax.Array],
    init: Callable[[jax.Array], jax.Array],
    solve: Callable[[Problem, jax.Array], jax.Array],
    frame: Callable[[Problem], tuple[jax.Array, jax.Array]],
    features: Callable[[Problem], jax.Array],
    check: Callable[[Problem], None],
    composite: Composite | None = None,
    certificate: Callable[[jax.Array, Problem], jax.Array] | None = None,
) -> ProblemFamily:
    """A `ProblemFamily` whose loss and evaluation are its objective, and whose context is the problem.

    The key that `sample` is called with differs between the splits, so that their problems do.
    """

    def sample_split(key, split="train"):
        check_split(split)
        return sample(jax.random.fold_in(key, split == "train"), split)

    def evaluate(x, problem):
        value = objective(x, problem)
        return {"objective": value, "loss": value}

    return ProblemFamily(
        sample_split,
        init,
        lambda x, problem, key: objective(x, problem),
        evaluate,
        lambda problem, key: problem,
        name=name,
        objective=objective,
        start=start,
        solve=solve,
        frame=frame,
        features=features,
        check=check,
        composite=composite,
        certificate=certificate,
    )


def check_sizes(function: str, **sizes: int) -> None:
    """Raises ValueError for a size that is not at least 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{function}: {name} must be at least 1, got {size}.")


def check_problem(family: str, problem: Any, shapes: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Refuses a problem with arrays missing, of other shapes, or with numbers that are not finite.

    Args:
      family: name, for messages.
      problem: to check.
      shapes: of each array, e.g. `{"A": "m n", "b": "m"}`; equal letters are equal sizes.

    Returns: the arrays named in `shapes`.

    Raises: ValueError that says what was expected, what came and what to do.
    """
    if not isinstance(problem, Mapping) or not shapes.keys() <= problem.keys():
        raise ValueError(
            f"{family}: expected a problem with {list(shapes)}, got "
            f"{sorted(problem) if isinstance(problem, Mapping) else type(problem).__name__}; "
            "see `sample` of the family."
        )
    arrays, sizes = {name: np.asarray(problem[name]) for name in shapes}, {}
    for name, array in arrays.items():
        wanted = shapes[name].split()
        if array.ndim != len(wanted) or any(
            sizes.setdefault(letter, size) != size
            for letter, size in zip(wanted, array.shape, strict=True)
        ):
            known = [str(sizes.get(letter, letter)) for letter in wanted]
            raise ValueError(
                f"{family}: expected {name} of shape [{', '.join(known)}], got "
                f"{list(array.shape)}; give one problem, and use `jax.vmap` for many."
            )
        real = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
        if not real:
            raise ValueError(
                f"{family}: expected real numbers in {name}, got {array.dtype}; convert them."
            )
        check_held(family, name, array)
        if not np.isfinite(array).all():
            raise ValueError(
                f"{family}: expected finite numbers in {name}, got {np.isnan(array).sum()} NaN and "
                f"{np.isinf(array).sum()} infinite; take them out."
            )
    return arrays


def check_columns(family: str, matrix: np.ndarray) -> None:
    """Raises ValueError for a matrix with a column of zeros, whose variable would have no effect."""
    empty = np.flatnonzero(~matrix.any(axis=0))
    if empty.size:
        raise ValueError(
            f"{family}: expected no column of zeros in A, got {empty.tolist()}; "
            "leave these variables out."
        )


def read_problems(
    path: str | os.PathLike, family: ProblemFamily, *, prefix: str = ""
) -> dict[str, np.ndarray]:
    """Reads problems of a family from an .npz file, without pickles, and checks each.

    An array that all problems share may lack the leading axis, or be left out if the family itself
    has one for all, e.g. `penalty` of a LASSO.

    Args:
      path: of the file; its arrays are called as in the problems of `family.sample`, with a leading
        axis that counts the problems. Without a prefix it holds nothing else.
      family: what they are problems of.
      prefix: put before the name of every array; a file with one may hold more, e.g. solutions.

    Returns: the arrays with a leading axis, as `jax.vmap` of the family's functions takes them.

    Raises: FileNotFoundError without such a file; ValueError for a file that is none of .npz, arrays
      that are unknown, missing or disagree on the number of problems, and what `family.check` raises.
    """
    arrays = _load(path)
    one, other = (family.sample(jax.random.key(seed)) for seed in range(2))
    for name in () if prefix else arrays:
        check_option("read_problems", f"an array in {os.fspath(path)!r}", name, one)
    problems = {}
    for name, example in one.items():
        if prefix + name in arrays:
            problems[name] = _as_type(prefix + name, arrays[prefix + name], example)
        elif jnp.array_equal(example, other[name]):
            problems[name] = np.asarray(example)
        else:
            raise ValueError(
                f"read_problems: expected an array {prefix + name!r} in {os.fspath(path)!r}, "
                f"got {sorted(arrays)}."
            )
    return _with_leading_axis(problems, one, family)


def _load(path: str | os.PathLike) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"read_problems: expected an .npz file of plain arrays, got {os.fspath(path)!r} "
            f"({error}); write it with `numpy.savez`."
        ) from error


def _as_type(name: str, array: np.ndarray, example: jax.Array) -> np.ndarray:
    """The array with the type of the family's own; integers become floats, never the reverse."""
    if not np.can_cast(array.dtype, example.dtype, "same_kind"):
        raise ValueError(
            f"read_problems: expected {name} of type {example.dtype}, got {array.dtype}; convert it."
        )
    held = as_held("read_problems", name, array)
    return held.astype(example.dtype)


def _with_leading_axis(
    problems: dict[str, np.ndarray], example: Problem, family: ProblemFamily
) -> dict[str, np.ndarray]:
    counts = {
        name: len(array) for name, array in problems.items() if array.ndim == example[name].ndim + 1
    }
    count = max(counts.values(), default=1)
    if min(counts.values(), default=1) < 1 or len(set(counts.values())) > 1:
        raise ValueError(
            "read_problems: expected as many problems in every array, and one at least, "
            f"got {counts}; give each array one leading axis that counts the problems."
        )
    full = {
        name: array if name in counts else np.broadcast_to(array, (count, *array.shape))
        for name, array in problems.items()
    }
    for index in range(count):
        try:
            family.check({name: array[index] for name, array in full.items()})
        except ValueError as error:
            raise ValueError(f"read_problems: problem {index}: {error}") from error
    return full
