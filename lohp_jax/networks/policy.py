"""The policy: encoder, trunk and Gaussian heads put together over the tokens of one codec."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from lohp_jax.checks import check_option
from lohp_jax.networks.trunks import MLPTrunk, UNet
from lohp_jax.types import Codec, Encoder, PyTree

TRUNKS = {"unet": UNet, "mlp": MLPTrunk}


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the policy network."""

    trunk: str = "unet"
    """"unet", or "mlp" for a small number of weights."""
    widths: tuple[int, ...] = (32, 64)
    """Channels of each resolution of the U-Net, or widths of the layers of the MLP."""
    embedding: int = 128
    """Size of the embedding of a label's support examples."""
    window: int | None = None
    """Tokens that the network sees at once, which then bound its memory, for networks of any size; unset
    for all of them. A multiple of 2 to the power of the number of widths less one."""

    def __post_init__(self):
        check_option("NetworkConfig", "trunk", self.trunk, TRUNKS)
        if self.embedding < 1:
            raise ValueError(f"embedding must be at least 1, got {self.embedding}.")
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths must be positive and at least one, got {self.widths}.")
        if self.window is not None:
            self._check_window()

    def _check_window(self):
        if self.trunk != "unet":
            raise ValueError(
                f"window needs trunk='unet', got {self.trunk!r}: another sees all tokens or none."
            )
        stride = 2 ** (len(self.widths) - 1)
        if self.window < 1 or self.window % stride:
            raise ValueError(
                f"window must be a positive multiple of {stride}, by which {len(self.widths)} widths "
                f"shorten the tokens, got {self.window}."
            )


class Heads(NamedTuple):
    """What the network says at one state, all `[length, channels]`; zeros at initialisation.

    Attributes:
      drift: correction to the mean of the next state.
      log_std: unbounded correction to the log standard deviation of the next state.
      backward_drift: the same for the state before.
      backward_log_std: the same for the state before.
    """

    drift: jax.Array
    log_std: jax.Array
    backward_drift: jax.Array
    backward_log_std: jax.Array


class PolicyNetwork(NamedTuple):
    """Pure functions of one example; `vmap` adds the batch.

    Attributes:
      init: `(key, context) -> params`.
      encode: `(params, context, keep) -> embedding`, a pytree; keep = 0 drops the context, 1 keeps it.
      heads: `(params, embedding, teacher, step, state [length, channels]) -> Heads`; that of windows
        takes the `View` of its state after them.
      log_coefficient: `(params) -> [num_steps + 1]`, learned corrections to the log flow, last one 0.
    """

    init: Callable[[jax.Array, PyTree], PyTree]
    encode: Callable[..., PyTree]
    heads: Callable[..., Heads]
    log_coefficient: Callable[[PyTree], jax.Array]


def make_policy_network(
    codec: Codec,
    config: NetworkConfig,
    start: jax.Array,
    *,
    encoder: Encoder,
    inputs: Callable[[PyTree], jax.Array] | None,
    num_steps: int,
    num_teachers: int,
    step_features: Callable[[jax.Array], jax.Array] | None = None,
) -> PolicyNetwork:
    """Builds the network of a policy over the tokens of `codec`.

    Args:
      codec: fixes length, channels and the blocks of the labels.
      config: sizes.
      start: `[length, channels]` tokens of theta_0, scaled to about 1; by them the network tells the
        labels of an untrained head apart.
      encoder: reads a context, of `Support.encode(config.embedding)`.
      inputs: of the `Support`.
      num_steps: N; each step has an embedding of its own.
      num_teachers: how many kinds of trajectories there are to imitate.
      step_features: `(step) -> [F]`, for steps that are no numbers below N, such as noise levels: an
        affine map of these features is then the embedding.
    """
    sizes = Sizes(config, num_steps, num_teachers, step_features)
    facts = _Facts.of(codec, start)

    def seen_by_inputs(context):
        if inputs is None:
            return jnp.zeros((*facts.features.shape[:2], 0))
        return where_read(codec, inputs(context))

    return put_together(
        encoder,
        _transform(sizes, facts),
        num_steps,
        seen_by_inputs,
        lambda seen, keep: (keep * seen,),
    )


