import itertools
import math

import numpy as np
import pytest

from lohp_jax.tasks.n_way import n_way_tables
from lohp_jax.tasks.splits import HELD_OUT_FRACTION, split_classes


def combinations(table):
    """The sets of classes of a table, which must not repeat."""
    rows = [frozenset(row) for row in table.classes.tolist()]
    assert len(set(rows)) == len(rows)
    assert {len(row) for row in rows} == {table.classes.shape[1]}
    return set(rows)


@pytest.mark.parametrize("num_classes, way", [(10, 5), (10, 2), (4, 3), (5, 4)])
def test_every_combination_is_in_one_split(num_classes, way):
    tables = n_way_tables(num_classes, way=way)
    train, held_out = combinations(tables["train"]), combinations(tables["held_out"])
    assert not train & held_out
    assert train | held_out == set(map(frozenset, itertools.combinations(range(num_classes), way)))
    assert len(held_out) == max(1, int(math.comb(num_classes, way) * HELD_OUT_FRACTION))


@pytest.mark.parametrize("seed", range(3))
def test_held_out_combinations_are_of_classes_seen_in_training(seed):
    tables = n_way_tables(10, seed=seed)
    assert set(tables["train"].classes.ravel()) == set(range(10))


@pytest.mark.parametrize("num_classes, way, num_new", [(10, 5, 3), (10, 2, 2), (10, 3, 3)])
def test_held_out_classes_never_occur_in_training(num_classes, way, num_new):
    tables = n_way_tables(num_classes, way=way, holdout="classes", seed=1)
    seen, unseen = map(set, split_classes(num_classes, seed=1))
    assert combinations(tables["train"]) == set(map(frozenset, itertools.combinations(seen, way)))
    every = map(frozenset, itertools.combinations(range(num_classes), way))
    expected = {row for row in every if len(row & unseen) == num_new}
    assert combinations(tables["held_out"]) == expected


@pytest.mark.parametrize("holdout", ["tasks", "classes"])
def test_labels_count_the_classes_of_a_row(holdout):
    for table in n_way_tables(10, holdout=holdout).values():
        assert table.labels.dtype == table.classes.dtype == np.int32
        np.testing.assert_array_equal(table.labels, [range(5)] * len(table.classes))


def test_the_seed_alone_picks_what_is_held_out():
    first, again, other = (combinations(n_way_tables(10, seed=s)["held_out"]) for s in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(
    "num_classes, options, message",
    [
        (4, {}, "expected 2 to 100000 tasks, got 0, the ways to choose 5 of 4 classes"),
        (5, {}, "got 1, the ways to choose 5 of 5"),
        (62, {}, "got 6471002"),
        (7, {"holdout": "classes", "way": 6}, "at least way=6 training classes, got 5 of 7"),
    ],
)
def test_n_way_tables_rejects(num_classes, options, message):
    with pytest.raises(ValueError, match=f"n_way_tables: .*{message}"):
        n_way_tables(num_classes, **options)
