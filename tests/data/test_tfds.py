import io
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from lohp_jax.data import digits, image_set, omniglot, tfds_images
from lohp_jax.data.tfds import read_all

TRAIN, TEST, VALIDATION = 0, 1, 2
GRAY, RGB = (6, 4, 1), (6, 4, 3)
POOL_SIZES = {"train_per_class": 3, "query_per_class": 2}


def encode(pixels, file_format="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(file, file_format)
    return io.BytesIO(file.getvalue())


def tagged(split, label, index, shape=GRAY):
    """A random image whose first three pixels tell where it belongs."""
    pixels = np.random.default_rng((split, label, index)).integers(0, 256, shape, np.uint8)
    pixels[0, :3] = np.array([split, label, index])[:, None]
    return pixels


def tags(pool):
    """`[classes, images_per_class, 3]`: the split, label and index of every image."""
    return np.rint(255 * np.float64(pool[:, :, 0, :3, 0])).astype(int)


def examples(split, counts, shape=GRAY):
    """`counts` maps a label, -1 where it is withheld, to its number of images."""
    return [
        {"image": encode(tagged(split, max(label, 0), index, shape)), "label": label}
        for label, count in counts.items()
        for index in range(count)
    ]


def prepare(data_dir, splits, features=None, supervised_keys=("image", "label"), shape=GRAY):
    """Prepares a set called "toy" from `{split: [example, ...]}`, without TensorFlow."""

    class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features or image_features(shape)),
                supervised_keys=supervised_keys,
            )

        def _split_generators(self, dl_manager):
            return {name: self._generate_examples(rows) for name, rows in splits.items()}

        def _generate_examples(self, rows):
            yield from enumerate(rows)

    builder = Toy(data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
    return builder


def image_features(shape=GRAY, num_classes=5):
    return {
        "image": tfds.features.Image(shape=shape),
        "label": tfds.features.ClassLabel(num_classes=num_classes),
    }


@pytest.fixture(autouse=True)
def quiet():
    tfds.disable_progress_bar()


@pytest.mark.parametrize("shape", [GRAY, RGB], ids=["gray", "rgb"])
def test_pools_are_the_images_of_each_class_divided_by_255(tmp_path, shape):
    counts = {0: 5, 1: 7, 2: 6}
    splits = {"train": examples(TRAIN, counts, shape), "test": examples(TEST, counts, shape)}
    prepare(tmp_path, splits, shape=shape)
    images = tfds_images("toy", data_dir=tmp_path, **POOL_SIZES)
    assert images.name == "tfds:toy"
    assert images.train.shape == (3, 3, *shape)
    assert images.query.shape == (3, 2, *shape)
    for expected_split, pool in ((TRAIN, images.train), (TEST, images.query)):
        assert pool.dtype == np.float32
        for label in range(3):
            found = tags(pool)[label]
            assert len({index for _, _, index in found}) == len(found)
            for image, (split, tagged_label, index) in zip(pool[label], found, strict=True):
                assert (split, tagged_label) == (expected_split, label)
                expected = np.float64(tagged(split, label, index, shape)) / 255
                np.testing.assert_allclose(image, expected, rtol=1e-7)


def test_choice_is_fixed_random_and_a_larger_one_starts_with_the_smaller(tmp_path):
    splits = {s: examples(i, {0: 30, 1: 30}) for i, s in enumerate(("train", "test"))}
    prepare(tmp_path, splits)
    small = tfds_images("toy", data_dir=tmp_path, train_per_class=5, query_per_class=5)
    again = tfds_images("toy", data_dir=tmp_path, train_per_class=5, query_per_class=5)
    large = tfds_images("toy", data_dir=tmp_path, train_per_class=9, query_per_class=7)
    for pool, same, more in zip(small[:2], again[:2], large[:2], strict=True):
        np.testing.assert_array_equal(pool, same)
        np.testing.assert_array_equal(pool, more[:, :5])
    as_stored = [
        record["image"][0, 2, 0]
        for record in tfds.data_source("toy", split="train", data_dir=tmp_path, download=False)
        if record["label"] == 0
    ]
    assert list(tags(small.train)[0, :, 2]) != as_stored[:5]


OTHER_SPLITS = {
    "test": ({"test": {0: 4, 1: 4}, "validation": {0: 4, 1: 4}}, TEST),
    "validation": ({"validation": {0: 4, 1: 4}}, VALIDATION),
    "no_other_split": ({}, TRAIN),
    "test_with_classes_of_its_own": ({"test": {2: 4, 3: 4}}, TRAIN),
    "test_without_a_class": ({"test": {0: 4}}, TRAIN),
    "test_without_labels": ({"test": {-1: 4}, "validation": {0: 4, 1: 4}}, VALIDATION),
}


@pytest.mark.parametrize("others, expected", OTHER_SPLITS.values(), ids=OTHER_SPLITS)
def test_query_pool_comes_from_the_first_split_with_the_classes_of_train(
    tmp_path, others, expected
):
    tag = {"test": TEST, "validation": VALIDATION}
    splits = {"train": examples(TRAIN, {0: 5, 1: 6})}
    splits |= {name: examples(tag[name], counts) for name, counts in others.items()}
    prepare(tmp_path, splits)
    images = tfds_images("toy", data_dir=tmp_path, **POOL_SIZES)
    used = [tuple(t) for pool in images[:2] for t in tags(pool).reshape(-1, 3)]
    assert len(set(used)) == 2 * (3 + 2)  # no image is in both pools
    assert {split for split, _, _ in used[:6]} == {TRAIN}
    assert {split for split, _, _ in used[6:]} == {expected}
    assert [label for _, label, _ in used] == [0] * 3 + [1] * 3 + [0] * 2 + [1] * 2


def test_declared_classes_without_images_are_left_out(tmp_path):
    prepare(tmp_path, {"train": examples(TRAIN, {1: 5, 4: 5})})
    images = tfds_images("toy", data_dir=tmp_path, **POOL_SIZES)
    assert list(tags(images.train)[:, 0, 1]) == [1, 4]


@pytest.mark.parametrize(
    "splits, message",
    [
        ({"train": {0: 9, 3: 4}}, "'train' is too small.* 5 images .* got 4 of class 3"),
        ({"train": {0: 2, 1: 9}, "test": {0: 9, 1: 9}}, "'train' is too small.* got 2 of class 0"),
        ({"train": {0: 9, 1: 9}, "test": {0: 9, 1: 1}}, "'test' is too small.* got 1 of class 1"),
    ],
)
def test_too_few_images_of_a_class_are_counted(tmp_path, splits, message):
    prepare(tmp_path, {name: examples(TRAIN, counts) for name, counts in splits.items()})
    with pytest.raises(ValueError, match=message):
        tfds_images("toy", data_dir=tmp_path, **POOL_SIZES)


def several_sizes(data_dir):
    shapes = [(8, 12, 3), (12, 8, 3), (8, 8, 3)]
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, shape, np.uint8) for shape in shapes for _ in range(2)]
    splits = {"train": [{"image": encode(image), "label": 0} for image in images]}
    prepare(data_dir, splits, shape=(None, None, 3))
    return images


