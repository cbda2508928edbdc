"""The policy's network over one window of tokens: nothing in it grows with the network it generates.

What `lohp_jax.networks.policy` has for every token, this computes for the tokens of a window from their
number: layer, kind, fans, and the row and column of the leaf. The one thing it learns of each token is a
small vector, the same for all labels. A window may belong to one label or to all of them; what differs
between labels, the condition and what their examples are on average, is read label by label and then
averaged over those that the window belongs to, so that shared weights are walked once.

Tokens meet only in aligned groups of 2^(resolutions - 1), and a window is made of whole groups: its size
is a matter of memory, and what the network says of a token does not depend on it.
"""

import functools
from collections.abc import Callable, Sequence

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.codec import leaf_features
from lohp_jax.networks.policy import (
    Heads,
    NetworkConfig,
    PolicyNetwork,
    Sizes,
    condition_rows,
    embed_rows,
    put_together,
)
from lohp_jax.types import Codec, Encoder, PyTree, View, Windows
from lohp_jax.windows import Numbers, num_places, numbers_in

TOKEN_VECTOR = 32
"""Numbers that are learned of each token: what it listens to of all that a condition may say."""
_OCTAVES = 8
_SKETCH = 64


def make_window_network(
    windows: Windows,
    config: NetworkConfig,
    start: np.ndarray,
    *,
    encoder: Encoder,
    inputs: Callable[[PyTree], jax.Array] | None,
    num_steps: int,
    num_teachers: int,
    step_features: Callable[[jax.Array], jax.Array] | None = None,
) -> PolicyNetwork:
    """As `make_policy_network`, for windows; `heads` takes their `View` as its last argument."""
    sizes = Sizes(config, num_steps, num_teachers, step_features)
    return put_together(
        encoder,
        _transform(sizes, windows, _sketch(windows.codec, start)),
        num_steps,
        lambda context: None if inputs is None else inputs(context),
        lambda averages, keep: (averages, jnp.float32(keep)),
    )


def _transform(sizes: Sizes, windows: Windows, identity: np.ndarray) -> hk.MultiTransformed:
    """`init(key, read, averages)` and `apply = (embed, heads)`."""

    def build():
        embed = functools.partial(embed_rows, sizes, len(identity))
        heads = functools.partial(_heads, sizes, windows, identity)

        def init(read, averages):
            by_number = sizes.step_features is None
            step = jnp.zeros((), jnp.int32 if by_number else jnp.float32)
            blank = jnp.zeros((windows.size, windows.codec.mask.shape[1]))
            seen = embed(read, 1.0), averages, jnp.float32(1.0)
            zero = jnp.zeros((), jnp.int32)
            return heads(seen, zero, step, blank, View(zero, blank))

        return init, (embed, heads)

    return hk.without_apply_rng(hk.multi_transform(build))


def _heads(sizes, windows, identity, seen, teacher, step, state, view) -> Heads:
    """`PolicyNetwork.heads` at a window; `[size, channels]`."""
    (embedding, averages, keep), widths = seen, sizes.config.widths
    numbers = numbers_in(windows, view.index)
    condition = condition_rows(sizes, jnp.asarray(identity), embedding, teacher, step)
    table = hk.get_parameter(
        "tokens",
        (num_places(windows), TOKEN_VECTOR),
        init=hk.initializers.RandomNormal(1.0),
    )
    listens = jnp.asarray(table)[numbers.place]
    place = jnp.concatenate([listens, _where(windows.codec, numbers)], axis=-1)
    x = jnp.concatenate([state, view.start, place], axis=-1)
    h = hk.Linear(widths[0], name="input")(x)
    share = _share(len(identity), numbers.label)
    beside = _beside(windows.codec, numbers, averages, keep)
    h = _read_rows(h, listens, place, condition, share, beside)
    condition = jnp.tensordot(share, condition, axes=1)
    out = WindowUNet(widths, 4 * state.shape[-1], name="trunk")(h, condition)
    return Heads(*jnp.split(out, 4, axis=-1))


def _read_rows(
    h: jax.Array,
    listens: jax.Array,
    place: jax.Array,
    condition: jax.Array,
    share: jax.Array,
    beside: jax.Array,
) -> jax.Array:
    """What every label says of every token of a window, averaged over the labels it belongs to.

    The whole network has a matrix from the condition to each position; here it is of low rank: what a
    condition may say, times what a token listens to. A gradient is an outer product of inputs and what
    flows back to a unit, so the inputs beside a weight are multiplied by what is known of its place.

    Args:
      h: `[size, width]` tokens.
      listens: `[size, TOKEN_VECTOR]`, learned of them.
      place: `[size, P]`, what is known of them.
      condition: `[rows, E]`.
      share: `[rows]` weights of the mean.
      beside: `[rows, size, F]`, of `_beside`.

    Returns: `[size, width]`.
    """
    width = h.shape[-1]
    says = hk.Linear(TOKEN_VECTOR * width, name="says")(condition)
    says = says.reshape(-1, TOKEN_VECTOR, width) / np.sqrt(TOKEN_VECTOR)
    rows = h[None] + jnp.einsum("tr,lrw->ltw", listens, says)
    if beside.shape[-1]:
        gate = 1.0 + hk.Linear(width, name="gate")(place)
        rows += gate[None] * hk.Linear(width, with_bias=False, name="beside")(beside)
    scale, shift = jnp.split(hk.Linear(2 * width, name="modulation")(condition), 2, axis=-1)
    told = hk.Linear(width, name="row")(jax.nn.silu(rows))
    told = told * (1.0 + scale[:, None]) + shift[:, None]
    return jnp.einsum("l,ltw->tw", share, rows + jax.nn.silu(told))


