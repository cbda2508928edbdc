"""The spike gate: the hand-designed optimizer where a gradient stands out from its own past."""

from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from lohp_jax.checks import check_fraction, check_option, check_positive
from lohp_jax.optimizers.mixing import (
    Group,
    Mixed,
    Mixer,
    blend,
    combine,
    mean_by_group,
    mix_optimizers,
)
from lohp_jax.optimizers.trees import Tensors, name_of

_LARGEST = 1e18  # of |g|: its square is still a float32


class SpikeState(NamedTuple):
    """State of the spike gate.

    Attributes:
      step: int32, updates so far.
      second_moment: running mean of |g|^2, float32, by name of the tensor.
    """

    step: jax.Array
    second_moment: Tensors


def hub_spike(
    hand_designed: optax.GradientTransformation,
    learned: optax.GradientTransformation,
    *,
    threshold: float = 3.0,
    sharpness: float = 2.0,
    decay: float = 0.999,
    group: Group = "tensor",
) -> optax.GradientTransformationExtraArgs:
    """Blends with s_i = r_i^p / (r_i^p + c^p), where r_i = |g_i| / sqrt(v_i).

    Our extension of HUB, whose softmax compares the entries of a group with each other: here each is
    compared with its own past through Adam's second moment v_i, the bias-corrected running mean of g_i^2
    with this step's included. A steady gradient has r = 1 and a share of 1 / (1 + c^p), a tenth by
    default; one that rises c-fold above its past gets half, and the largest possible r is
    1 / sqrt(1 - decay). The shares depend neither on the number of entries nor on the scale of the loss,
    while |g| lies between about 1e-18 and 1e18, where float32 holds its square. Costs one more array
    like the parameters.

    Args:
      hand_designed: any optax transformation; takes the share s_i.
      learned: the same; takes the rest.
      threshold: c, at which both have the same share.
      sharpness: p.
      decay: of the second moment, in [0, 1).
      group: what `hub_diagnostics` averages over.

    Returns: a transformation whose guard is always on: see `hub`.

    Raises: ValueError for numbers out of range or an unknown option.
    """
    rule = spike_mixer(threshold=threshold, sharpness=sharpness, decay=decay, group=group)
    return mix_optimizers(hand_designed, learned, {"spike": rule}, name="hub_spike")


def spike_mixer(
    *,
    threshold: float = 3.0,
    sharpness: float = 2.0,
    decay: float = 0.999,
    group: Group = "tensor",
) -> Mixer:
    """The rule of `hub_spike`."""
    check_option("hub_spike", "group", group, get_args(Group))
    for name, value in (("threshold", threshold), ("sharpness", sharpness)):
        check_positive("hub_spike", name, value)
    check_fraction("hub_spike", "decay", decay, below_one=True)

    def init(params):
        zeros = {name_of(path): jnp.zeros(jnp.shape(p), jnp.float32) for path, p in params.items()}
        return SpikeState(jnp.zeros((), jnp.int32), zeros)

    def mix(proposal, state):
        step = optax.safe_increment(state.step)
        moments, updates, sums, largest = {}, {}, {}, {}
        for path, gradient in proposal.gradients.items():
            square = jnp.square(jnp.minimum(jnp.abs(gradient).astype(jnp.float32), _LARGEST))
            old = state.second_moment[name_of(path)]
            moments[name_of(path)] = moment = decay * old + (1.0 - decay) * square
            past = moment / (1.0 - decay ** jnp.float32(step))  # an integer would be static eagerly
            # s = 1 / (1 + (c^2 / r^2)^(p / 2)), 0 where there never was a gradient
            some = square > 0.0
            relative = threshold**2 * past / jnp.where(some, square, 1.0)
            share = jnp.where(some, 1.0 / (1.0 + relative ** (sharpness / 2.0)), 0.0)
            updates[path] = blend(share, proposal.ours[path], proposal.theirs[path])
            if share.size:
                sums[path], largest[path] = jnp.sum(share), jnp.max(share)
        mean = mean_by_group(sums, proposal.gradients, group)
        largest = combine(largest, group, jnp.maximum)
        return Mixed(updates, mean, largest, SpikeState(step, moments))

    return Mixer(init, mix, guarded=True)
