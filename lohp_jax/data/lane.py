"""Drives: the frames of a camera behind a windscreen and the steering angle at each."""

import csv
import math
import os
import pathlib
import posixpath
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.data.folders import list_images, read_images

STRAIGHT = 90.0
"""The angle in degrees at which a car goes straight; less is to the left, as in DeepPiCar."""


class Drive(NamedTuple):
    """One drive in the order of time.

    Attributes:
      frames: `[N, height, width, 3]` uint8.
      angles: `[N]` float32, the steering angle at each frame, in degrees.
    """

    frames: np.ndarray | jax.Array
    angles: np.ndarray | jax.Array


def read_drive(
    frames: str | os.PathLike,
    angles: str | os.PathLike,
    *,
    size: tuple[int, int] = (66, 200),
    crop: tuple[float, float] = (0.5, 1.0),
    frame_column: str = "frame",
    angle_column: str = "steering_angle_deg",
) -> Drive:
    """Reads a drive from the user's files.

    Layout: a folder or zip archive with one JPEG or PNG file per frame, whose names in natural order
    (`f2.jpg` before `f10.jpg`) are the order of time; and a CSV file with a header and one row per
    frame, in any order. `frame_column` holds the name of the frame's file, or its place in time,
    from 0; `angle_column` its angle in degrees. Other columns are ignored.

    Args:
      frames: the folder or zip archive.
      angles: the CSV file.
      size: (height, width) to which frames are resized, after `crop`.
      crop: the rows to keep, as fractions of the height from above; by default the lower half.
      frame_column: name of the column that says which frame.
      angle_column: name of the column of angles.

    Raises:
      FileNotFoundError: there is no such folder, archive or CSV file.
      ValueError: a column is missing; a row names no frame, or one that another row names; there are
        more frames than rows; an angle is no finite number; a frame cannot be read; or `crop` or
        `size` is empty.
    """
    low, high = crop
    if not (0 <= low < high <= 1 and min(size) > 0):
        raise ValueError(
            "read_drive: expected a positive size, and crop (low, high) with 0 <= low < high <= 1; "
            f"got {size} and {crop}."
        )
    names = list_images(frames)
    in_order = _read_angles(angles, names, frame_column, angle_column)

    def prepare(image):
        from PIL import Image

        top, bottom = round(low * image.height), round(high * image.height)
        if top == bottom:
            raise ValueError(
                f"read_drive: crop {crop} leaves no row of frames {image.height} pixels high."
            )
        box = (0, top, image.width, bottom)
        return image.crop(box).resize(size[::-1], Image.Resampling.BILINEAR)

    return Drive(read_images(frames, names, prepare), in_order)


def render_drive(
    key: jax.Array, *, num_frames: int = 256, size: tuple[int, int] = (66, 200)
) -> Drive:
    """A drive along a synthetic road; pure JAX, for `jit` and `vmap`.

    The curvature of the lane, the car's offset from its middle and the light are independent smooth
    Gaussian processes of time. The lane's middle lies at x(z) = curvature z^2 / 2 - offset metres to
    the right, z metres ahead. A pinhole camera sees a flat world: sky, verge, road, a solid mark on
    the right and a dashed one on the left, with noise. The angle is that of pure pursuit (Coulter,
    1992) towards the lane's middle at the look-ahead distance, so that both matter.

    Args:
      key: the road.
      num_frames: N.
      size: (height, width) of the frames.
    """
    curve_key, offset_key, light_key, noise_key = jax.random.split(key, 4)
    curvature = _CURVATURE * _smooth_process(curve_key, num_frames, time_scale=20.0)
    offset = _OFFSET * _smooth_process(offset_key, num_frames, time_scale=12.0)
    light = jnp.exp(0.15 * _smooth_process(light_key, num_frames, time_scale=30.0))
    distance = _SPEED * jnp.arange(num_frames)
    frames = jax.vmap(lambda *state: _render(*state, size))(curvature, offset, distance)
    noise = 0.03 * jax.random.normal(noise_key, frames.shape)
    frames = jnp.clip(frames * light[:, None, None, None] + noise, 0.0, 1.0)
    return Drive(jnp.round(255 * frames).astype(jnp.uint8), steering_angle(curvature, offset))


def steering_angle(curvature: jax.Array, offset: jax.Array) -> jax.Array:
    """Pure pursuit of the middle of a lane: atan(2 L x / (x^2 + l^2)) at look-ahead l, wheelbase L.

    Args:
      curvature: of the lane, in 1/m, to the right.
      offset: of the car from the middle of the lane, in m, to the right.

    Returns: the angle in degrees, `STRAIGHT` for straight on.
    """
    x = curvature * _LOOK_AHEAD**2 / 2 - offset
    return STRAIGHT + jnp.rad2deg(jnp.arctan(2 * _WHEELBASE * x / (x**2 + _LOOK_AHEAD**2)))


