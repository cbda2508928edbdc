import itertools

import numpy as np
import pytest

from lohp_jax.tasks.partitions import partition_tables
from lohp_jax.tasks.splits import HELD_OUT_FRACTION, split_classes


def pairs(table):
    """The partitions of a table, each as {side, other side}; none may repeat or have one side."""
    rows = [
        frozenset(frozenset(classes[labels == label].tolist()) for label in (0, 1))
        for classes, labels in zip(table.classes, table.labels, strict=True)
    ]
    assert len(set(rows)) == len(rows)
    assert all(len(row) == 2 and frozenset() not in row for row in rows)
    return set(rows)


def all_pairs(classes):
    """Every partition of a set of classes in two, by enumerating one side."""
    classes = frozenset(classes)
    sides = itertools.chain.from_iterable(
        itertools.combinations(classes, size) for size in range(1, len(classes))
    )
    return {frozenset([frozenset(side), classes - frozenset(side)]) for side in sides}


@pytest.mark.parametrize("num_classes", [3, 6, 10])
def test_a_partition_and_its_complement_are_in_one_split(num_classes):
    tables = partition_tables(num_classes)
    train, held_out = pairs(tables["train"]), pairs(tables["held_out"])
    assert not train & held_out
    assert train | held_out == all_pairs(range(num_classes))
    assert 2 * (len(train) + len(held_out)) == 2**num_classes - 2
    assert len(held_out) == max(1, int(HELD_OUT_FRACTION * (2**num_classes - 2) / 2))


def test_ten_classes_have_1022_partitions():
    tables = partition_tables(10)
    assert 2 * sum(len(table.labels) for table in tables.values()) == 1022


@pytest.mark.parametrize("num_classes", [3, 4, 7, 10])
def test_held_out_classes_never_occur_in_training(num_classes):
    tables = partition_tables(num_classes, holdout="classes", seed=1)
    seen, unseen = split_classes(num_classes, seed=1)
    assert pairs(tables["train"]) == all_pairs(seen)
    expected = set()
    for others in itertools.combinations(seen, len(seen) - len(unseen)):
        expected |= all_pairs(unseen + others)
    assert pairs(tables["held_out"]) == expected
    assert all(set(unseen) < set(row) for row in tables["held_out"].classes.tolist())


def test_tables_have_one_shape_in_both_splits():
    for holdout in ("tasks", "classes"):
        tables = partition_tables(10, holdout=holdout)
        assert tables["train"].classes.shape[1] == tables["held_out"].classes.shape[1]
        for table in tables.values():
            assert table.classes.shape == table.labels.shape
            assert table.classes.dtype == table.labels.dtype == np.int32


def test_the_seed_alone_picks_what_is_held_out():
    first, again, other = (pairs(partition_tables(6, seed=s)["held_out"]) for s in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("num_classes", [2, 17])
def test_partition_tables_rejects_a_number_of_classes(num_classes):
    with pytest.raises(ValueError, match=f"partition_tables: expected 3 to 16.*{num_classes}"):
        partition_tables(num_classes)
