"""Networks that denoise: dense, unrolled for LASSO, and a U-Net over chunks of x.

All speak in the coordinates of a frame, x = centre + scale y, for one example, and start so that
their output is known: zero, or for LASSO the iterates of ISTA.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from lohp_jax.checks import check_option
from lohp_jax.networks.levels import level_features
from lohp_jax.networks.trunks import UNet
from lohp_jax.solvers.proximal import soft_threshold
from lohp_jax.types import PyTree

NETWORKS = ("mlp", "lasso", "unet")
_MOST = 3.0  # log of the most that "lasso" bends a step or threshold: without, training blows up
POWER_STEPS = 15  # of the power iteration that bounds a LASSO's curvature


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    """Kind and sizes of the denoiser."""

    kind: Literal["mlp", "lasso", "unet"] = "mlp"
    """"mlp" sees vectors of one size; "lasso" any LASSO, through products with A; "unet" long ones."""
    width: int = 128
    """Units of a layer; of each coordinate for "lasso"."""
    depth: int = 3
    """Residual blocks of "mlp", rounds of "lasso", resolutions of "unet"."""
    channels: int = 16
    """Entries of x in a token of "unet"."""

    def __post_init__(self):
        check_option("DenoiserConfig", "kind", self.kind, NETWORKS)
        for name in ("width", "depth", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


class Condition(NamedTuple):
    """What a denoiser sees besides z; a part that is left out is zeros, its weight included.

    Attributes:
      prepared: of the problem, by the network's own `prepare`, whatever the parts are.
      known: scalar weight of the part "parameters"; 0 hides the problem.
      features: `[F]`, the parameters of the problem.
      vectors: `[n, V]`: each gradient over its own size; the x_0 of the step before, if fed.
      scalars: `[S]`: `known`, and of each gradient its weight, log size and log SNR.
    """

    prepared: PyTree
    known: jax.Array
    features: jax.Array
    vectors: jax.Array
    scalars: jax.Array


class Network(NamedTuple):
    """Pure functions of one example.

    Attributes:
      prepare: `(problem, centre [n], scale [n]) -> pytree`, what it needs of the problem itself, done
        once for all steps; it comes back as `Condition.prepared`.
      init: `(key, z [n], log_snr, condition) -> params`.
      apply: `(params, z [n], log_snr, condition) -> [n]`.
    """

    prepare: Callable[..., PyTree]
    init: Callable[..., PyTree]
    apply: Callable[..., jax.Array]


def make_network(config: DenoiserConfig) -> Network:
    """Builds the denoiser of a config. "lasso" wants problems `{"A", "b", "penalty"}`; it says x_0."""
    forward = {"mlp": _mlp, "lasso": _lasso, "unet": _unet}[config.kind]
    network = hk.without_apply_rng(
        hk.transform(lambda z, log_snr, condition: forward(config, z, log_snr, condition))
    )
    prepare = prepare_lasso if config.kind == "lasso" else lambda problem, centre, scale: ()
    return Network(prepare, network.init, network.apply)


def _mlp(config: DenoiserConfig, z: jax.Array, log_snr: jax.Array, condition: Condition):
    """Residual blocks over everything at once, modulated by the noise level and the condition."""
    situation = _embed(config.width, log_snr, condition)
    seen = [z, condition.vectors.reshape(-1), condition.features, condition.scalars]
    h = hk.Linear(config.width, name="input")(jnp.concatenate(seen))
    for block in range(config.depth):
        update = _modulate(h, situation, config.width, f"modulation_{block}")
        update = hk.Linear(config.width, name=f"hidden_{block}")(jax.nn.silu(update))
        update = hk.Linear(config.width, name=f"projection_{block}")(jax.nn.silu(update))
        h += update
    h = hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(h)
    return hk.Linear(len(z), w_init=jnp.zeros, name="output")(jax.nn.silu(h))


def _unet(config: DenoiserConfig, z: jax.Array, log_snr: jax.Array, condition: Condition):
    """The U-Net of the policy, over `channels` entries of x to a token, padded with zeros."""
    situation = _embed(config.width, log_snr, condition)
    columns = jnp.concatenate([z[:, None], condition.vectors], axis=-1)
    padded = jnp.pad(columns, ((0, -len(z) % config.channels), (0, 0)))
    tokens = padded.reshape(-1, config.channels * columns.shape[1])
    widths = tuple(min(2**level, 4) * config.width for level in range(config.depth))
    out = UNet(widths, config.channels, name="unet")(tokens[None], situation[None])
    return out.reshape(-1)[: len(z)]


def _lasso(config: DenoiserConfig, z: jax.Array, log_snr: jax.Array, condition: Condition):
    """Rounds of ISTA, y <- soft(v - g, t), v = y + β (y - y before), whose step, threshold and β bend.

    In each round one dense layer, shared by all coordinates, sees what ISTA sees of a coordinate and a
    memory, says by how much to bend, and adds a correction of its own. All of it is zero at first, so
    that training starts from ISTA at α z. A enters only in products, one with B and one with B^T to a
    round: permuting the columns of A permutes the output, rotating its rows does not change it, and
    the weights fit every size.
    """
    lasso, known = condition.prepared, condition.known
    situation = _embed(config.width, log_snr, condition._replace(features=jnp.zeros(0)))
    alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))  # z = α x_0 + σ ε with α² + σ² = 1
    matrix, t, offset = lasso["B"], known * lasso["t"], lasso["o"]
    target = known * lasso["target"]
    constant = [known * lasso["diagonal"], target, known * jnp.log(lasso["t"] + 1e-6) / 5.0]
    constant = jnp.concatenate([jnp.stack(constant, axis=-1), condition.vectors], axis=-1)

    def bend(y, before, memory):
        momentum = hk.Linear(1, w_init=jnp.zeros, name="momentum")(situation)
        v = y + momentum * (y - before)
        g = known * (matrix.T @ (matrix @ v)) - target
        stepped = soft_threshold(v - g + offset, t) - offset
        pull = jnp.arcsinh(g / (t + 1e-6))
        seen = jnp.stack([v, g, stepped - v, pull, y - before, v == 0], axis=-1)
        h = hk.Linear(config.width, name="input")(jnp.concatenate([memory, seen, constant], -1))
        h += hk.Linear(config.width, name="others")(memory.mean(axis=0))[None]
        h = jax.nn.silu(_modulate(h, situation[None], config.width, "modulation"))
        bends = hk.Linear(3, w_init=jnp.zeros, name="bends")(h)
        step, threshold = jnp.exp(_MOST * jnp.tanh(bends[:, :2] / _MOST)).T
        new = soft_threshold(v - step * g + offset, threshold * t) - offset + bends[:, 2]
        return new, y, memory + hk.Linear(config.width, name="memory")(h)

    weights = hk.Linear(1 + condition.vectors.shape[1], w_init=jnp.zeros, name="start")(situation)
    y = (1.0 + weights[0]) * alpha * z + condition.vectors @ weights[1:]
    memory = jnp.zeros((len(z), config.width))
    return hk.layer_stack(config.depth)(bend)(y, y, memory)[0]


def prepare_lasso(problem: PyTree, centre: jax.Array, scale: jax.Array) -> dict[str, jax.Array]:
    """A LASSO in the coordinates of its frame, divided by its curvature L.

    With B = A scale / sqrt(L), where L is the largest eigenvalue of the Gram matrix as a power
    iteration finds it, the objective over L is |B y|² / 2 - target · y + Σ_i t_i |y_i + o_i| and a
    constant.

    Args:
      problem: `{"A": [m, n], "b": [m], "penalty": []}`.
      centre: `[n]`.
      scale: `[n]`.

    Returns: "B" `[m, n]`, and "target", "t", "o" and "diagonal", that of B^T B, all `[n]`.
    """
    matrix = problem["A"] * scale[None]
    target = matrix.T @ (problem["b"] - problem["A"] @ centre)

    def unit(v):
        return v / jnp.maximum(jnp.linalg.norm(v), 1e-30)

    def grow(_, v):
        return unit(matrix.T @ (matrix @ v))

    start = unit(jnp.ones_like(scale)) + unit(target)  # turns as A's columns do
    top = jax.lax.fori_loop(0, POWER_STEPS, grow, start)
    curvature = 1.05 * jnp.sum((matrix @ top) ** 2) + 1e-30  # the iteration comes from below
    return {
        "B": matrix / jnp.sqrt(curvature),
        "target": target / curvature,
        "t": problem["penalty"] * scale / curvature,
        "o": centre / scale,
        "diagonal": jnp.sum(matrix**2, axis=0) / curvature,
    }


def product_pairs(config: DenoiserConfig, num_evaluations: int) -> int:
    """Products with A and A^T, in pairs, that "lasso" takes for one problem: rounds and preparation."""
    return config.depth * num_evaluations + POWER_STEPS + 2


def _embed(width: int, log_snr: jax.Array, condition: Condition) -> jax.Array:
    """`[width]`: noise level, in Fourier features, and everything that is said once per problem."""
    seen = jnp.concatenate([level_features(log_snr), condition.scalars, condition.features])
    return hk.nets.MLP([width, width], activate_final=True, activation=jax.nn.silu, name="embed")(
        seen
    )


def _modulate(h: jax.Array, situation: jax.Array, width: int, name: str) -> jax.Array:
    """FiLM (Perez et al., 2018): h (1 + gain) + shift."""
    gain, shift = jnp.split(hk.Linear(2 * width, name=name)(situation), 2, axis=-1)
    return h * (1.0 + gain) + shift
