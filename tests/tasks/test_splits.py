import pytest

from lohp_jax.tasks.splits import split_classes


@pytest.mark.parametrize("num_classes, num_unseen", [(2, 1), (3, 1), (10, 3), (62, 18)])
def test_three_in_ten_classes_are_unseen(num_classes, num_unseen):
    seen, unseen = split_classes(num_classes, seed=0)
    assert len(unseen) == num_unseen
    assert sorted(seen + unseen) == list(range(num_classes))


def test_the_seed_alone_picks_the_classes():
    assert split_classes(10, seed=1) == split_classes(10, seed=1)
    assert len({split_classes(10, seed) for seed in range(20)}) > 10
