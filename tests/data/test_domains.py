import itertools
import pathlib

import numpy as np
import pytest
from PIL import Image

from lohp_jax.data import DomainSet, digits, domain_set, folder_domains, rotated_domains
from lohp_jax.data.domains import ANGLES
from lohp_jax.data.images import ImageSet

PACS = pathlib.Path(__file__).parents[2].parent / "shared" / "data" / "pacs" / "pacs_64.zip"
DOMAINS, CLASSES, PER_CLASS = ("photo", "sketch", "art"), ("cat", "dog"), 4
SIZES = {"train_per_class": 3, "query_per_class": 1}


def image_set(train=9, query=7, shape=(4, 4, 2)):
    pools = np.random.default_rng(0).uniform(size=(3, train + query, *shape)).astype(np.float32)
    return ImageSet(pools[:, :train], pools[:, train:], "random")


@pytest.mark.parametrize("pool", ["train", "query"])
def test_every_angle_has_images_of_its_own_turned_by_it_counterclockwise(pool):
    images, angles = image_set(), (90, 0, -90)
    domains = rotated_domains(images, angles)
    before, after = getattr(images, pool), getattr(domains, pool)
    share = before.shape[1] // 3
    assert after.shape == (3, 3, share, 4, 4, 2) and after.dtype == np.float32
    assert (domains.domains, domains.name) == (("90", "0", "-90"), "rotated random")
    for d, quarter_turns in enumerate((1, 0, -1)):
        for c, i in itertools.product(range(3), range(share)):
            expected = np.rot90(before[c, d * share + i], quarter_turns)
            np.testing.assert_allclose(after[d, c, i], expected, atol=1e-6)


def test_values_between_pixels_are_linear_and_those_from_outside_are_zero():
    picture = np.zeros((3, 3, 1), np.float32)
    picture[1, 1:] = 1.0  # from the centre to the right
    pool = np.broadcast_to(picture, (2, 2, 3, 3, 1))
    turned = rotated_domains(ImageSet(pool, pool, "line"), (0, 45)).train[1, 0, 0, :, :, 0]
    share = 1 - np.sqrt(
        0.5
    )  # of a source at (√½, √½) from the centre, its distance to the next row
    np.testing.assert_allclose(
        [turned[1, 1], turned[0, 1], turned[1, 2]], [1, share, share], atol=1e-6
    )
    np.testing.assert_allclose([turned[1, 0], turned[2, 1]], share**2, atol=1e-6)
    assert turned[0, 0] == turned[0, 2] == turned[2, 2] == 0  # their sources lie outside


def test_the_default_is_the_six_angles_of_the_digits():
    domains = domain_set("digits")
    assert domains.domains == ("0", "15", "30", "45", "60", "75") == tuple(map(str, ANGLES))
    assert domains.train.shape == (6, 10, 16, 8, 8, 1) and domains.query.shape[2] == 12
    np.testing.assert_array_equal(domains.train[0], digits().train[:, :16])
    assert domains.train.min() >= 0 and domains.train.max() <= 1


@pytest.mark.parametrize(
    "images, angles, message",
    [
        (image_set(), (0,), r"two or more different angles, got \('0',\)"),
        (image_set(), (0, 15, 15), "two or more different angles"),
        (image_set(shape=(4, 3, 1)), (0, 15), "square images, got 4 x 3"),
        (image_set(train=2), (0, 15, 30), "at least 3 training images of each class.* got 2"),
        (image_set(query=2), (0, 15, 30), "at least 3 query images of each class.* got 2"),
    ],
)
def test_rotated_domains_rejects(images, angles, message):
    with pytest.raises(ValueError, match=f"rotated_domains: expected {message}"):
        rotated_domains(images, angles)