_CURVATURE, _OFFSET = 0.1, 0.2  # standard deviations, in 1/m and m
_LOOK_AHEAD, _WHEELBASE, _SPEED = 3.0, 1.5, 0.25  # in m, m and m per frame
_HORIZON = 0.2  # its height in the frame, as a fraction from above
_NEAR, _VIEW = 1.0, 2.4  # distance and width, in m, of what the lowest row shows
_HALF_LANE, _HALF_ROAD, _HALF_MARK = 0.6, 0.8, 0.04  # in m
_SKY, _VERGE, _ROAD, _MARK = (0.6, 0.7, 0.85), (0.3, 0.45, 0.2), (0.35, 0.35, 0.37), (0.9, 0.9, 0.8)


def _smooth_process(key: jax.Array, num_frames: int, *, time_scale: float) -> jax.Array:
    """A Gaussian process of unit variance, kernel exp(-(t/time_scale)^2/2), by random features.

    Random Fourier features (Rahimi and Recht, 2007): sqrt(2/K) sum_k cos(w_k t + b_k).
    """
    rate_key, phase_key = jax.random.split(key)
    rate = jax.random.normal(rate_key, (_NUM_FEATURES, 1)) / time_scale
    phase = jax.random.uniform(phase_key, (_NUM_FEATURES, 1), maxval=2 * math.pi)
    time = jnp.arange(num_frames, dtype=jnp.float32)[None]
    return math.sqrt(2 / _NUM_FEATURES) * jnp.sum(jnp.cos(rate * time + phase), axis=0)


_NUM_FEATURES = 64


def _render(
    curvature: jax.Array, offset: jax.Array, distance: jax.Array, size: tuple[int, int]
) -> jax.Array:
    """One frame without noise, `[height, width, 3]` in [0, 1]."""
    height, width = size
    row = ((jnp.arange(height) + 0.5) / height)[:, None]
    column = ((jnp.arange(width) + 0.5) / width)[None, :]
    depth = _NEAR * (1 - _HORIZON) / jnp.maximum(row - _HORIZON, 0.5 / height)
    view = _VIEW * depth / _NEAR  # width in m of what a row shows
    right = (column - 0.5) * view - (curvature * depth**2 / 2 - offset)  # of the lane's middle

    def painted(centre, half_width):
        """Share of a pixel within a strip along the lane."""
        inside = half_width - jnp.abs(right - centre)
        return jnp.clip(inside * width / view + 0.5, 0.0, 1.0)[..., None]

    dashes = (jnp.sin(math.pi * (depth + distance)) > 0)[..., None]
    image = jnp.broadcast_to(jnp.array(_VERGE), (height, width, 3))
    for share, colour in (
        (painted(0.0, _HALF_ROAD), _ROAD),
        (painted(_HALF_LANE, _HALF_MARK), _MARK),
        (painted(-_HALF_LANE, _HALF_MARK) * dashes, _MARK),
        ((row < _HORIZON)[..., None], _SKY),
    ):
        image = jnp.where(share, share * jnp.array(colour)[None, None] + (1 - share) * image, image)
    return image


def _read_angles(
    path: str | os.PathLike, names: list[str], frame_column: str, angle_column: str
) -> np.ndarray:
    """`[N]` float32, the angles in the order of `names`."""
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"read_drive: expected a CSV file of angles at {path}, found none.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns, rows = list(reader.fieldnames or ()), list(reader)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"read_drive: expected {path.name} in UTF-8; save it so ({error})."
        ) from error
    if not {frame_column, angle_column} <= set(columns):
        raise ValueError(
            f"read_drive: expected columns {frame_column!r} and {angle_column!r} in {path.name}, got "
            f"{columns}; name them with frame_column and angle_column."
        )
    places = {posixpath.basename(name): place for place, name in enumerate(names)}
    places |= {str(place): place for place in range(len(names))}
    angles: dict[int, float] = {}
    for line, row in enumerate(rows, 2):
        place = _place(row[frame_column], places)
        if place is None or place in angles:
            raise ValueError(
                f"read_drive: expected the file name of a frame, or a number from 0 to "
                f"{len(names) - 1}, and each once, in column {frame_column!r}; got "
                f"{row[frame_column]!r} in line {line} of {path.name}."
            )
        angles[place] = _angle(row[angle_column], f"{path.name}, line {line}")
    if missing := [name for place, name in enumerate(names) if place not in angles]:
        raise ValueError(
            f"read_drive: expected an angle for each of {len(names)} frames, got {len(angles)} rows "
            f"in {path.name}; the first frame without is {missing[0]}."
        )
    return np.array([angles[place] for place in range(len(names))], np.float32)


def _place(text: str | None, places: dict[str, int]) -> int | None:
    text = (text or "").strip()
    return places.get(str(int(text)) if text.isdecimal() else text)


def _angle(text: str | None, where: str) -> float:
    try:
        angle = float(text or "")
    except ValueError:
        angle = math.nan
    if not math.isfinite(angle):
        raise ValueError(
            f"read_drive: expected a finite angle in degrees, got {text!r} ({where}); take out the "
            "row and its frame."
        )
    return angle