def put_together(
    encoder: Encoder,
    transformed: hk.MultiTransformed,
    num_steps: int,
    see: Callable[[PyTree], PyTree],
    keep_seen: Callable[[PyTree, jax.Array], tuple[PyTree, ...]],
) -> PolicyNetwork:
    """A network from its encoder and its two functions over tokens.

    Args:
      encoder: reads a context.
      transformed: `init(read, seen)` and `apply = (embed, heads)`.
      num_steps: N.
      see: `(context) -> seen`, what stands beside the encoder's reading.
      keep_seen: `(seen, keep) ->` what follows the embedding in that of `PolicyNetwork.encode`.
    """
    embed_fn, heads_fn = transformed.apply

    def init(key, context):
        encoder_key, key = jax.random.split(key)
        encoder_params = encoder.init(encoder_key, context)
        read = encoder.apply(encoder_params, context)
        return {
            "encoder": encoder_params,
            "network": transformed.init(key, read, see(context)),
            "log_coefficient": jnp.zeros(num_steps),
        }

    def encode(params, context, keep):
        read = encoder.apply(params["encoder"], context)
        return embed_fn(params["network"], read, keep), *keep_seen(see(context), keep)

    return PolicyNetwork(
        init,
        encode,
        lambda params, *seen: heads_fn(params["network"], *seen),
        lambda params: jnp.append(params["log_coefficient"], 0.0),
    )


class Sizes(NamedTuple):
    """What the modules below are made of; see `make_policy_network`."""

    config: NetworkConfig
    num_steps: int
    num_teachers: int
    step_features: Callable[[jax.Array], jax.Array] | None


class _Facts(NamedTuple):
    """What is known of the weights before any context.

    Attributes:
      codec: of the generated network.
      identity: `[rows, own numbers]`, where theta_0 has a label's own weights.
      features: `[rows, row length, F]`, of each token.
    """

    codec: Codec
    identity: jax.Array
    features: jax.Array

    @classmethod
    def of(cls, codec: Codec, start: jax.Array) -> "_Facts":
        """The facts of theta_0, whose tokens are `start`."""
        own = to_rows(codec, start)[:, codec.shared_length :]
        known = jnp.concatenate([jnp.asarray(codec.features), start], axis=-1)
        return cls(codec, own.reshape(len(own), -1), to_rows(codec, known))


def _transform(sizes: Sizes, facts: _Facts) -> hk.MultiTransformed:
    """`init(key, read, seen)` and `apply = (embed, heads)`."""

    def build():
        embed = functools.partial(embed_rows, sizes, len(facts.identity))
        heads = functools.partial(_heads, sizes, facts)

        def init(read, seen):
            by_number = sizes.step_features is None
            step = jnp.zeros((), jnp.int32 if by_number else jnp.float32)
            state = jnp.zeros(facts.codec.mask.shape)
            return heads((embed(read, 1.0), seen), jnp.zeros((), jnp.int32), step, state)

        return init, (embed, heads)

    return hk.without_apply_rng(hk.multi_transform(build))


def embed_rows(sizes: Sizes, num_rows: int, read: jax.Array, keep: jax.Array | float) -> jax.Array:
    """A row of the encoder for each row of the codec; nothing known where keep = 0."""
    width = sizes.config.embedding
    if len(read) != num_rows:  # labels without axes in the weights: one row that knows of all
        read = hk.Linear(width, name="rows")(read.reshape(1, -1))
        read = jnp.broadcast_to(read, (num_rows, width))
    unknown = hk.get_parameter("unknown", (1, width), init=jnp.zeros)
    return keep * read + (1 - keep) * jnp.broadcast_to(unknown, read.shape)


def _heads(sizes: Sizes, facts: _Facts, embedding, teacher, step, state) -> Heads:
    """`PolicyNetwork.heads`."""
    embedding, seen = embedding
    condition = condition_rows(sizes, facts.identity, embedding, teacher, step)
    x = jnp.concatenate([to_rows(facts.codec, state), facts.features, seen], axis=-1)
    channels = state.shape[-1]
    trunk = TRUNKS[sizes.config.trunk](sizes.config.widths, 4 * channels, name="trunk")
    out = from_rows(facts.codec, trunk(x, condition))
    return Heads(*jnp.split(out, 4, axis=-1))


