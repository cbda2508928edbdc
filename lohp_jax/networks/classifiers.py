"""The small classifiers whose weights are learned or generated.

Each ends in a Haiku module named `head`, whose last axis counts the labels. That of "linear" starts
with zeros, so that no label is special. Those of the others start at random, four times as wide as
usual: training then changes the layers below about linearly in the task, and a solution is easier to
predict from it (measured on `digits_partitions`, ridge from the true partition with products of two
classes: .912 held out at four times the width, .898 at the usual one; the teacher gains as well).

Further down are the networks that only compare optimizers: larger classifiers, whose head starts near
zero, and the parts of lane keeping.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from lohp_jax.checks import check_option
from lohp_jax.types import Params, PyTree

HEAD = "head"
_WIDE = hk.initializers.VarianceScaling(16.0, "fan_in", "truncated_normal")
_SMALL = hk.initializers.TruncatedNormal(0.02)
_RECTIFIED = hk.initializers.VarianceScaling(2.0, "fan_in", "truncated_normal")


class Network(NamedTuple):
    """A pure classifier.

    Attributes:
      init: `(key) -> params`.
      apply: `(params, images [N, height, width, channels]) -> logits [N, num_classes]`.
      class_axes: see `TaskFamily.class_axes`.
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[[Params, jax.Array], jax.Array]
    class_axes: PyTree


def _linear(images: jax.Array) -> jax.Array:
    return hk.Flatten()(images)


def _mlp(images: jax.Array) -> jax.Array:
    return jax.nn.relu(hk.Linear(16)(hk.Flatten()(images)))


def _conv(images: jax.Array) -> jax.Array:
    x = jax.nn.relu(hk.Conv2D(8, 3)(images))
    x = hk.max_pool(x, (2, 2, 1), (2, 2, 1), "SAME")
    x = jax.nn.relu(hk.Conv2D(16, 3)(x))
    x = hk.max_pool(x, (2, 2, 1), (2, 2, 1), "SAME")
    return hk.Flatten()(x)


def _conv4(images: jax.Array, *, filters: int = 64) -> jax.Array:
    """`[N, height, width, channels]` -> `[N, filters * (height // 16) * (width // 16)]`."""
    x = images
    for _ in range(_BLOCKS):
        x = conv_2d(x, filters, 3)
        norm = hk.LayerNorm((1, 2, 3), create_scale=True, create_offset=True, param_axis=-1)
        x = _halve(jax.nn.relu(norm(x)))
    return hk.Flatten()(x)