def test_images_of_several_sizes_are_refused(tmp_path):
    several_sizes(tmp_path)
    with pytest.raises(ValueError, match=r"one size.* from \(8, 8\) to \(12, 8\); resize them all"):
        tfds_images("toy", data_dir=tmp_path, train_per_class=3, query_per_class=3)


def test_image_size_averages_areas_of_the_central_square(tmp_path):
    images = several_sizes(tmp_path)
    pools = tfds_images(
        "toy", data_dir=tmp_path, train_per_class=3, query_per_class=3, image_size=4
    )
    actual = np.concatenate(pools[:2], axis=1)[0]
    expected = []
    for image in images:
        top, left = (image.shape[0] - 8) // 2, (image.shape[1] - 8) // 2
        square = np.float64(image[top : top + 8, left : left + 8])
        expected.append(square.reshape(4, 2, 4, 2, 3).mean((1, 3)) / 255)
    order = [np.abs(actual - e).max((1, 2, 3)).argmin() for e in expected]
    assert sorted(order) == list(range(6))
    np.testing.assert_allclose(actual[order], expected, atol=1.01 / 255)  # Pillow rounds twice


def test_gray_jpeg_in_a_set_of_colour_images_gets_three_channels(tmp_path):
    image = encode(np.full((6, 4, 1), 51, np.uint8), "JPEG")
    rows = [{"image": image, "label": 0}, *examples(TRAIN, {0: 4}, RGB)]
    prepare(tmp_path, {"train": rows}, shape=RGB)
    images = tfds_images("toy", data_dir=tmp_path, **POOL_SIZES)
    pool = np.concatenate(images[:2], axis=1)[0]
    assert sum(np.allclose(image, 0.2, atol=1e-6) for image in pool) == 1


