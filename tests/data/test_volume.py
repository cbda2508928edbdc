import builtins

import jax
import numpy as np
import pytest

from lohp_jax.data.volume import read_volume, resample_volume, synthetic_volume

KEY = jax.random.key(0)
RAMP = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
draw = jax.jit(synthetic_volume, static_argnums=1)


def test_synthetic_volumes_fill_the_range_and_differ_by_key():
    first, again, other = (np.asarray(draw(jax.random.key(seed), 16)) for seed in (0, 0, 1))
    assert first.shape == (16, 16, 16) and first.dtype == np.uint16
    assert (first.min(), first.max()) == (0, 65535)
    np.testing.assert_array_equal(first, again)
    assert np.mean(first != other) > 0.9


def test_synthetic_volumes_have_structure_at_several_scales():
    """Energy is left over at each halving of the resolution, and most of it at the coarsest."""
    volume = np.asarray(draw(KEY, 32), np.float64)
    energy, total = [], volume.var()
    while len(volume) > 4:
        half = len(volume) // 2
        coarse = volume.reshape(half, 2, half, 2, half, 2).mean((1, 3, 5))
        energy.append((volume.var() - coarse.var()) / total)
        volume = coarse
    assert all(share > 0.003 for share in energy) and sum(energy) < 0.5


@pytest.mark.parametrize("name", ["volume.npy", "volume.npz"])
def test_reads_arrays(name, tmp_path):
    volume = np.asarray(draw(KEY, 6))
    (np.save if name.endswith("npy") else np.savez)(tmp_path / name, volume)
    np.testing.assert_array_equal(read_volume(tmp_path / name, 6), volume)
    assert read_volume(str(tmp_path / name), 4).shape == (4, 4, 4)


@pytest.mark.parametrize(
    "values",
    [
        np.array([-1.0, -0.5, 0.0, 1.0]) * 1.7e308,
        np.array([-1.0, -0.5, 0.0, 1.0]) * 1e-310,
        np.array([-1.0, -0.5, 0.0, 1.0], np.longdouble) * np.longdouble("1e4000"),
        np.array([-(2**63), -(2**62), 0, 2**63 - 1]),
        2**62 + np.array([-200, -100, 0, 200]),  # no float64 tells their neighbours apart
        np.array([0, 2**62, 2**63, 2**64 - 1], np.uint64),
        np.array([-60000, -30000, 0, 60000], np.float16),
        np.array([-1.0, -0.5, 0.0, 1.0], ">f8") * 1e300,
    ],
    ids=lambda values: f"{values.dtype}-{values.flat[0]}",
)
def test_values_of_any_size_and_type_are_scaled(values):
    """A quarter and a half of the range lie where they did."""
    volume = np.tile(values.reshape(4, 1, 1), (1, 4, 4))
    scaled = resample_volume(volume, 4)
    np.testing.assert_allclose(scaled[:, 0, 0] / 65535, [0, 0.25, 0.5, 1], atol=1e-4)


@pytest.mark.parametrize("name", ["volume.nii", "volume.nii.gz"])
def test_reads_nifti(name, tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="nibabel is an option")
    volume = np.asarray(draw(KEY, 6))
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / name)
    np.testing.assert_array_equal(read_volume(tmp_path / name, 6), volume)


def test_a_ramp_stays_a_ramp():
    ramp = np.broadcast_to(np.linspace(0, 60000, 9)[:, None, None], (9, 9, 9))
    small = resample_volume(ramp.astype(np.uint16), 5)
    np.testing.assert_array_equal(small[:, 2, 3], np.linspace(0, 60000, 5))
    assert np.all(small == small[:, :1, :1])


def test_the_middle_cube_is_kept():
    np.testing.assert_array_equal(resample_volume(RAMP, 2), RAMP[:, :2, 1:3])