def _halve(x: jax.Array) -> jax.Array:
    """2x2 max pooling, without the last row or column of an odd number; fast to differentiate."""
    count, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(count, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


_BLOCKS = 4
NETWORKS = {"linear": _linear, "mlp": _mlp, "conv": _conv, "conv4": _conv4}


def make_network(
    name: str, image_shape: tuple[int, ...], num_classes: int, *, filters: int = 64
) -> Network:
    """Builds a classifier by name.

    Args:
      name: "linear"; "mlp", one hidden layer of 16 rectified units; "conv", two 3x3 convolutions
        of 8 and 16 channels, each followed by 2x2 max pooling; or "conv4", see `make_conv4`.
      image_shape: (height, width, channels), or (features,) for "linear" and "mlp".
      num_classes: number of logits.
      filters: of "conv4".

    Raises: ValueError for an unknown name, or a shape that the network does not take.
    """
    check_option("make_network", "name", name, NETWORKS)
    if name == "conv4":
        return make_conv4(image_shape, num_classes, filters=filters)
    if name == "conv" and len(image_shape) != 3:
        raise ValueError(
            f"make_network: expected images (height, width, channels) for 'conv', got {image_shape}; "
            "use 'linear' or 'mlp' for features."
        )
    return _with_head(
        NETWORKS[name], jnp.zeros if name == "linear" else _WIDE, image_shape, num_classes
    )


def make_conv4(image_shape: tuple[int, ...], num_classes: int, *, filters: int = 64) -> Network:
    """The network of few-shot learning: four blocks and a linear head (Vinyals et al., 2016, 4.1.1).

    A block is a 3x3 convolution, a normalisation, a rectifier and 2x2 max pooling; 28 x 28 images leave
    `filters` features. The papers normalise by the statistics of the batch, which are no weights: an
    image is then classified differently in other company, and `apply` would not be a function of one
    image. Here an image is normalised by its own mean and variance over positions and channels, with a
    scale and an offset per channel (group normalisation with one group, Wu and He, 2018).

    Args:
      image_shape: (height, width, channels), of 16 pixels a side at least.
      num_classes: number of logits.
      filters: channels of every block, 64 in the papers.

    Raises: ValueError for smaller images, or `filters` < 1.
    """
    _check_conv4(image_shape, filters)
    return _with_head(functools.partial(_conv4, filters=filters), _WIDE, image_shape, num_classes)


def make_conv4_body(image_shape: tuple[int, ...], *, filters: int = 64) -> hk.Transformed:
    """The blocks of `make_conv4` alone, with the same weights.

    Returns: `init(key, images)` and `apply(params, images [N, *image_shape]) -> [N, features]`.

    Raises: ValueError as `make_conv4`.
    """
    _check_conv4(image_shape, filters)
    return hk.without_apply_rng(hk.transform(functools.partial(_conv4, filters=filters)))


def _check_conv4(image_shape: tuple[int, ...], filters: int) -> None:
    least = 2**_BLOCKS
    if len(image_shape) != 3 or min(image_shape[:2]) < least:
        raise ValueError(
            f"make_conv4: expected images (height, width, channels) of {least} pixels a side at least, "
            f"got {image_shape}; resize them, or use 'conv', or 'linear' for features."
        )
    if filters < 1:
        raise ValueError(f"make_conv4: filters must be at least 1, got {filters}.")


def make_classifier(
    name: str, image_shape: tuple[int, ...], num_classes: int, **options: Any
) -> Network:
    """Builds a classifier of the kinds that optimizers are compared on.

    "cnn": for each of `widths=(32, 64, 128)` two rectified 3x3 convolutions, the second of stride 2,
    then the mean over positions (Springenberg et al., 2015). "vit": a vision transformer (Dosovitskiy
    et al., 2021) of pre-normalised blocks, with learned positions and the mean over tokens, of
    `patch_size=4`, `depth=9`, `width=192` and `num_heads=12`: about 4 million weights, for a GPU.

    Args:
      name: "cnn" or "vit".
      image_shape: (height, width, channels).
      num_classes: number of logits.
      **options: as above.

    Raises: ValueError for an unknown name, a `patch_size` that does not divide height and width, or a
      `num_heads` that does not divide `width`.
    """
    check_option("make_classifier", "name", name, CLASSIFIERS)
    for option in options:
        check_option("make_classifier", f"an option of {name!r}", option, _OPTIONS[name])
    body = functools.partial(CLASSIFIERS[name], **options)
    return _with_head(body, _SMALL, image_shape, num_classes)


def _with_head(
    body: Callable[[jax.Array], jax.Array],
    head_init: Callable,
    image_shape: tuple[int, ...],
    num_classes: int,
) -> Network:
    """Features of images, and a linear layer for the labels."""

    def forward(images):
        return hk.Linear(num_classes, w_init=head_init, name=HEAD)(body(images))

    transformed = hk.without_apply_rng(hk.transform(forward))

    def init(key):
        return transformed.init(key, jnp.zeros((1, *image_shape)))

    shapes = jax.eval_shape(init, jax.random.key(0))
    class_axes = hk.data_structures.map(
        lambda module, _, leaf: leaf.ndim - 1 if module == HEAD else -1, shapes
    )
    return Network(init, transformed.apply, class_axes)


def _cnn(images: jax.Array, *, widths: Sequence[int] = (32, 64, 128)) -> jax.Array:
    """`[N, height, width, channels]` -> `[N, widths[-1]]`."""
    if not widths:
        raise ValueError("cnn: widths must hold at least one number of channels, got none.")
    x = images
    for width in widths:
        x = jax.nn.relu(conv_2d(x, width, 3))
        x = jax.nn.relu(conv_2d(x, width, 3, stride=2))
    return jnp.mean(x, axis=(1, 2))


def _vit(
    images: jax.Array,
    *,
    patch_size: int = 4,
    depth: int = 9,
    width: int = 192,
    num_heads: int = 12,
) -> jax.Array:
    """`[N, height, width, channels]` -> `[N, width]`."""
    if min(patch_size, depth, width, num_heads) < 1:
        raise ValueError(
            "vit: patch_size, depth, width and num_heads must be at least 1, got "
            f"{patch_size}, {depth}, {width}, {num_heads}."
        )
    if width % num_heads:
        raise ValueError(f"vit: num_heads must divide width={width}, got {num_heads}.")
    w_init = hk.initializers.VarianceScaling(2.0 / depth)  # the blocks' outputs add up
    x = hk.Linear(width, name="patches")(_patches(images, patch_size))
    x += hk.get_parameter("positions", x.shape[1:], init=_SMALL)[None]
    for _ in range(depth):
        attend = hk.MultiHeadAttention(num_heads, width // num_heads, w_init=w_init)
        y = _layer_norm(x)
        x += attend(y, y, y)
        y = jax.nn.gelu(hk.Linear(4 * width, w_init=w_init)(_layer_norm(x)))
        x += hk.Linear(width, w_init=w_init)(y)
    return jnp.mean(_layer_norm(x), axis=1)


def _patches(images: jax.Array, size: int) -> jax.Array:
    """Cuts `[N, height, width, channels]` into `[N, num_patches, size * size * channels]`."""
    count, height, width, channels = images.shape
    if height % size or width % size:
        raise ValueError(f"vit: patch_size must divide images of {height} x {width}, got {size}.")
    x = images.reshape(count, height // size, size, width // size, size, channels)
    return x.swapaxes(2, 3).reshape(count, -1, size * size * channels)


def _layer_norm(x: jax.Array) -> jax.Array:
    return hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(x)


CLASSIFIERS = {"cnn": _cnn, "vit": _vit}
_OPTIONS = {"cnn": ("widths",), "vit": ("patch_size", "depth", "width", "num_heads")}

LANE_CHANNELS = (24, 36, 48, 64, 64)


def make_lane_cnn(channels: Sequence[int] = LANE_CHANNELS) -> hk.Transformed:
    """The convolutions of lane keeping (HUB, table 6): camera frames to 50 features.

    Three 5x5 convolutions of stride 2, two 3x3 ones, dense layers of 100 and 50, each with a bias:
    251,698 weights for frames of 66 x 200, as in the table, without what follows the features. The
    table names no activation, here exponential linear units; its two dropouts, before the last
    convolution and the first dense layer, are left out. Frames under 61 pixels high or wide leave
    nothing after five convolutions without padding; these are padded instead.

    Args:
      channels: of the five convolutions; fewer for speed.

    Returns: `init(key, frames)` and `apply(params, frames [N, height, width, 3]) -> [N, 50]`.
    """

    def forward(frames):
        padding = "VALID" if min(frames.shape[1:3]) >= 61 else "SAME"
        layers = zip(channels, (5, 5, 5, 3, 3), (2, 2, 2, 1, 1), strict=True)
        x = frames
        for width, kernel, stride in layers:
            x = jax.nn.elu(conv_2d(x, width, kernel, stride=stride, padding=padding))
        x = hk.Flatten()(x)
        for width in (100, 50):
            x = jax.nn.elu(hk.Linear(width, w_init=_RECTIFIED)(x))
        return x

    return hk.without_apply_rng(hk.transform(forward))


def make_lstm(units: int) -> hk.Transformed:
    """An LSTM and a linear read-out: `apply(params, inputs [T, D]) -> [T]`, from a state of zeros."""

    def forward(inputs):
        core = hk.LSTM(units)
        hidden, _ = hk.dynamic_unroll(core, inputs, core.initial_state(None))
        return hk.Linear(1, name="readout")(hidden)[:, 0]

    return hk.without_apply_rng(hk.transform(forward))


def conv_2d(
    x: jax.Array,
    width: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: str = "SAME",
    name: str = "conv",
) -> jax.Array:
    """A 2-D convolution with a bias, `[N, height, width, channels]` in and out.

    On a CPU it is one product of matrices: XLA's own convolution is much slower there as soon as it
    stands in a `lax.scan`, where whole trainings run.
    """
    conv = functools.partial(_convolve, stride=stride, padding=padding)
    by_product = functools.partial(_convolve_by_product, stride=stride, padding=padding)

    @hk.to_module
    def module(x):
        shape = (kernel, kernel, x.shape[-1], width)
        w = hk.get_parameter("w", shape, x.dtype, _RECTIFIED)
        b = hk.get_parameter("b", (width,), x.dtype, jnp.zeros)
        return jax.lax.platform_dependent(x, w, cpu=by_product, default=conv) + b[None, None, None]

    return module(name)(x)


def _convolve(x: jax.Array, w: jax.Array, *, stride: int, padding: str) -> jax.Array:
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), padding, dimension_numbers=dimensions
    )


def _convolve_by_product(x: jax.Array, w: jax.Array, *, stride: int, padding: str) -> jax.Array:
    """The same as `_convolve`, from the pixels under the kernel laid side by side."""
    size = w.shape[0]
    pads = jax.lax.padtype_to_pads(x.shape[1:3], (size, size), (stride, stride), padding)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    for axis in (2, 1):
        last = x.shape[axis] - size
        shifted = [jax.lax.slice_in_dim(x, i, last + i + 1, stride, axis=axis) for i in range(size)]
        x = jnp.concatenate(shifted, axis=-1)
    return x @ w.reshape(-1, w.shape[-1])
