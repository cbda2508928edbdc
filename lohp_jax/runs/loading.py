"""Trained generators from disk."""

import os
import pathlib
import typing
from typing import Any

import jax
import jax.numpy as jnp

from lohp_jax.files import first_difference
from lohp_jax.generation import make_generator
from lohp_jax.methods import METHODS
from lohp_jax.methods.training import state_shapes
from lohp_jax.runs.config import convert, from_json, resolve
from lohp_jax.runs.families import family_of
from lohp_jax.tasks.door import check_same_family, describe_family
from lohp_jax.training import checkpoint
from lohp_jax.trajectories.dataset import Coordinates, imitating, make_space
from lohp_jax.types import Generator, Method, TaskFamily


def load(
    directory: str | os.PathLike,
    method: str | Method = "lohp",
    family: TaskFamily | None = None,
    *,
    imitate: str = "best",
) -> Generator:
    """Loads a trained generator from the directory of `fit`, `lohp run` or `lohp train`.

    Args:
      directory: of the run.
      method: which of the methods that were trained there; one that is not of this package is given
        itself.
      family: the tasks; None for a run that knows where its family comes from.
      imitate: whose trajectories generated weights follow: the name of one of the run's teachers;
        "best", the one that reached the lowest loss on the training tasks; or "mixed", one that every
        sample draws, each as likely as the others.

    Returns: a `Generator`; its `config` is what was saved with it.

    Raises: FileNotFoundError if there is no checkpoint; ValueError if it is damaged, does not fit, was
      made for another family or with other settings of the method, needs a family or a method that
      was not given, or has no teacher to `imitate`.
    """
    name = method if isinstance(method, str) else method.name
    folder = pathlib.Path(directory) / "checkpoints" / name
    saved = checkpoint.read_config(folder)
    family = _family(saved, family, directory)
    check_same_family(describe_family(family), saved["family"], str(directory))
    if isinstance(method, str):
        method = _from_table(saved["method"], saved.get("run"), directory)
    if method.window != saved.get("window"):
        raise ValueError(
            f"load: {name} in {directory} was trained with window={saved.get('window')}, got a method "
            f"with window={method.window}; give the NetworkConfig.window that it was trained with."
        )
    if difference := first_difference(saved["method"]["config"], method.config, "method"):
        raise ValueError(
            f"load: {name} in {directory} was trained with other settings: {difference}; give the "
            "method as it was trained, or its name if it is one of this package."
        )
    key = jax.random.key(0)
    theta_0 = jax.eval_shape(family.init, key)
    scale = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((), "float32"), theta_0)
    shapes = Coordinates(theta_0, scale, jax.ShapeDtypeStruct((), "int32"))
    sizes = {"channels": saved["channels"], "num_steps": saved["num_steps"]}
    sizes["num_teachers"] = len(saved["teachers"])
    blank = make_space(family, _zeros(shapes), **sizes)
    template = {"state": state_shapes(method.bound(blank), blank), "coordinates": shapes}
    _, restored = checkpoint.restore(folder, template)
    space = make_space(family, restored["coordinates"], **sizes)
    space = imitating(space, imitate, saved["teachers"])
    return make_generator(method, space, restored["state"].params, saved)


def _family(saved: dict[str, Any], family: TaskFamily | None, directory: Any) -> TaskFamily:
    if family is not None:
        return family
    if "run" not in saved:
        raise ValueError(
            f"load: {directory} was made from Python and does not know where its family comes from; "
            f"expected load(..., family=...), the family {saved['family']['name']!r}."
        )
    return family_of(resolve(from_json(saved["run"])))


def _from_table(saved: dict[str, Any], run: dict[str, Any] | None, directory: Any) -> Method:
    """The method that a checkpoint names, with its settings of then."""
    name, config = saved["name"], saved["config"]
    if name not in METHODS and run is not None:  # one of the user's own, found as the run found it
        settings = resolve(from_json(run))
        own = {m.name: m for m in map(settings.method, settings.methods)}
        if name in own:
            return own[name]
    if name not in METHODS:
        raise ValueError(
            f"load: the method {name!r} in {directory} is not of this package; expected "
            "load(..., method=...) with the method itself."
        )
    hints = typing.get_type_hints(METHODS[name])
    return METHODS[name](**{k: convert(v, hints[k], f"method.{k}") for k, v in config.items()})


def _zeros(shapes: Coordinates) -> Coordinates:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
