"""JSON files are read whole or refused by name, and configs differ in the first field that differs."""

import json

import pytest

from lohp_jax.files import first_difference, read_json, write_json


def test_round_trip_takes_the_schema_off(tmp_path):
    values = {"a": [1, 2.5, None, "ü"], "b": {"c": True}}
    write_json(tmp_path / "x.json", values, schema=3)
    assert read_json(tmp_path / "x.json", schema=3) == values
    assert json.loads((tmp_path / "x.json").read_text()) == {"schema": 3, **values}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'["schema"]', b"3", b"null", b"{}", b"\xff"])
def test_what_holds_no_object_with_a_schema_is_damaged(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"x\.json is damaged \(.*\); .* Nothing was deleted"):
        read_json(tmp_path / "x.json", schema=1)
    assert (tmp_path / "x.json").read_bytes() == text


def test_another_schema_is_named(tmp_path):
    write_json(tmp_path / "x.json", {}, schema=2)
    with pytest.raises(
        ValueError, match="has schema 2, this version of lohp_jax reads schema 1 only"
    ):
        read_json(tmp_path / "x.json", schema=1)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "y.json", schema=1)


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ({"a": 1, "b": {"c": 2}}, {"b": {"c": 2}, "a": 1}, None),
        ({"a": (1, (2,))}, {"a": [1, [2]]}, None),
        ({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}, "b.c is 2 there and 3 here"),
        ({"b": 1, "a": 1}, {"a": 2, "b": 2}, "b is 1 there and 2 here"),
        ({"a": None}, {}, "a is None there and absent here"),
        ({}, {"a": {"b": 1}}, "a is absent there and {'b': 1} here"),
        ({"a": {"b": 1}}, {"a": 3}, "a is {'b': 1} there and 3 here"),
        ({"a": [1, 2]}, {"a": [1]}, "a is [1, 2] there and [1] here"),
        ({"a": {"['w']": 1}}, {"a": {"['w']": 2}}, "a['w'] is 1 there and 2 here"),
        ({"a": {".w[0]": 1}}, {"a": {}}, "a.w[0] is 1 there and absent here"),
    ],
)
def test_the_first_difference_is_named_with_both_values(old, new, expected):
    assert first_difference(old, new) == expected
    if expected:
        assert first_difference(old, new, "config") == f"config.{expected}"