def test_one_bit_png_is_black_and_white(tmp_path):
    file = io.BytesIO()
    Image.fromarray(np.arange(24).reshape(6, 4) % 2 == 0).save(file, "PNG")
    rows = [{"image": io.BytesIO(file.getvalue()), "label": 0} for _ in range(5)]
    prepare(tmp_path, {"train": rows})
    images = tfds_images("toy", data_dir=tmp_path, **POOL_SIZES)
    expected = np.tile([[1.0, 0.0]], (6, 2))
    np.testing.assert_array_equal(images.train[0, 0, :, :, 0], expected)


def test_image_and_label_are_found_under_their_declared_names(tmp_path):
    image, label = image_features().values()
    features = {"picture": image, "kind": label, "label": tfds.features.Text()}
    rows = [
        {"picture": row["image"], "kind": row["label"], "label": "x"}
        for row in examples(TRAIN, {0: 5, 1: 5})
    ]
    prepare(tmp_path, {"train": rows}, features, supervised_keys=("picture", "kind"))
    images = tfds_images("toy", data_dir=tmp_path, **POOL_SIZES)
    np.testing.assert_array_equal(tags(images.train)[:, :, 1], [[0] * 3, [1] * 3])


def test_image_and_label_are_the_names_where_none_are_declared(tmp_path):
    prepare(tmp_path, {"train": examples(TRAIN, {0: 5})}, supervised_keys=None)
    assert tfds_images("toy", data_dir=tmp_path, **POOL_SIZES).train.shape == (1, 3, *GRAY)


NOT_CLASSIFICATION = {
    "text": {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=2)},
    "regression": {"image": tfds.features.Image(shape=GRAY), "label": np.float32},
    "16_bits": image_features() | {"image": tfds.features.Image(shape=GRAY, dtype=np.uint16)},
}


@pytest.mark.parametrize("features", NOT_CLASSIFICATION.values(), ids=NOT_CLASSIFICATION)
def test_sets_other_than_image_classification_are_refused(tmp_path, features):
    row = {"image": encode(tagged(0, 0, 0)), "text": "a", "label": 1}
    rows = [{key: row[key] for key in features}]
    prepare(tmp_path, {"train": rows}, features, supervised_keys=None)
    with pytest.raises(ValueError, match="expected images with a class label, got 'toy/1"):
        tfds_images("toy", data_dir=tmp_path)


def test_set_without_train_is_refused(tmp_path):
    prepare(tmp_path, {"test": examples(TEST, {0: 5})})
    with pytest.raises(ValueError, match=r"expected a split 'train' .* got \['test'\]"):
        tfds_images("toy", data_dir=tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100", "omniglot"])
def test_unprepared_set_tells_how_to_prepare_it(tmp_path, name):
    with pytest.raises(FileNotFoundError) as error:
        tfds_images(name, data_dir=tmp_path)
    message = str(error.value)
    assert f"{name!r} prepared as array_record in {tmp_path / name}" in message
    assert "found nothing" in message
    command = f"tfds.builder({name!r}, data_dir='{tmp_path}', file_format='array_record')"
    assert f"{command}.download_and_prepare()" in message


def test_set_in_another_file_format_is_not_found(tmp_path):
    builder = prepare(tmp_path, {"train": examples(TRAIN, {0: 5})})
    info = builder.data_path / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(FileNotFoundError, match="found tfrecord"):
        tfds_images("toy", data_dir=tmp_path)


@pytest.mark.parametrize(
    "name, nearest",
    [("minst", "mnist, "), ("cifar-10", "cifar10, "), ("mnist:9.9.9", "mnist, "), ("qqqq", "none")],
)
def test_unknown_set_gets_the_nearest_names(tmp_path, name, nearest):
    with pytest.raises(ValueError, match=f"got '{name}'; nearest names: {nearest}"):
        tfds_images(name, data_dir=tmp_path)


@pytest.mark.parametrize("argument", ["train_per_class", "query_per_class", "image_size"])
def test_numbers_must_be_positive(tmp_path, argument):
    with pytest.raises(ValueError, match="positive"):
        tfds_images("mnist", data_dir=tmp_path, **{argument: 0})


def test_data_dir_may_start_with_a_tilde_or_come_from_the_environment(tmp_path, monkeypatch):
    prepare(tmp_path / "data", {"train": examples(TRAIN, {0: 5})})
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    assert tfds_images("toy", data_dir="~/data", **POOL_SIZES).name == "tfds:toy"
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "tensorflow_datasets" / "mnist")):
        tfds_images("mnist")
    monkeypatch.setenv("TFDS_DATA_DIR", "~/data")
    assert tfds_images("toy", **POOL_SIZES).name == "tfds:toy"


