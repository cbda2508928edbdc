import itertools
import pathlib
import zipfile

import numpy as np
import pytest
from PIL import Image

from lohp_jax.data.folders import folder_images, list_images, read_images

PACS = pathlib.Path(__file__).parents[2].parent / "shared" / "data" / "pacs" / "pacs_64.zip"
DOMAINS, CLASSES, PER_CLASS = ("photo", "sketch"), ("cat", "dog", "elk"), 4


def write_image(path, value, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, 0)).save(path)


def zipped(folder):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder.parent))
    return path


@pytest.fixture
def tree(tmp_path):
    """`pictures/DOMAIN/CLASS/NAME`; the red of an image tells where it belongs."""
    places = itertools.product(enumerate(DOMAINS), enumerate(CLASSES), range(PER_CLASS))
    for (d, domain), (c, label), i in places:
        write_image(tmp_path / "pictures" / domain / label / f"{i}.png", 100 * d + 30 * c + 5 * i)
    (tmp_path / "pictures" / "notes.txt").write_text("no image")
    write_image(tmp_path / "pictures" / "photo" / "cat" / "._0.png", 255)
    return tmp_path / "pictures"


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("d, domain", list(enumerate(DOMAINS)))
def test_pools_hold_every_image_of_the_domain_once(tree, packed, d, domain):
    path = zipped(tree) if packed else tree
    images = folder_images(path, domain=domain, train_per_class=3, query_per_class=1)
    assert images.train.shape == (3, 3, 4, 6, 3) and images.query.shape == (3, 1, 4, 6, 3)
    assert images.train.dtype == np.float32 and images.name == f"pictures/{domain}"
    both = np.concatenate([images.train, images.query], axis=1)
    red = np.sort(np.rint(255 * both[:, :, 0, 0, 0]), axis=1)
    expected = 100 * d + 30 * np.arange(3)[:, None] + 5 * np.arange(PER_CLASS)[None]
    np.testing.assert_array_equal(red, expected)
    assert (both[..., 0] == both[..., :1, :1, 0]).all() and not both[..., 2].any()


def test_without_a_domain_all_are_taken(tree):
    images = folder_images(tree, train_per_class=7, query_per_class=1, image_size=2)
    assert images.train.shape == (3, 7, 2, 2, 3) and images.name == "pictures"


def test_natural_order_counts(tmp_path):
    for i in (10, 9, 100, 1):
        write_image(tmp_path / f"f{i}.png", i)
    assert list_images(tmp_path) == ["f1.png", "f9.png", "f10.png", "f100.png"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"domain": "paint"}, r"one of \['photo', 'sketch'\], got 'paint'"),
        ({"train_per_class": 0}, "expected positive train_per_class"),
        ({"image_size": -1}, "expected positive train_per_class"),
        ({"domain": "photo"}, "expected at least 80 images of every class, got 4"),
    ],
)
def test_bad_arguments(tree, options, message):
    with pytest.raises(ValueError, match=message):
        folder_images(tree, **options)


def test_one_class_is_too_few(tmp_path):
    write_image(tmp_path / "cat" / "0.png", 1)
    with pytest.raises(ValueError, match=r"a folder for each of two or more classes .*\['cat'\]"):
        folder_images(tmp_path)


def test_files_without_a_class(tmp_path):
    write_image(tmp_path / "0.png", 1)
    with pytest.raises(ValueError, match=r"expected files CLASS/NAME, got e\.g\. 0\.png"):
        folder_images(tmp_path)
    with pytest.raises(ValueError, match=r"expected files DOMAIN/CLASS/NAME, got"):
        folder_images(tmp_path, domain="photo")


def test_missing_and_empty_places(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"a folder or a zip archive of images at .* nothing"
    ):
        list_images(tmp_path / "absent")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(FileNotFoundError, match="found another kind of file"):
        list_images(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"expected \.jpg, \.jpeg, \.png files in .*, got none"):
        list_images(tmp_path)


def test_unreadable_and_unequal_images(tmp_path):
    write_image(tmp_path / "a.png", 1)
    write_image(tmp_path / "b.png", 2, size=(5, 4))
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "c.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"one size, .* from \(4, 5\) to \(4, 6\); resize"):
        read_images(tmp_path, ["a.png", "b.png"], lambda image: image)
    with pytest.raises(ValueError, match=r"c\.png cannot be read; replace it or take it out"):
        read_images(tmp_path, ["a.png", "c.png"], lambda image: image)


def test_sixteen_bits_keep_their_levels(tmp_path):
    levels = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    (pixels,) = read_images(tmp_path, ["deep.png"], lambda image: image)
    assert len(np.unique(pixels)) == 64
    np.testing.assert_allclose(pixels[..., 0], levels / 257, atol=0.5)
    assert (pixels == pixels[..., :1]).all()


def test_photographs_stand_upright(tmp_path):
    """A camera turned on its side writes so beside the pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    image.save(tmp_path / "turned.png", exif=exif)
    (pixels,) = read_images(tmp_path, ["turned.png"], lambda image: image)
    np.testing.assert_array_equal(pixels, np.rot90(np.asarray(image), -1))


def test_a_damaged_archive_names_the_image(tmp_path):
    write_image(tmp_path / "a.png", 1)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "a.png")
    packed = bytearray((tmp_path / "images.zip").read_bytes())
    packed[len(packed) // 4] ^= 0xFF
    (tmp_path / "images.zip").write_bytes(packed)
    with pytest.raises(ValueError, match=r"a\.png cannot be read; .*CRC"):
        read_images(tmp_path / "images.zip", ["a.png"], lambda image: image)


@pytest.mark.skipif(not PACS.exists(), reason="needs the PACS archive")
def test_pacs():
    photo = folder_images(PACS, domain="photo", image_size=16)
    sketch = folder_images(PACS, domain="sketch", image_size=16)
    assert photo.train.shape == sketch.train.shape == (7, 60, 16, 16, 3)
    assert sketch.train.mean() > 0.8 > photo.train.mean()  # sketches are mostly white
