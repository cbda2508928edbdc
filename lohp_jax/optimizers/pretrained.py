"""Small learned optimizers: those that ship with the package, and those of one's own meta-training."""

import importlib.resources
import json
import os
import pathlib

import optax

from lohp_jax.checks import check_num_steps, check_option, check_positive
from lohp_jax.optimizers.small import Rate, pack_rate, small_optimizer
from lohp_jax.optimizers.theta import load_theta
from lohp_jax.types import Params

PRETRAINED = {"small": Rate(0.012168176472187042, -0.14846907556056976, 1.3622040748596191)}
"""By name, the learning rate that was meta-trained with each; how each was made and what it does is in
`benchmarks/pretrained/results.json`."""


def pretrained(name: str) -> Params:
    """The weights of a learned optimizer that ships, as `load_theta` returns them.

    "small" is for `celo2(theta, learning_rate, orthogonalise=False)`; `pretrained_optimizer` knows the
    learning rate, too.

    Raises: ValueError for an unknown name, with the nearest.
    """
    check_option("pretrained", "name", name, PRETRAINED)
    file = importlib.resources.files("lohp_jax.optimizers") / "thetas" / f"{name}.msgpack"
    with importlib.resources.as_file(file) as path:
        return load_theta(path)


def pretrained_optimizer(
    name: str, num_steps: int, *, learning_rate: float | None = None
) -> optax.GradientTransformationExtraArgs:
    """A learned optimizer that ships, as it was meta-trained: needs nothing but the number of steps.

    The learning rate falls from its peak to zero over `num_steps`, see `Rate`. Updates do not depend on
    the scale of the loss, but their size is that of the learning rate: networks whose weights are far
    from the usual size of 1 / sqrt(inputs) need one of their own.

    Args:
      name: a key of `PRETRAINED`.
      num_steps: T, of the whole run; meta-trained for 100 to 2000.
      learning_rate: the peak; None for that of meta-training at this number of steps.

    Raises: ValueError for an unknown name, with the nearest, a `num_steps` that is no positive whole
      number, or a `learning_rate` that is not positive and finite.
    """
    check_option("pretrained_optimizer", "name", name, PRETRAINED)
    return _at_rate(
        "pretrained_optimizer", pretrained(name), PRETRAINED[name], num_steps, learning_rate
    )


def meta_trained_optimizer(
    directory: str | os.PathLike, num_steps: int, *, learning_rate: float | None = None
) -> optax.GradientTransformationExtraArgs:
    """The learned optimizer of a finished run of `lohp meta-train`.

    Args:
      directory: of the run.
      num_steps: T, of the whole run of the optimizer.
      learning_rate: as of `pretrained_optimizer`.

    Raises: FileNotFoundError, if the run is not finished or not there; ValueError, if its files do not
      read, or for numbers as of `pretrained_optimizer`.
    """
    directory = pathlib.Path(directory).expanduser()
    results, theta = directory / "results.json", directory / "theta.msgpack"
    for path in (results, theta):
        if not path.is_file():
            raise FileNotFoundError(
                f"meta_trained_optimizer: expected {path.name} in {directory}, found none; finish the "
                "run with lohp meta-train."
            )
    try:
        rate = Rate(**json.loads(results.read_text(encoding="utf-8"))["rate"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"meta_trained_optimizer: {results} holds no learning rate of lohp meta-train ({error!r})."
        ) from error
    return _at_rate("meta_trained_optimizer", load_theta(theta), rate, num_steps, learning_rate)


def _at_rate(
    function: str, theta: Params, rate: Rate, num_steps: int, learning_rate: float | None
) -> optax.GradientTransformationExtraArgs:
    check_num_steps(function, num_steps)
    if learning_rate is not None:
        check_positive(function, "learning_rate", learning_rate)
        rate = rate._replace(peak=learning_rate, exponent=0.0)
    return small_optimizer({"theta": theta} | pack_rate(rate), num_steps)
