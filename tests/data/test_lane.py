import csv
import functools
import pathlib
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lohp_jax.data import lane
from lohp_jax.data.lane import read_drive, render_drive, steering_angle

CAR = pathlib.Path(__file__).parents[2].parent / "shared" / "data" / "deeppicar"
RENDER = functools.partial(render_drive, num_frames=5, size=(12, 20))
ANGLES = (80.0, 90.5, 101.0)


def write_drive(folder, *, rows=None, header=("frame", "steering_angle_deg"), names=None):
    """Three frames of 8 x 10, dark above and of red 50 * i below, and the CSV of their angles."""
    names = names or [f"f{i}.png" for i in (2, 10, 11)]
    frames = folder / "frames"
    frames.mkdir()
    for i, name in enumerate(names):
        pixels = np.zeros((8, 10, 3), np.uint8)
        pixels[4:, :, 0] = 50 * i
        Image.fromarray(pixels).save(frames / name)
    rows = list(enumerate(ANGLES)) if rows is None else rows
    with (folder / "angles.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return frames, folder / "angles.csv"


@pytest.mark.parametrize(
    "rows",
    [
        [(0, 80), (1, 90.5), (2, 101)],
        [("f11.png", 101), ("f2.png", 80), ("f10.png", 90.5)],
        [("002", " 101"), ("000", "80"), ("001", "90.5")],
    ],
    ids=["places", "names", "padded"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_a_drive_is_in_the_order_of_time(tmp_path, rows, packed):
    frames, angles = write_drive(tmp_path, rows=rows)
    if packed:
        with zipfile.ZipFile(tmp_path / "frames.zip", "w") as archive:
            for file in frames.iterdir():
                archive.write(file, file.name)
        frames = tmp_path / "frames.zip"
    drive = read_drive(frames, angles, size=(2, 5))
    assert drive.frames.shape == (3, 2, 5, 3) and drive.frames.dtype == np.uint8
    assert drive.angles.dtype == np.float32
    np.testing.assert_array_equal(drive.angles, np.float32(ANGLES))
    red = np.arange(3)[:, None, None] * 50
    np.testing.assert_array_equal(drive.frames[..., 0], np.broadcast_to(red, (3, 2, 5)))


def test_crop_keeps_the_rows_asked_for(tmp_path):
    drive = read_drive(*write_drive(tmp_path), size=(4, 10), crop=(0.0, 0.5))
    assert not drive.frames.any()


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"header": ("frame", "angle")},
            r"'steering_angle_deg' in angles\.csv, got \['frame', 'ang",
        ),
        ({"rows": [(0, 1), (1, 2)]}, r"each of 3 frames, got 2 rows .* without is f11\.png"),
        ({"rows": [(0, 1), (1, 2), (2, 3), (3, 4)]}, "from 0 to 2, .* got '3' in line 5"),
        ({"rows": [(0, 1), (1, 2), (1, 3)]}, "each once, .* got '1' in line 4"),
        ({"rows": [(0, 1), ("x.png", 2)]}, r"got 'x\.png' in line 3"),
        (
            {"rows": [(0, 1), (1, "nan")]},
            r"finite angle in degrees, got 'nan' \(angles\.csv, line 3",
        ),
        ({"rows": [(0, 1), (1, "left")]}, "got 'left'"),
        ({"rows": [(0, 1), (1,)]}, "finite angle in degrees, got None"),
    ],
)
def test_wrong_tables(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        read_drive(*write_drive(tmp_path, **options))


def test_missing_and_unreadable_files(tmp_path):
    frames, angles = write_drive(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"a CSV file of angles at .*nowhere\.csv"):
        read_drive(frames, tmp_path / "nowhere.csv")
    with pytest.raises(
        FileNotFoundError, match=r"a folder or a zip archive of images at .*nowhere"
    ):
        read_drive(tmp_path / "nowhere", angles)
    (frames / "f10.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"f10\.png cannot be read"):
        read_drive(frames, angles)


@pytest.mark.parametrize("options", [{"crop": (0.5, 0.5)}, {"crop": (0, 2)}, {"size": (0, 5)}])
def test_wrong_sizes(tmp_path, options):
    with pytest.raises(ValueError, match="positive size, and crop"):
        read_drive(*write_drive(tmp_path), **options)


def test_a_crop_without_rows(tmp_path):
    with pytest.raises(ValueError, match=r"crop \(0\.5, 0\.5001\) leaves no row of frames"):
        read_drive(*write_drive(tmp_path), crop=(0.5, 0.5001))


def test_a_table_in_another_encoding(tmp_path):
    frames, angles = write_drive(tmp_path)
    angles.write_bytes("frame,Lenkwinkel\xe4\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"expected angles\.csv in UTF-8"):
        read_drive(frames, angles)


@pytest.mark.skipif(not CAR.exists(), reason="needs the frames of DeepPiCar")
def test_deeppicar():
    files = CAR / "video01_frames.zip", CAR / "video01_steering.csv"
    drive = read_drive(*files, size=(6, 20))
    assert drive.frames.shape == (219, 6, 20, 3)
    with zipfile.ZipFile(files[0]) as archive:  # names like video01_000_085.jpg hold the angle
        in_names = [int(name[-7:-4]) for name in sorted(archive.namelist())]
    np.testing.assert_array_equal(drive.angles, in_names)


def test_a_rendered_drive_depends_on_its_key_alone():
    first, again, other = (jax.jit(RENDER)(jax.random.key(seed)) for seed in (0, 0, 1))
    assert first.frames.shape == (5, 12, 20, 3) and first.frames.dtype == jnp.uint8
    assert first.angles.shape == (5,) and first.angles.dtype == jnp.float32
    np.testing.assert_array_equal(first.frames, again.frames)
    assert (first.frames != other.frames).mean() > 0.1
    assert not np.isclose(first.angles, other.angles).any()


def test_vmap_over_roads_equals_a_loop():
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.jit(jax.vmap(RENDER))(keys)
    for i, key in enumerate(keys):
        alone = jax.jit(RENDER)(key)
        np.testing.assert_allclose(together.angles[i], alone.angles, rtol=1e-5)
        np.testing.assert_allclose(
            np.int32(together.frames[i]), np.int32(alone.frames), atol=1
        )  # rounding of half a grey


def test_the_angle_is_pure_pursuit():
    rng = np.random.default_rng(0)
    curvature, offset = rng.normal(size=(2, 50)) * [[0.1], [0.2]]
    x = curvature * 3.0**2 / 2 - offset
    to_target = np.arctan2(x, 3.0)  # the bearing alpha of the target, at distance sqrt(x^2 + l^2)
    expected = 90 + np.degrees(np.arctan(2 * 1.5 * np.sin(to_target) / np.hypot(x, 3.0)))
    actual = steering_angle(jnp.float32(curvature), jnp.float32(offset))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert steering_angle(jnp.float32(0.1), jnp.float32(0.0)) > lane.STRAIGHT  # to the right


def test_the_smooth_process_has_its_kernel():
    def start(key):
        return lane._smooth_process(key, 13, time_scale=6.0)[jnp.array([0, 6, 12])]

    x = np.float64(jax.vmap(start)(jax.random.split(jax.random.key(0), 4000)))
    lag = np.array([0.0, 6.0, 12.0])
    np.testing.assert_allclose(
        x.T @ x / len(x), np.exp(-(((lag[:, None] - lag) / 6.0) ** 2) / 2), atol=0.08
    )


@pytest.mark.parametrize("curvature, offset", [(0.0, 0.0), (0.15, 0.0), (-0.1, 0.3)])
def test_the_right_mark_is_where_a_pinhole_camera_sees_it(curvature, offset):
    height, width = 60, 200
    image = np.array(
        lane._render(jnp.float32(curvature), jnp.float32(offset), jnp.float32(0.0), (height, width))
    )
    seen = 0
    for row in range(height):
        below = (row + 0.5) / height - 0.2
        if (
            below < 0.25
        ):  # at or above the horizon, or so far that the mark is narrower than a pixel
            continue
        depth = 0.8 / below
        mark = curvature * depth**2 / 2 - offset + 0.6
        column = width * (0.5 + mark / (2.4 * depth)) - 0.5
        if 0 <= column < width - 1:
            seen += 1
            assert image[row, round(column)].min() > 0.7, (row, column)
    assert seen > 20
    np.testing.assert_allclose(image[0], np.broadcast_to(lane._SKY, (width, 3)), rtol=1e-6)
