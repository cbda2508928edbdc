"""Volumes: cubes of 16-bit intensities, drawn from a key or read from a file."""

import os
import pathlib
import zipfile
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_MAX = 65535
_NIFTI = (".nii", ".nii.gz")


def synthetic_volume(key: jax.Array, size: int = 64) -> jax.Array:
    """Draws a volume with structure at several scales.

    The sum of a gradient, three blurred ellipsoids and two thin shells at random places, and a fine
    wave inside the first ellipsoid; scaled to fill the range.

    Args:
      key: randomness.
      size: voxels along each axis, at least 2.

    Returns: `[size, size, size]` uint16, from 0 to 65535.

    Raises: ValueError for a smaller size.
    """
    if size < 2:
        raise ValueError(f"synthetic_volume: size must be at least 2, got {size}.")
    slope_key, shape_key, wave_key = jax.random.split(key, 3)
    axis = jnp.linspace(-1.0, 1.0, size, dtype=jnp.float32)
    grid = jnp.stack(jnp.meshgrid(axis, axis, axis, indexing="ij"))

    def plane(direction):
        return jnp.tensordot(direction, grid, 1)

    def inside(radius):
        return jax.nn.sigmoid(20.0 * (1.0 - radius))

    centre, half_axes = jax.random.uniform(shape_key, (2, 5, 3, 1, 1, 1))
    offset = (grid[None] + 0.5 - centre) / (0.2 + 0.4 * half_axes)
    radius = jnp.sqrt(jnp.sum(offset**2, axis=1))  # of five ellipsoids, 1 on their surface
    blobs, shells = radius[:3], radius[3:]
    wave = jnp.sin(plane(jax.random.uniform(wave_key, (3,), minval=8.0, maxval=16.0)))
    volume = (
        0.2 * plane(jax.random.normal(slope_key, (3,)))
        + jnp.sum(inside(blobs), axis=0)
        + 0.5 * jnp.sum(jnp.exp(-200.0 * (shells - 1.0) ** 2), axis=0)
        + 0.2 * inside(blobs[0]) * wave
    )
    low, high = jnp.min(volume), jnp.max(volume)
    return jnp.round((volume - low) / (high - low) * _MAX).astype(jnp.uint16)


def read_volume(path: str | os.PathLike, size: int = 64) -> np.ndarray:
    """Reads a volume from a file and resamples it, see `resample_volume`.

    Args:
      path: `.npy`, `.npz` with one array, or NIfTI (`.nii`, `.nii.gz`), which needs nibabel.
      size: voxels along each axis.

    Returns: `[size, size, size]` uint16.

    Raises: FileNotFoundError; ImportError without nibabel; ValueError for another kind of file or an
      array that is not a volume.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"read_volume: no file {path}; give the path of a .npy, .npz or NIfTI volume, or use "
            "`synthetic_volume`, which needs none."
        )
    try:
        volume = _load(path)
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"read_volume: {path} cannot be read as what its name says; replace it ({error})."
        ) from error
    return resample_volume(volume, size)


def resample_volume(volume: np.ndarray, size: int = 64) -> np.ndarray:
    """Cuts the largest cube from the middle of a volume and resamples it linearly.

    Args:
      volume: `[X, Y, Z]`. uint16 keeps its scale, uint8 fills 16 bits (times 257); other integers and
        floats are scaled from their own smallest and largest value.
      size: voxels along each axis, at least 2.

    Returns: `[size, size, size]` uint16.

    Raises: ValueError, if `volume` is not a volume or is constant, or not finite.
    """
    from scipy import ndimage  # here, for a light `import lohp_jax`

    volume = np.asarray(volume)
    volume = volume.astype(volume.dtype.newbyteorder("="), copy=False)
    check_volume("resample_volume", volume)
    if size < 2:
        raise ValueError(f"resample_volume: size must be at least 2, got {size}.")
    if volume.dtype in (np.uint8, np.uint16):
        high = np.iinfo(volume.dtype).max
    else:
        volume = _from_zero(volume)
        high = volume.max()
    side = min(volume.shape)
    starts = [(n - side) // 2 for n in volume.shape]
    cube = volume[tuple(slice(start, start + side) for start in starts)].astype(np.float64)
    cube = ndimage.zoom(cube / float(high), size / side, order=1)
    return np.rint(cube * _MAX).astype(np.uint16)


def _from_zero(volume: np.ndarray) -> np.ndarray:
    """Less its smallest value, with nothing beyond the range of its type on the way.

    Differences of integers are exact in uint64, which wraps as they do; floats are halved first.
    """
    if volume.dtype.kind in "ui":
        return volume.astype(np.uint64) - volume.min().astype(np.uint64)
    volume = volume.astype(np.promote_types(volume.dtype, np.float64))
    volume = volume / np.abs(volume).max() / 2
    return volume - volume.min()


def check_volume(caller: str, volume: np.ndarray) -> None:
    """Raises ValueError in the name of `caller`, unless `volume` is one that can be compressed."""
    if volume.ndim != 3 or min(volume.shape) < 2:
        raise ValueError(
            f"{caller}: expected an array of three axes with at least 2 voxels each, got shape "
            f"{volume.shape}; pick one volume of a series, e.g. with [..., 0]."
        )
    if volume.dtype.kind not in "uif":
        raise ValueError(
            f"{caller}: expected integers or floats, got dtype {volume.dtype}; convert it, e.g. with "
            "np.abs if it is complex, or astype(np.float32)."
        )
    bad = int(np.sum(~np.isfinite(volume)))
    if bad:
        raise ValueError(
            f"{caller}: expected finite intensities, got {bad} that are not; replace them, e.g. with "
            "np.nan_to_num."
        )
    if volume.min() == volume.max():
        raise ValueError(
            f"{caller}: expected a volume that varies, got {volume.flat[0]} everywhere; check the file."
        )


def _load(path: pathlib.Path) -> np.ndarray:
    if path.name.endswith(_NIFTI):
        return _load_nifti(path)
    if path.suffix == ".npy":
        return _load_numpy(path)
    if path.suffix == ".npz":
        with _load_numpy(path) as arrays:
            if len(arrays.files) != 1:
                raise ValueError(
                    f"read_volume: expected one array in {path}, got {sorted(arrays.files)}; save the "
                    "one you mean with np.save."
                )
            return arrays[arrays.files[0]]
    raise ValueError(
        f"read_volume: expected a .npy, .npz, .nii or .nii.gz file, got {path.name!r}; convert it with "
        "np.save."
    )


def _load_numpy(path: pathlib.Path) -> Any:
    try:
        return np.load(path)
    except ValueError as error:  # no format of NumPy's, or one that would have to be unpickled
        raise OSError(f"not an array of numbers: {error}") from error


def _load_nifti(path: pathlib.Path) -> np.ndarray:
    try:
        import nibabel
        from nibabel.filebasedimages import ImageFileError
        from nibabel.spatialimages import HeaderDataError
    except ImportError as error:
        raise ImportError(
            f"read_volume: reading {path.name} needs nibabel; `pip install nibabel`, or save the array "
            "with np.save and pass the .npy file."
        ) from error
    try:
        return np.asanyarray(nibabel.load(path).dataobj)
    except (ImageFileError, HeaderDataError) as error:
        raise OSError(f"not a NIfTI volume: {error}") from error
