import csv
import io
import pathlib
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds

from lohp_jax.data import byte_tokens, tfds_text

SHARED_DATA = pathlib.Path(__file__).parents[2].parent / "shared" / "data"
TEXT = tfds.features.Text
SENTENCES = ["It is so.", "Is it só?", "", "No\x00ne"]


@pytest.fixture(autouse=True)
def quiet():
    tfds.disable_progress_bar()


def prepare(data_dir, splits, features, supervised_keys=None):
    """Prepares a set called "toy" from `{split: [example, ...]}`, without TensorFlow."""

    class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=supervised_keys,
            )

        def _split_generators(self, dl_manager):
            return {name: self._generate_examples(rows) for name, rows in splits.items()}

        def _generate_examples(self, rows):
            yield from enumerate(rows)

    Toy(data_dir=data_dir, file_format="array_record").download_and_prepare()


def labelled(num_classes=3, **texts):
    label = tfds.features.ClassLabel(num_classes=num_classes)
    return {"label": label, "idx": np.int32, **dict.fromkeys(texts or ("sentence",), TEXT())}


def rows(labels, sentences=SENTENCES):
    return [
        {"idx": i, "label": label, "sentence": sentence}
        for i, (label, sentence) in enumerate(zip(labels, sentences, strict=True))
    ]


def test_sentences_and_labels_of_every_split_are_as_prepared(tmp_path):
    splits = {"train": rows([2, 0, 1, 2]), "validation": rows([1], ["Só."])}
    prepare(tmp_path, splits | {"test": rows([-1, 0], ["a", "b"])}, labelled())
    found = tfds_text("toy", data_dir=tmp_path)
    assert (found.fields, found.name) == (("sentence",), "tfds:toy")
    assert found.classes == ("0", "1", "2") and list(found.splits) == ["train", "validation"]
    train, validation = found.splits.values()
    assert train.texts.shape == (4, 1) and train.labels.dtype == np.int32
    expected = {(row["sentence"], row["label"]) for row in splits["train"]}
    assert set(zip(train.texts[:, 0].tolist(), train.labels.tolist(), strict=True)) == expected
    assert validation.texts.tolist() == [["Só."]] and validation.labels.tolist() == [1]
    (test,) = tfds_text("toy", data_dir=tmp_path, splits=["test"]).splits.values()
    assert dict(zip(test.texts[:, 0].tolist(), test.labels.tolist(), strict=True)) == {
        "a": -1,
        "b": 0,
    }


def test_pairs_come_in_the_order_of_their_names_and_scores_are_floats(tmp_path):
    features = {"second": TEXT(), "first": TEXT(), "label": np.float32}
    prepare(tmp_path, {"train": [{"second": "b", "first": "a", "label": 2.5}]}, features)
    found = tfds_text("toy", data_dir=tmp_path, splits=["train"])
    assert (found.fields, found.classes) == (("first", "second"), ())
    assert found.splits["train"].texts.tolist() == [["a", "b"]]
    assert found.splits["train"].labels.dtype == np.float32
    assert found.splits["train"].labels.tolist() == [2.5]


def test_a_declared_input_is_the_only_field(tmp_path):
    features = {"body": TEXT(), "title": TEXT(), "kind": tfds.features.ClassLabel(num_classes=2)}
    row = {"body": "b", "title": "t", "kind": 1}
    prepare(tmp_path, {"train": [row]}, features, ("body", "kind"))
    found = tfds_text("toy", data_dir=tmp_path, splits=["train"])
    assert found.fields == ("body",)
    assert found.splits["train"].texts.tolist() == [["b"]]


def test_a_split_that_is_not_there(tmp_path):
    prepare(tmp_path, {"train": rows([0], ["a"])}, labelled())
    with pytest.raises(ValueError, match=r"tfds_text: .*\['train'\].* got 'validation'"):
        tfds_text("toy", data_dir=tmp_path)


@pytest.mark.parametrize(
    "features, row",
    [
        ({"label": np.int32}, {"label": 0}),
        ({"text": TEXT(), "label": TEXT()}, {"text": "a", "label": "b"}),
        ({"text": TEXT(), "score": np.float32}, {"text": "a", "score": 0.5}),
    ],
    ids=["no_text", "label_is_text", "no_label"],
)
def test_other_kinds_of_sets_are_refused(tmp_path, features, row):
    prepare(tmp_path, {"train": [row]}, features)
    with pytest.raises(ValueError, match="expected texts with a label, got 'toy/1"):
        tfds_text("toy", data_dir=tmp_path)


def test_an_unprepared_set_tells_how_to_prepare_it(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        tfds_text("glue/sst2", data_dir=tmp_path)
    message = str(error.value)
    assert f"tfds_text: expected 'glue/sst2' prepared as array_record in {tmp_path}" in message
    assert "import tensorflow_datasets as tfds, tensorflow_datasets.text.glue; tfds" in message


def test_an_unknown_set_gets_the_nearest_names(tmp_path):
    with pytest.raises(ValueError, match=r"tfds_text: .*got 'gleu/cola'; nearest names: .*glue"):
        tfds_text("gleu/cola", data_dir=tmp_path)


def test_tokens_are_the_bytes_cut_or_padded():
    texts = ["", "a", "Só, it is.", "€" * 4]
    tokens = byte_tokens(texts, 6)
    assert tokens.shape == (4, 6) and tokens.dtype == np.uint8
    for text, row in zip(texts, tokens, strict=True):
        assert bytes(row) == text.encode()[:6].ljust(6, b"\0")


def test_fields_follow_each_other_with_a_byte_between_that_no_text_has():
    assert bytes(byte_tokens([["ab", "c"], ["abcd", "e"]], 5)[0]) == b"ab\xffc\0"
    assert bytes(byte_tokens([["ab", "c"], ["abcd", "e"]], 5)[1]) == b"abcd\xff"
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode()


@pytest.mark.parametrize(
    "texts, length, message",
    [
        (["a"], 0, "length must be at least 1, got 0"),
        ([[["a"]]], 3, r"\[N\] or \[N, fields\], got \[1, 1, 1\]"),
        (["a\x00"], 3, "without the character 0"),
    ],
)
def test_byte_tokens_rejects(texts, length, message):
    with pytest.raises(ValueError, match=f"byte_tokens: .*{message}"):
        byte_tokens(texts, length)


def test_cola_has_the_sentences_of_its_tables(prepared):
    found = tfds_text("glue/cola", data_dir=prepared("glue/cola"))
    assert found.classes == ("unacceptable", "acceptable")
    with zipfile.ZipFile(SHARED_DATA / "glue" / "CoLA.zip") as archive:
        for split, file, count in (("train", "train", 8551), ("validation", "dev", 1043)):
            table = io.TextIOWrapper(archive.open(f"CoLA/{file}.tsv"), "utf-8")
            lines = csv.reader(table, delimiter="\t", quoting=csv.QUOTE_NONE)
            expected = sorted((line[3], int(line[1])) for line in lines)
            texts, labels = found.splits[split]
            read = zip(texts[:, 0].tolist(), labels.tolist(), strict=True)
            assert len(texts) == count and sorted(read) == expected
    tokens = byte_tokens(found.splits["validation"].texts, 300)
    assert bytes(tokens[0]).rstrip(b"\0").decode() == found.splits["validation"].texts[0, 0]
