"""Weights of learned optimizers on disk, in the layout of the published checkpoints.

The format is flax's msgpack: nested dicts of arrays. Nothing is ever unpickled, and nothing is
returned before every key, shape and dtype has been checked.
"""

import os
import pathlib
from typing import Any, Literal, get_args

import jax
import numpy as np

from lohp_jax.checks import check_option
from lohp_jax.files import write_atomically
from lohp_jax.optimizers.features import NUM_CHANNELS
from lohp_jax.types import Params

Rule = Literal["velo", "celo", "celo_adam", "celo2"]
_INPUTS = {"velo": 30, "celo": 18, "celo_adam": 18}
_HIDDEN = {"velo": 4, "celo": 4, "celo2": 8}
_OUTPUTS = 3


def expected_shapes(rule: Rule, *, hidden: int = 1, bank: int = 1) -> dict[str, Any]:
    """Shapes of the weights of a rule, nested as in its checkpoint.

    Args:
      rule: "velo" (published with hidden 512 and bank 256), "celo" or "celo_adam" (64 and 1), "celo2".
      hidden: size of the recurrent state.
      bank: how many sets of weights the recurrent network mixes; celo2 has one, without an axis.
    """
    tree: dict[str, Any] = {}
    if rule in _HIDDEN:
        width, lead = _HIDDEN[rule], () if rule == "celo2" else (bank,)
        stack = {f"w0__{k}": (*lead, n, width) for k, n in enumerate(NUM_CHANNELS)}
        stack |= {"b0": (*lead, width), "w1": (*lead, width, width), "b1": (*lead, width)}
        stack |= {"w2": (*lead, width, _OUTPUTS), "b2": (*lead, _OUTPUTS)}
        tree["ff_mod_stack"] = {"~": stack}
    if rule in _INPUTS:
        linear = {"w": (_INPUTS[rule], hidden), "b": (hidden,)}
        tree["lstm_init_state"] = {"hidden": (1, hidden), "cell": (1, hidden)}
        tree["rnn_params"] = dict.fromkeys(("linear", "linear_1", "linear_2"), linear) | {
            "rnn/linear": {"w": (2 * hidden, 4 * hidden), "b": (4 * hidden,)},
            "step_size": {"w": (hidden, 1), "b": (1,)},
        }
        if rule in _HIDDEN:
            tree["rnn_params"]["rnn_to_controls"] = {"w": (hidden, bank), "b": (bank,)}
    return tree


def load_theta(path: str | os.PathLike) -> Params:
    """Reads the weights of a learned optimizer; of which rule is seen from their keys.

    Args:
      path: a flax msgpack file that holds the weights, or a dict with them at `params`, as the official
        VeLO checkpoint does.

    Returns: nested dict of float32 arrays for `velo`, `celo`, `celo_adam` or `celo2`.

    Raises: FileNotFoundError; ValueError for a file that is truncated or no msgpack, and for weights of
      no known rule, with the first key, shape or dtype that does not fit, or that are not finite.
    """
    import flax.serialization  # here, for a light `import lohp_jax`
    from msgpack.exceptions import UnpackException

    path = pathlib.Path(path)
    try:
        content = flax.serialization.msgpack_restore(path.read_bytes())
    except (ValueError, TypeError, LookupError, AttributeError, UnpackException) as error:
        raise ValueError(
            f"load_theta: {path} is no flax msgpack file, or is damaged ({error}); fetch it again."
        ) from error
    theta = content.get("params", content) if isinstance(content, dict) else content
    if not isinstance(theta, dict):
        raise ValueError(
            f"load_theta: {path} holds a {type(theta).__name__}, expected a dict of weights."
        )
    rule = rule_of(theta)
    try:
        check_theta(theta, rule)
    except ValueError as error:
        raise ValueError(f"{error} The file is {path}.") from None
    for place, leaf in _flatten(theta).items():
        if not np.isfinite(leaf).all():
            raise ValueError(f"load_theta: {path} is not finite at {_name(place)}; fetch it again.")
    return theta


def save_theta(path: str | os.PathLike, theta: Params) -> None:
    """Writes weights that `load_theta` and the published implementations read; in one step.

    Raises: ValueError for weights of no known rule; OSError if the disk is full, the old file intact.
    """
    import flax.serialization  # here, for a light `import lohp_jax`

    check_theta(theta, rule_of(theta))
    content = flax.serialization.msgpack_serialize(jax.tree.map(np.asarray, theta))
    write_atomically(pathlib.Path(path), content)


def rule_of(theta: Params) -> Rule:
    """The rule that weights look made for; `check_theta` tells whether they are."""
    if "rnn_params" not in theta:
        return "celo2"
    if "ff_mod_stack" not in theta:
        return "celo_adam"
    first = _at(theta, ("rnn_params", "linear", "w"))
    return "celo" if np.shape(first)[:1] == (_INPUTS["celo"],) else "velo"


def check_theta(theta: Params, rule: Rule) -> None:
    """Checks every key, shape and dtype of the weights of a rule.

    Raises: ValueError that names the first one that does not fit.
    """
    check_option("check_theta", "rule", rule, get_args(Rule))
    hidden = np.shape(_at(theta, ("lstm_init_state", "hidden")))[-1:] or (1,)
    bank = np.shape(_at(theta, ("ff_mod_stack", "~", "b0")))[:1] or (1,)
    expected = _flatten(expected_shapes(rule, hidden=hidden[0], bank=bank[0]))
    actual = _flatten(theta)
    for path in sorted(expected.keys() | actual.keys()):
        where = f"{rule}: the weights"
        if path not in actual:
            raise ValueError(f"{where} lack {_name(path)}, of shape {expected[path]}.")
        if path not in expected:
            raise ValueError(f"{where} hold {_name(path)}, which {rule} does not have.")
        shape, dtype = np.shape(actual[path]), getattr(actual[path], "dtype", None)
        if shape != expected[path]:
            raise ValueError(
                f"{where} at {_name(path)} have shape {shape}, expected {expected[path]}."
            )
        if dtype != np.float32:
            raise ValueError(f"{where} at {_name(path)} are {dtype}, expected float32.")


def _at(theta: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        theta = theta.get(key, {}) if isinstance(theta, dict) else {}
    return theta


def _flatten(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {p: leaf for key in tree for p, leaf in _flatten(tree[key], (*path, str(key))).items()}


def _name(path: tuple[str, ...]) -> str:
    return "[" + "][".join(path) + "]"