def test_image_set_goes_by_the_source(tmp_path):
    prepare(tmp_path, {"train": examples(TRAIN, {0: 5})})
    assert image_set("digits", data_dir=tmp_path) is digits()
    images = image_set("tfds:toy", data_dir=tmp_path, **POOL_SIZES)
    assert images.name == "tfds:toy"
    assert images.train.shape == (1, 3, *GRAY)


def test_all_images_of_several_splits_are_read(tmp_path):
    splits = {"train": examples(TRAIN, {0: 2, 1: 2}), "test": examples(TEST, {3: 2})}
    prepare(tmp_path, splits)
    images, labels = read_all("toy", ("train", "test"), tmp_path, None, mode="L")
    assert sorted(labels[:4]) == [0, 0, 1, 1] and list(labels[4:]) == [3, 3]
    for image, label in zip(images, labels, strict=True):
        split, tagged_label, index = image[0, :3, 0]
        assert (split, tagged_label) == (TEST if label == 3 else TRAIN, label)
        np.testing.assert_array_equal(image, tagged(split, label, index))


def test_omniglot_is_read_by_label_with_ink_as_255(tmp_path, monkeypatch):
    splits = {"train": examples(TRAIN, {2: 3, 0: 3}), "test": examples(TEST, {1: 3})}
    prepare(tmp_path, splits, shape=GRAY)
    monkeypatch.setattr(sys.modules[omniglot.__module__], "NAME", "toy")
    characters = omniglot(data_dir=tmp_path, image_size=4)
    assert characters.shape == (3, 3, 4, 4, 1) and characters.dtype == np.uint8
    for label, split in enumerate((TRAIN, TEST, TRAIN)):
        expected = {(255 - tagged(split, label, i)[1:5]).tobytes() for i in range(3)}
        assert {image.tobytes() for image in characters[label]} == expected
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        omniglot(data_dir=tmp_path, image_size=0)


def test_image_set_names_the_choices():
    with pytest.raises(ValueError, match="'digits' or 'tfds:NAME', got 'mnist'"):
        image_set("mnist")


def test_importing_the_package_loads_no_reader():
    check = (
        "import sys, lohp_jax.data; print({'tensorflow_datasets', 'sklearn'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Without TensorFlow, TFDS leaves the 0 and 1 of 1-bit PNG files as they are.
WHITE = {"omniglot": np.uint8(255)}


@pytest.mark.parametrize(
    "name, num_train, num_query",
    [
        ("cifar10", 40, 20),
        pytest.param("mnist", 500, 100, marks=pytest.mark.slow),
        pytest.param("omniglot", 15, 5, marks=pytest.mark.slow),
    ],
)
def test_real_set_has_the_images_that_tfds_itself_decodes(prepared, name, num_train, num_query):
    data_dir = prepared(name)
    images = tfds_images(
        name, data_dir=data_dir, train_per_class=num_train, query_per_class=num_query
    )
    query_split = "train" if name == "omniglot" else "test"
    for split, pool in (("train", images.train), (query_split, images.query)):
        stored = {}
        for record in tfds.data_source(name, split=split, data_dir=data_dir, download=False):
            pixels = record["image"] * WHITE.get(name, np.uint8(1))
            stored.setdefault(record["label"], set()).add(pixels.tobytes())
        assert len(pool) == len(stored)
        for label, chosen in zip(sorted(stored), pool, strict=True):
            pixels = [np.rint(255 * np.float64(image)).astype(np.uint8) for image in chosen]
            assert {p.tobytes() for p in pixels} <= stored[label]