class WindowUNet(hk.Module):
    """A U-Net in which tokens meet where the resolution is halved and nowhere else.

    Attributes:
      widths: channels of each resolution; every further entry halves the length.
      channels: width of the output, whose layer starts at zero.
    """

    def __init__(self, widths: Sequence[int], channels: int, name: str | None = None):
        super().__init__(name)
        self.widths, self.channels = widths, channels

    def __call__(self, h: jax.Array, condition: jax.Array) -> jax.Array:
        """`[size, widths[0]]` tokens, `[E]` condition -> `[size, channels]`."""
        skips, levels = [], list(enumerate(self.widths[:-1]))
        for level, width in levels:
            h = _block(h, condition, width, f"down_{level}")
            skips.append(h)
            h = h.reshape(len(h) // 2, 2 * width)
        h = _block(h, condition, self.widths[-1], "middle")
        for level, width in reversed(levels):
            h = hk.Linear(2 * width, name=f"expand_{level}")(h).reshape(-1, width)
            h = _block(jnp.concatenate([h, skips.pop()], -1), condition, width, f"up_{level}")
        return hk.Linear(self.channels, w_init=jnp.zeros, name="output")(jax.nn.silu(h))


def _block(x: jax.Array, condition: jax.Array, width: int, name: str) -> jax.Array:
    """Residual block of each token on its own: normalise, modulate, project."""
    h = hk.LayerNorm(axis=-1, create_scale=True, create_offset=True, name=f"{name}_norm")(x)
    h = hk.Linear(width, name=f"{name}_hidden")(h)
    scale, shift = jnp.split(hk.Linear(2 * width, name=f"{name}_modulation")(condition), 2)
    h = jax.nn.silu(h * (1.0 + scale[None]) + shift[None])
    h = hk.Linear(width, name=f"{name}_projection")(h)
    skip = x if x.shape[-1] == width else hk.Linear(width, name=f"{name}_skip")(x)
    return skip + h


def _share(num_rows: int, label: jax.Array) -> jax.Array:
    """`[rows]` weights of the rows that a window belongs to: its label's alone, or all alike."""
    own = jax.nn.one_hot(label, num_rows)
    return jnp.where(label < 0, jnp.full(num_rows, 1 / num_rows), own)


def _where(codec: Codec, numbers: Numbers) -> jax.Array:
    """`[size, F]` layer, kind and fans of each token, and waves over rows and columns of its leaf."""
    known = jnp.asarray(leaf_features(codec.leaves))[numbers.leaf]
    columns = np.array([_columns(leaf) for leaf in codec.leaves], np.int32)
    rows = np.array([max(leaf.size, 1) for leaf in codec.leaves], np.int32) // columns
    columns, rows = (jnp.asarray(x)[numbers.leaf] for x in (columns, rows))
    first = numbers.offset[:, 0]
    places = [first // columns / rows, first % columns / columns]
    angles = jnp.stack(places, -1)[:, :, None] * (jnp.pi * 2.0 ** jnp.arange(_OCTAVES))[None, None]
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.concatenate([known, waves.reshape(len(first), -1)], axis=-1)


def _columns(leaf) -> int:
    """Numbers of a row of a leaf, or of a label's slice of it."""
    shape = [n for axis, n in enumerate(leaf.shape) if axis != leaf.axis]
    return max(shape[-1], 1) if len(shape) > 1 else 1


def _beside(codec: Codec, numbers: Numbers, averages: jax.Array | None, keep: jax.Array):
    """`[rows, size, F]` as `where_read` has it: by each weight, the inputs that it multiplies."""
    if averages is None:
        return jnp.zeros((1, len(numbers.place), 0))
    count = averages.shape[1]
    reads = [len(n.shape) == 2 and n.shape[0] == count and n.axis != 0 for n in codec.leaves]
    columns = np.array([_columns(leaf) for leaf in codec.leaves], np.int32)
    row = numbers.offset // jnp.asarray(columns)[numbers.leaf][:, None]
    reads = jnp.asarray(np.array(reads))[numbers.leaf][:, None] & numbers.real
    row = jnp.where(reads, jnp.clip(row, 0, count - 1) + 1, 0)  # 0 stands for none
    contrast = averages - averages.mean(axis=0, keepdims=True)
    contrast = contrast / (jnp.std(contrast) + 1e-3)
    values = [jnp.pad(x, ((0, 0), (1, 0)))[:, row] for x in (contrast, averages)]
    seen = keep * jnp.concatenate(values, axis=-1)
    if codec.num_classes == len(averages):
        return seen
    return jnp.moveaxis(seen, 0, 1).reshape(1, seen.shape[1], -1)


def _sketch(codec: Codec, start: np.ndarray) -> np.ndarray:
    """`[rows, S]` by what theta_0 tells the labels apart: sums of their own numbers with random signs.

    Zeros where an untrained head is zero; of about unit size otherwise.
    """
    if not codec.num_classes:
        return np.zeros((1, 0), np.float32)
    own = np.asarray(start)[codec.shared_length :].reshape(codec.num_classes, -1)
    signs = np.random.default_rng(0).integers(0, 2, own.shape[1], dtype=np.int8) * 2 - 1
    signed = np.pad(own * signs, ((0, 0), (0, -own.shape[1] % _SKETCH)))
    summed = signed.reshape(len(own), -1, _SKETCH)
    return (summed.sum(axis=1) / np.sqrt(summed.shape[1])).astype(np.float32)