def condition_rows(
    sizes: Sizes, identity: jax.Array, embedding: jax.Array, teacher: jax.Array, step: jax.Array
) -> jax.Array:
    """`[rows, E]` what is known of the task, the teacher and the step, for each row.

    Args:
      sizes: of the network.
      identity: `[rows, I]`, by which theta_0 tells the rows apart.
      embedding: `[rows, E]`, of `embed_rows`.
      teacher: int32 scalar.
      step: its number, or what `sizes.step_features` takes.
    """
    width = sizes.config.embedding
    style = hk.Embed(sizes.num_teachers, width, name="teacher")(teacher)
    if sizes.step_features is None:
        style += hk.Embed(sizes.num_steps, width, name="step")(step)
    else:
        style += hk.Linear(width, name="step")(sizes.step_features(step))
    situation = jnp.broadcast_to(style, (len(identity), width))
    situation = jnp.concatenate([situation, identity], axis=-1)
    gain, offset = jnp.split(hk.Linear(2 * width)(situation), 2, axis=-1)
    condition = embedding * (1.0 + gain) + offset
    return condition + jax.nn.silu(hk.Linear(width, name="condition")(condition))


def where_read(codec: Codec, means: jax.Array) -> jax.Array:
    """What the examples of each label are on average, written where the first layer reads it.

    A gradient of the first layer is an outer product with the input, so a weight moves as the input it
    multiplies: beside the weight stands how this input differs between this label and the others, in
    units of its spread, and its mean. A dense layer is taken to read the input if it has as many inputs
    as an example has numbers; weights of others have zeros beside them.

    Args:
      codec: of the generated network.
      means: `[labels, P]`, of `Support.inputs`.

    Returns: `[rows, row length, F]`, of each row what belongs to its label, or to all labels where the
      codec does not tell them apart.
    """
    shapes = jax.eval_shape(codec.decode, jax.ShapeDtypeStruct(codec.mask.shape, means.dtype))
    number = jnp.arange(1.0, means.shape[1] + 1)[:, None]  # 0 stands for none

    def index(leaf):
        reads = leaf.ndim == 2 and leaf.shape[0] == means.shape[1]
        return jnp.broadcast_to(number, leaf.shape) if reads else jnp.zeros(leaf.shape)

    read = to_rows(codec, codec.lay_out(jax.tree.map(index, shapes)))[0].astype(jnp.int32)
    contrast = means - means.mean(axis=0, keepdims=True)
    contrast = contrast / (jnp.std(contrast) + 1e-3)
    values = [jnp.pad(x, ((0, 0), (1, 0)))[:, read] for x in (contrast, means)]
    seen = jnp.concatenate(values, axis=-1)
    if codec.num_classes == len(means):
        return seen
    seen = jnp.moveaxis(seen, 0, 1).reshape(1, seen.shape[1], -1)
    return jnp.broadcast_to(seen, (max(1, codec.num_classes), *seen.shape[1:]))


def to_rows(codec: Codec, tokens: jax.Array) -> jax.Array:
    """`[length, C]` -> `[labels, shared + own, C]`: the network as each label sees it."""
    if not codec.num_classes:
        return tokens[None]
    shared, own = tokens[: codec.shared_length], tokens[codec.shared_length :]
    own = own.reshape(codec.num_classes, -1, tokens.shape[-1])
    shared = jnp.broadcast_to(shared, (codec.num_classes, *shared.shape))
    return jnp.concatenate([shared, own], axis=1)


def from_rows(codec: Codec, rows: jax.Array) -> jax.Array:
    """Inverse of `to_rows`; shared tokens become the mean over what the labels say of them."""
    shared = rows[:, : codec.shared_length].mean(axis=0)
    own = rows[:, codec.shared_length :].reshape(-1, rows.shape[-1])
    return jnp.concatenate([shared, own])