@pytest.mark.parametrize(
    "dtype, values, expected",
    [
        (np.uint16, [0, 1000], [0, 1000]),
        (np.dtype(">u2"), [0, 1000], [0, 1000]),
        (np.uint8, [10, 200], [2570, 51400]),
        (np.int16, [-100, 300], [0, 65535]),
        (np.float32, [0.25, 0.75], [0, 65535]),
    ],
)
def test_scales_by_type(dtype, values, expected):
    volume = np.tile(np.array(values, dtype), (2, 2, 1))
    scaled = resample_volume(volume, 2)
    assert scaled.dtype == np.uint16
    np.testing.assert_array_equal(scaled, np.tile(expected, (2, 2, 1)))


NAN = np.where(np.arange(8).reshape(2, 2, 2) == 3, np.nan, 1.0)


@pytest.mark.parametrize(
    "volume, message",
    [
        (np.zeros((2, 2)), r"expected an array of three axes .* got shape \(2, 2\)"),
        (np.zeros((2, 2, 2, 5)), r"got shape \(2, 2, 2, 5\); pick one .* \[..., 0\]"),
        (np.zeros((2, 1, 2)), r"at least 2 voxels each, got shape \(2, 1, 2\)"),
        (np.zeros((2, 2, 2), complex), "expected integers or floats, got dtype complex128"),
        (NAN, "expected finite intensities, got 1 that are not; .* np.nan_to_num"),
        (np.full((2, 2, 2), 7), "expected a volume that varies, got 7 everywhere"),
    ],
)
def test_resample_volume_rejects(volume, message):
    with pytest.raises(ValueError, match=f"resample_volume: .*{message}"):
        resample_volume(volume)


@pytest.mark.parametrize(
    "make", [lambda n: synthetic_volume(KEY, n), lambda n: resample_volume(RAMP, n)]
)
def test_rejects_a_small_size(make):
    with pytest.raises(ValueError, match="_volume: size must be at least 2, got 1"):
        make(1)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*brain\.npy; .* `synthetic_volume`"):
        read_volume(tmp_path / "brain.npy")


def test_another_kind_of_file_is_rejected(tmp_path):
    (tmp_path / "brain.png").touch()
    with pytest.raises(
        ValueError, match=r"expected a \.npy.* got 'brain\.png'; convert .* np\.save"
    ):
        read_volume(tmp_path / "brain.png")


@pytest.mark.parametrize("name", ["empty.npy", "truncated.npz"])
def test_a_corrupt_file_is_named(name, tmp_path):
    np.savez(tmp_path / "whole.npz", RAMP)
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / name).write_bytes(b"" if name == "empty.npy" else whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{name} cannot be read as what its name says"):
        read_volume(tmp_path / name)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".nii", ".nii.gz"])
@pytest.mark.parametrize(
    "content", [b"<!DOCTYPE html><html></html>" * 40, b"\x00" * 1000, b"\x80\x04."]
)
def test_what_is_no_volume_at_all_is_named(suffix, content, tmp_path):
    """A page that says "not found" in place of what was to be downloaded, zeros, a pickle."""
    if suffix.startswith(".nii"):
        pytest.importorskip("nibabel")
    (tmp_path / f"x{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x{suffix} cannot be read as what its name says"):
        read_volume(tmp_path / f"x{suffix}")


def test_an_archive_of_several_arrays_is_rejected(tmp_path):
    np.savez(tmp_path / "two.npz", a=RAMP, b=RAMP)
    with pytest.raises(ValueError, match=r"expected one array in .*two\.npz, got \['a', 'b'\]"):
        read_volume(tmp_path / "two.npz")


def test_without_nibabel_the_error_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "brain.nii.gz").touch()
    real_import = builtins.__import__

    def no_nibabel(name, *args, **kwargs):
        if name == "nibabel":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_nibabel)
    with pytest.raises(
        ImportError, match=r"needs nibabel; `pip install nibabel`, or save .* np\.save"
    ):
        read_volume(tmp_path / "brain.nii.gz")
