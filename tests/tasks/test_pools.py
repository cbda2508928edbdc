import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.tasks.pools import DealtPool

NUM_EXAMPLES, NUM_QUERY = 7, 3
PIXELS = np.random.default_rng(0).integers(0, 256, (5, NUM_EXAMPLES, 4, 4, 2), np.uint8)
CLASSES = jnp.array([9, 2, 16])


def dealt(pool, seed=0):
    data = {"classes": CLASSES, "labels": jnp.array([1, 2, 0])}
    return data | pool.deal(jax.random.key(seed), CLASSES)


@pytest.mark.parametrize("rotations", [1, 4])
def test_each_class_is_cut_in_training_and_query_examples(rotations):
    pixels = np.repeat(PIXELS, 4 // rotations, axis=0)
    pool = DealtPool(pixels, NUM_QUERY, rotations)
    assert pool.num_classes == 20 and pool.num_train == 4 and pool.example_shape == (4, 4, 2)
    data = dealt(pool)
    training, train_labels = pool.training(data, jnp.arange(3 * 4))
    queries, query_labels = pool.queries(data, jnp.arange(3 * NUM_QUERY))
    np.testing.assert_array_equal(train_labels, np.repeat([1, 2, 0], 4))
    np.testing.assert_array_equal(query_labels, np.repeat([1, 2, 0], NUM_QUERY))
    assert training.dtype == jnp.float32
    for i, c in enumerate((9, 2, 16)):
        seen = np.array([*training[4 * i : 4 * i + 4], *queries[3 * i : 3 * i + 3]])
        assert seen.max() <= 1
        turn = c % 4 if rotations == 4 else 0
        expected = {np.rot90(image, turn).tobytes() for image in PIXELS[c // 4]}
        assert {image.tobytes() for image in np.rint(255 * seen).astype(np.uint8)} == expected


def test_every_key_deals_each_class_its_own_order():
    pool = DealtPool(PIXELS, NUM_QUERY, 4)
    orders = [np.asarray(dealt(pool, seed)["order"]) for seed in range(20)]
    rows = np.concatenate(orders)
    np.testing.assert_array_equal(np.sort(rows, axis=1), [range(NUM_EXAMPLES)] * len(rows))
    assert len({tuple(row) for row in rows.tolist()}) > 50


def test_numbers_are_looked_up_as_they_are():
    features = np.random.default_rng(1).normal(size=(20, NUM_EXAMPLES, 6)).astype(np.float32)
    pool = DealtPool(features, NUM_QUERY)
    found = pool.look_up(jnp.array([3, 4]), jnp.array([0, 6]))
    np.testing.assert_array_equal(found, [features[3, 0], features[4, 6]])


def test_all_functions_under_jit_and_vmap_equal_a_loop():
    pool = DealtPool(PIXELS, NUM_QUERY, 4)

    def both(key):
        data = {"classes": CLASSES, "labels": CLASSES} | pool.deal(key, CLASSES)
        return pool.training(data, jnp.arange(12)), pool.queries(data, jnp.arange(9))

    keys = jax.random.split(jax.random.key(0), 3)
    batch = jax.jit(jax.vmap(both))(keys)
    for i, key in enumerate(keys):
        jax.tree.map(lambda b, one, i=i: np.testing.assert_array_equal(b[i], one), batch, both(key))