def write_image(path, value, size=(4, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).save(path)


@pytest.fixture
def tree(tmp_path):
    """`pictures/DOMAIN/CLASS/NAME`; the red of an image tells where it belongs."""
    for (d, domain), (c, label) in itertools.product(enumerate(DOMAINS), enumerate(CLASSES)):
        for i in range(PER_CLASS):
            path = tmp_path / "pictures" / domain / label / f"{i}.png"
            write_image(path, 80 * d + 30 * c + 5 * i)
    write_image(tmp_path / "pictures" / "cover.png", 255)
    return tmp_path / "pictures"


def test_folders_become_domains_in_the_order_of_their_names(tree):
    for domains in (folder_domains(tree, **SIZES), domain_set(f"folder:{tree}", **SIZES)):
        assert (domains.domains, domains.name) == (("art", "photo", "sketch"), "pictures")
        assert domains.train.shape == (3, 2, 3, 4, 4, 3)
        both = np.concatenate([domains.train, domains.query], axis=2)
        red = np.sort(np.rint(255 * both[..., 0, 0, 0]), axis=2)
        for place, domain in enumerate(domains.domains):
            start = 80 * DOMAINS.index(domain) + 30 * np.arange(2)[:, None]
            np.testing.assert_array_equal(red[place], start + 5 * np.arange(PER_CLASS)[None])


def test_a_class_that_a_domain_lacks_is_named(tree):
    write_image(tree / "photo" / "elk" / "0.png", 1)
    with pytest.raises(ValueError, match=r"same classes in every domain, got none of \['elk'\] in"):
        folder_domains(tree, **SIZES)


def test_too_few_images_of_a_class_are_counted_by_domain(tree):
    (tree / "sketch" / "dog" / "0.png").unlink()
    message = "domain 'sketch': by_class: expected at least 4 .* got 3 of class dog"
    with pytest.raises(ValueError, match=message):
        folder_domains(tree, **SIZES)


def test_images_of_several_sizes_are_refused_unless_resized(tree):
    for label, i in itertools.product(CLASSES, range(PER_CLASS)):
        write_image(tree / "sketch" / label / f"{i}.png", 1, size=(6, 6))
    with pytest.raises(ValueError, match=r"one size.* from \(4, 4\) to \(6, 6\); resize"):
        folder_domains(tree, **SIZES)
    resized = folder_domains(tree, **SIZES, image_size=2)
    assert resized.train.shape == (3, 2, 3, 2, 2, 3)
    write_image(tree / "art" / "cat" / "0.png", 1, size=(6, 6))
    with pytest.raises(ValueError, match=r"domain 'art': .*one size"):
        folder_domains(tree, **SIZES)


def test_a_single_domain_and_sources_of_another_kind(tmp_path):
    write_image(tmp_path / "photo" / "cat" / "0.png", 1)
    with pytest.raises(ValueError, match=r"two or more domains in .* domains \['photo'\]"):
        folder_domains(tmp_path)
    with pytest.raises(ValueError, match="'digits', 'tfds:NAME' or 'folder:PATH', got 'mnist'"):
        domain_set("mnist")
    with pytest.raises(FileNotFoundError, match="found nothing"):
        domain_set(f"folder:{tmp_path / 'absent'}")


@pytest.mark.skipif(not PACS.exists(), reason="needs the data in shared/data")
def test_pacs_has_four_domains_of_seven_classes():
    domains = folder_domains(PACS, train_per_class=5, query_per_class=3)
    assert isinstance(domains, DomainSet)
    assert domains.domains == ("art_painting", "cartoon", "photo", "sketch")
    assert domains.train.shape == (4, 7, 5, 64, 64, 3) and domains.query.shape[2] == 3
    colour = np.abs(np.diff(domains.train, axis=-1)).mean(axis=(1, 2, 3, 4, 5))
    assert colour.argmin() == 3 and colour[3] < 0.01  # sketches are gray


@pytest.mark.slow
def test_rotated_mnist_comes_by_name(prepared):
    domains = domain_set("tfds:mnist", data_dir=prepared("mnist"))
    assert domains.train.shape == (6, 10, 83, 28, 28, 1)
    assert domains.name == "rotated tfds:mnist"
