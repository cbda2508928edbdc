import errno

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.data import cached_features
from lohp_jax.data.features import digest

PARAMS = {"w": np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)}
IMAGES = np.random.default_rng(1).uniform(size=(4, 70, 2, 3, 2)).astype(np.float32)


def apply(params, images):
    return jnp.tanh(images.reshape(len(images), -1) @ params["w"])


def never(params, images):
    raise AssertionError("computed again")


def test_features_are_those_of_each_image_kept_or_not(tmp_path):
    expected = np.tanh(np.float64(IMAGES).reshape(4, 70, 12) @ np.float64(PARAMS["w"]))
    for directory in (None, tmp_path):
        features = cached_features(apply, PARAMS, IMAGES, directory)
        assert features.shape == (4, 70, 3) and features.dtype == np.float32
        np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-6)
    assert len(list(tmp_path.iterdir())) == 1


def test_they_are_computed_once(tmp_path):
    first = cached_features(apply, PARAMS, IMAGES, tmp_path / "new")
    again = cached_features(never, PARAMS, IMAGES.copy(), tmp_path / "new")
    np.testing.assert_array_equal(first, again)
    with pytest.raises(AssertionError, match="computed again"):
        cached_features(never, PARAMS, IMAGES + 1, tmp_path / "new")


def test_bytes_are_divided_by_255():
    pixels = np.rint(255 * IMAGES).astype(np.uint8)
    expected = cached_features(apply, PARAMS, pixels / np.float32(255))
    np.testing.assert_allclose(cached_features(apply, PARAMS, pixels), expected, atol=1e-6)


def test_a_cache_of_another_backbone_is_refused_with_what_to_do(tmp_path):
    kept = cached_features(apply, PARAMS, IMAGES, tmp_path)
    (file,) = tmp_path.iterdir()
    other = {"w": PARAMS["w"] + 1}
    with pytest.raises(
        ValueError, match=r"holds features of another backbone.*Nothing was"
    ) as error:
        cached_features(apply, other, IMAGES, tmp_path)
    assert f"`rm {file}`" in str(error.value)
    np.testing.assert_array_equal(cached_features(never, PARAMS, IMAGES, tmp_path), kept)
    file.unlink()
    assert not np.array_equal(cached_features(apply, other, IMAGES, tmp_path), kept)


@pytest.mark.parametrize("damage", ["cut", "text", "other"])
def test_a_damaged_cache_is_refused(tmp_path, damage):
    cached_features(apply, PARAMS, IMAGES, tmp_path)
    (file,) = tmp_path.iterdir()
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "text":
        file.write_text("features")
    else:
        np.savez(file, features=np.zeros(3))
    with pytest.raises(ValueError, match=rf"{file.name} is damaged"):
        cached_features(apply, PARAMS, IMAGES, tmp_path)


def test_no_half_file_is_left_behind(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        cached_features(apply, PARAMS, IMAGES, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_digest_tells_values_shapes_types_and_paths_apart():
    array = np.arange(6, dtype=np.float32)
    trees = [
        {"a": array},
        {"b": array},
        {"a": array.reshape(2, 3)},
        {"a": array.view(np.int32)},
        {"a": array + 1},
        {"a": array[:3], "b": array[3:]},
    ]
    assert len({digest(tree) for tree in trees}) == len(trees)
    assert digest(trees[0]) == digest({"a": jax.device_put(array)})
