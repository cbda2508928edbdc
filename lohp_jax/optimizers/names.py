"""Optimizers by name, as the command line takes them."""

import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import optax

from lohp_jax.checks import check_option
from lohp_jax.optimizers.celo2 import celo2
from lohp_jax.optimizers.extra_args import with_extra_args
from lohp_jax.optimizers.hub import hub
from lohp_jax.optimizers.lgl2o import lgl2o
from lohp_jax.optimizers.pretrained import pretrained, pretrained_optimizer
from lohp_jax.optimizers.sam import sam
from lohp_jax.optimizers.theta import load_theta, rule_of
from lohp_jax.optimizers.trust import hub_trust
from lohp_jax.optimizers.velo import celo, celo_adam, velo
from lohp_jax.types import Params


class _Asked(NamedTuple):
    """A name taken apart: what stands before the first colon, and what after it, None for no colon."""

    name: str
    kind: str
    rest: str | None
    num_steps: int | None


_Maker = Callable[[_Asked], optax.GradientTransformation]


def make_optimizer(
    name: str, num_steps: int | None = None
) -> optax.GradientTransformationExtraArgs:
    """Builds an optimizer by name.

    - "sgd", "momentum", "adam", "adamw", each with a learning rate of one's own: "adam:0.01".
    - "sam", "sam:RATE": SAM around SGD; "sam:INNER" around any other, as in "sam:adam:0.1".
    - "hub", "hub_trust", "lgl2o", each as "hub:RATE": Adam of that learning rate and the learned
      optimizer that ships; "hub:RATE:LEARNED" takes another, as in "hub:0.05:velo:FILE".
    - "small", "small:RATE": the learned optimizer that ships, at the learning rate it was
      meta-trained with, or another.
    - "velo:FILE", "celo:FILE", "celo_adam:FILE": weights for `load_theta`; without a learning rate.
    - "celo2:FILE:RATE"; without FILE the weights that ship, without RATE the default.

    Args:
      name: as above.
      num_steps: T, of the whole run; learned optimizers but for `celo2` plan for it.

    Raises: ValueError for an unknown name, with the nearest one, a bad learning rate, weights of
      another rule, or a learned optimizer without `num_steps`; FileNotFoundError for missing weights.
    """
    kind, colon, rest = name.partition(":")
    check_option("make_optimizer", "name", kind, OPTIMIZERS)
    return with_extra_args(OPTIMIZERS[kind](_Asked(name, kind, rest if colon else None, num_steps)))


def _rated(factory: Callable[[float], optax.GradientTransformation], default: float) -> _Maker:
    return lambda asked: factory(_learning_rate(asked, asked.rest, default))


def _make_sam(asked: _Asked) -> optax.GradientTransformation:
    if asked.rest and _number(asked.rest.partition(":")[0]) is None:
        return sam(make_optimizer(asked.rest, asked.num_steps))
    return sam(optax.sgd(_learning_rate(asked, asked.rest, 0.5)))


def _beside_adam(blend: Callable[..., optax.GradientTransformation]) -> _Maker:
    def make(asked):
        rate, colon, learned = (asked.rest or "").partition(":")
        hand = optax.adam(_learning_rate(asked, None if asked.rest is None else rate, 0.05))
        _steps_of(asked)
        return blend(hand, make_optimizer(learned if colon else "small", asked.num_steps))

    return make


def _make_small(asked: _Asked) -> optax.GradientTransformation:
    rate = None if asked.rest is None else _learning_rate(asked, asked.rest, 0.02)
    return pretrained_optimizer("small", _steps_of(asked), learning_rate=rate)


def _recurrent(factory: Callable[[Params, int], optax.GradientTransformation]) -> _Maker:
    return lambda asked: factory(_theta_of(asked, asked.rest or ""), _steps_of(asked))


def _make_celo2(asked: _Asked) -> optax.GradientTransformation:
    file, rate = asked.rest, None
    if file is not None and not _is_file(file):
        head, _, tail = file.rpartition(":")
        if not head or _is_file(head) or _number(tail) is not None:
            file, rate = head, tail
    if rate is not None and not file and _number(rate) is None:
        file, rate = rate, None  # a file that is missing, rather than a rate
    learning_rate = _learning_rate(asked, rate, 0.05)
    if not file:
        return celo2(pretrained("small"), learning_rate, orthogonalise=False)
    return celo2(_theta_of(asked, file), learning_rate)


def _is_file(name: str) -> bool:
    return pathlib.Path(name).expanduser().is_file()


def _theta_of(asked: _Asked, file: str) -> Params:
    """The weights in a file, which must be for the optimizer that was asked for."""
    if not file:
        raise ValueError(
            f"make_optimizer: expected a file of weights, got {asked.name!r}; write "
            f"'{asked.kind}:FILE'."
        )
    if not _is_file(file):
        raise FileNotFoundError(
            f"make_optimizer: there is no file {file!r} of weights for {asked.name!r}; write "
            f"'{asked.kind}:FILE', with weights that load_theta reads."
        )
    theta = load_theta(pathlib.Path(file).expanduser())
    if (rule := rule_of(theta)) != asked.kind:
        raise ValueError(
            f"make_optimizer: expected weights of {asked.kind} in {file!r}, got some of {rule}; "
            f"write '{rule}:{file}'."
        )
    return theta


def _steps_of(asked: _Asked) -> int:
    if asked.num_steps is None:
        raise ValueError(
            f"make_optimizer: {asked.name!r} plans for a number of steps, got none; give num_steps, "
            "that of the whole run."
        )
    return asked.num_steps


def _learning_rate(asked: _Asked, text: str | None, default: float) -> float:
    rate = default if text is None else _number(text)
    if rate is None or not 0 < rate < math.inf:
        raise ValueError(
            f"make_optimizer: expected a positive learning rate after the colon, got {asked.name!r}; "
            f"write e.g. '{asked.kind}:{default}'."
        )
    return rate


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


OPTIMIZERS: dict[str, _Maker] = {
    "sgd": _rated(optax.sgd, 0.5),
    "momentum": _rated(lambda rate: optax.sgd(rate, momentum=0.9), 0.1),
    "adam": _rated(optax.adam, 0.05),
    "adamw": _rated(optax.adamw, 0.05),
    "sam": _make_sam,
    "hub": _beside_adam(hub),
    "hub_trust": _beside_adam(hub_trust),
    "lgl2o": _beside_adam(lgl2o),
    "small": _make_small,
    "velo": _recurrent(velo),
    "celo": _recurrent(celo),
    "celo_adam": _recurrent(celo_adam),
    "celo2": _make_celo2,
}
"""Maker of each kind of optimizer, by the first part of its name."""
