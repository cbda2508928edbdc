import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.tasks.n_way import Episodes, Part, is_held_out, n_way_tables
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
        (4, {}, "expected two tasks or more, got 0, the ways to choose 5 of 4 classes"),
        (5, {}, "got 1, the ways to choose 5 of 5"),
        (5, {"way": 1}, "way must be at least 2, got 1"),
        (7, {"holdout": "classes", "way": 6}, "at least way=6 training classes, got 5 of 7"),
    ],
)
def test_n_way_tables_rejects(num_classes, options, message):
    with pytest.raises(ValueError, match=f"n_way_tables: .*{message}"):
        n_way_tables(num_classes, **options)


# --- too many combinations to list


@jax.jit(static_argnums=(0, 2))
def draw_many(tasks, key, count):
    return jax.vmap(tasks.draw)(jax.random.split(key, count))


def drawn_rows(tasks, count=2000, seed=0):
    classes, labels = draw_many(tasks, jax.random.key(seed), count)
    np.testing.assert_array_equal(labels, [range(tasks.num_labels)] * count)
    assert classes.dtype == labels.dtype == jnp.int32
    return np.asarray(classes)


@pytest.mark.parametrize("num_classes, way", [(62, 5), (100, 5), (4800, 20), (4800, 5)])
def test_combinations_that_cannot_be_listed_are_drawn_and_split(num_classes, way):
    tables = n_way_tables(num_classes, way=way)
    train, held_out = (drawn_rows(tables[split]) for split in ("train", "held_out"))
    for rows, side in ((train, False), (held_out, True)):
        assert rows.shape == (2000, way)
        assert (np.diff(rows, axis=1) > 0).all()  # distinct and in order
        assert rows.min() >= 0 and rows.max() < num_classes
        sides = jax.vmap(is_held_out, (0, None))(rows, 0)
        np.testing.assert_array_equal(sides, side)
    assert not {*map(tuple, train)} & {*map(tuple, held_out)}


@pytest.mark.parametrize("held_out", [None, False, True])
def test_all_sets_of_a_side_are_equally_likely(held_out):
    tasks = Episodes((Part((1, 3, 4, 6, 7, 9), 3), Part((0, 2), 1)), held_out, seed=5)
    every = [
        (*first, second)
        for first in itertools.combinations((1, 3, 4, 6, 7, 9), 3)
        for second in (0, 2)
    ]
    if held_out is not None:
        every = [row for row in every if is_held_out(jnp.array(row), 5) == held_out]
    assert len(every) > 1
    rows, counts = np.unique(drawn_rows(tasks, 20_000), axis=0, return_counts=True)
    assert {*map(tuple, rows.tolist())} == set(every)
    expected = 20_000 / len(every)
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_the_side_of_a_set_is_its_own_in_any_order_and_a_fifth_is_held_out():
    tasks = Episodes((Part(tuple(range(1000)), 5),))
    rows = drawn_rows(tasks, 5000)
    side = np.asarray(jax.vmap(is_held_out, (0, None))(rows, 0))
    again = jax.vmap(is_held_out, (0, None))(rows[:, ::-1], 0)
    np.testing.assert_array_equal(side, again)
    assert abs(side.mean() - HELD_OUT_FRACTION) < 4 * np.sqrt(0.16 / 5000)
    other = np.asarray(jax.vmap(is_held_out, (0, None))(rows, 1))
    assert abs((side & other).mean() - HELD_OUT_FRACTION**2) < 4 * np.sqrt(0.04 / 5000)


def test_a_draw_is_the_same_alone_and_in_a_batch():
    tasks = n_way_tables(62)["held_out"]
    rows = drawn_rows(tasks, 16)
    keys = jax.random.split(jax.random.key(0), 16)
    for row, key in zip(rows, keys, strict=True):
        np.testing.assert_array_equal(row, tasks.draw(key)[0])


def test_held_out_classes_are_drawn_where_they_cannot_be_listed():
    seen, unseen = map(np.array, split_classes(100, seed=1))
    tables = n_way_tables(100, holdout="classes", seed=1)
    train, held_out = (drawn_rows(tables[split]) for split in ("train", "held_out"))
    assert set(train.ravel().tolist()) == set(seen.tolist())
    assert set(held_out.ravel().tolist()) == set(unseen.tolist())


def test_few_new_classes_are_all_in_every_task():
    seen, unseen = split_classes(40, seed=0)
    tables = n_way_tables(40, way=20, holdout="classes")
    rows = drawn_rows(tables["held_out"])
    np.testing.assert_array_equal(rows[:, :12], [unseen] * len(rows))
    assert set(rows[:, 12:].ravel().tolist()) == set(seen)
