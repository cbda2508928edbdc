import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.data.images import ImageSet
from lohp_jax.tasks.images import image_family
from lohp_jax.tasks.n_way import n_way_tables
from lohp_jax.tasks.partitions import partition_tables

NUM_CLASSES, NUM_TRAIN, NUM_QUERY, SHAPE = 5, 6, 4, (3, 2, 1)
SHOTS = 2
TABLES = {
    "n_way": n_way_tables(NUM_CLASSES, way=3),
    "partitions": partition_tables(NUM_CLASSES),
}
both_kinds = pytest.mark.parametrize("kind", TABLES)
both_regimes = pytest.mark.parametrize("teacher_data", ["full", "support"])


def image_set():
    """Images that all differ."""
    pools = np.random.default_rng(0).uniform(size=(NUM_CLASSES, NUM_TRAIN + NUM_QUERY, *SHAPE))
    pools = pools.astype(np.float32)
    return ImageSet(pools[:, :NUM_TRAIN], pools[:, NUM_TRAIN:], "random")


def make(kind="n_way", images=None, *, network="linear", shots=SHOTS, **options):
    images = images or image_set()
    return image_family("tiny", images, TABLES[kind], network=network, shots=shots, **options)


def random_weights(family, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
        jax.eval_shape(family.init, jax.random.key(0)),
    )


def sampled(family, seed=0, split="train"):
    return family.sample(jax.random.key(seed), split)


def log_prob_oracle(params, image):
    """`[labels]` log-probabilities of the linear network, in float64."""
    logits = np.float64(image).ravel() @ np.float64(params["head"]["w"]) + params["head"]["b"]
    return logits - np.log(np.sum(np.exp(logits)))


def losses_oracle(params, pool, data):
    """Cross-entropy of each image of a task, class by class."""
    return [
        -log_prob_oracle(params, image)[label]
        for c, label in zip(data["classes"], data["labels"], strict=True)
        for image in pool[c]
    ]


def context_loss_oracle(params, context):
    pairs = zip(context["x"], context["y"], strict=True)
    return np.mean([-log_prob_oracle(params, image)[label] for image, label in pairs])


def identify(batch):
    """(class, number) of images in the train pool of `image_set`; KeyError for others."""
    pool = image_set().train
    known = {pool[where].tobytes(): where for where in np.ndindex(pool.shape[:2])}
    return [known[image.tobytes()] for image in np.asarray(batch)]


def row_of(table, data):
    """Number of the row whose labels the task renames, one to one."""
    labels = data["labels"].tolist()
    matches = [
        row
        for row in np.flatnonzero((table.classes == data["classes"]).all(1))
        if len({*zip(table.labels[row].tolist(), labels, strict=True)}) == len({*labels})
    ]
    assert len(matches) == 1
    return matches[0]


@both_kinds
def test_samples_are_all_rows_of_the_split_under_all_names_of_the_labels(kind):
    family = make(kind)
    sample = jax.vmap(lambda key: {split: family.sample(key, split) for split in TABLES[kind]})
    data = jax.device_get(jax.jit(sample)(jax.random.split(jax.random.key(0), 1000)))
    for split, table in TABLES[kind].items():
        tasks = [{k: v[i] for k, v in data[split].items()} for i in range(1000)]
        assert {row_of(table, task) for task in tasks} == set(range(len(table.classes)))
        names = {tuple(task["labels"]) for task in tasks}
        distinct = {tuple(labels) for labels in table.labels.tolist()}
        assert len(names) == math.factorial(family.num_classes) * len(distinct)


def test_sample_rejects_an_unknown_split():
    with pytest.raises(ValueError, match=r"sample: split .*'held_out', 'train'.* got 'test'"):
        make().sample(jax.random.key(0), "test")


@both_kinds
@both_regimes
def test_context_holds_distinct_training_images_of_each_label(kind, teacher_data):
    family = make(kind, teacher_data=teacher_data)
    for seed in range(5):
        data = sampled(family, seed)
        context = family.context(data, jax.random.key(100 + seed))
        assert set(context) == {"x", "y"}
        expected = np.repeat(np.arange(family.num_classes), SHOTS)
        np.testing.assert_array_equal(context["y"], expected)
        where = identify(context["x"])
        assert len(set(where)) == family.num_classes * SHOTS
        label_of = dict(zip(data["classes"].tolist(), data["labels"].tolist(), strict=True))
        np.testing.assert_array_equal([label_of[c] for c, _ in where], expected)


@both_kinds
def test_support_of_as_many_shots_as_images_takes_all_of_a_class(kind):
    family = make(kind, shots=NUM_TRAIN)
    data = sampled(family)
    where = identify(family.context(data, jax.random.key(0))["x"])
    assert len(set(where)) == family.num_classes * NUM_TRAIN


@both_kinds
def test_with_full_data_every_key_draws_a_support_from_all_images(kind):
    family = make(kind)
    data = sampled(family)
    keys = jax.random.split(jax.random.key(0), 200)
    contexts = jax.jit(jax.vmap(family.context, (None, 0)))(data, keys)
    supports = [frozenset(identify(images)) for images in contexts["x"]]
    assert len(set(supports)) > 20
    every = {(c, n) for c in data["classes"].tolist() for n in range(NUM_TRAIN)}
    assert frozenset().union(*supports) == every


@both_kinds
def test_a_dealt_support_is_all_that_loss_and_context_see(kind):
    family = make(kind, teacher_data="support")
    params, data = random_weights(family), sampled(family)
    first, second = jax.random.split(jax.random.key(1))
    context = family.context(data, first)
    chex.assert_trees_all_equal(family.context(data, second), context)
    expected = context_loss_oracle(params, context)
    for key in (first, second):
        np.testing.assert_allclose(family.loss(params, data, key), expected, rtol=1e-5)


@both_kinds
def test_every_task_is_dealt_a_support_of_its_own(kind):
    family = make(kind, teacher_data="support")
    keys = jax.random.split(jax.random.key(0), 20)
    data = jax.jit(jax.vmap(family.sample))(keys)
    assert len({tuple(support) for support in data["support"].tolist()}) > 10


@both_kinds
def test_loss_is_the_mean_over_all_training_images_of_the_task(kind):
    family = make(kind)
    params, data = random_weights(family), sampled(family)
    expected = np.mean(losses_oracle(params, image_set().train, data))
    for seed in range(2):
        actual = family.loss(params, data, jax.random.key(seed))
        np.testing.assert_allclose(actual, expected, rtol=1e-5)


@both_kinds
def test_context_loss_is_the_mean_over_the_context(kind):
    family = make(kind)
    params, data = random_weights(family), sampled(family)
    context = family.context(data, jax.random.key(3))
    expected = context_loss_oracle(params, context)
    np.testing.assert_allclose(family.context_loss(params, context), expected, rtol=1e-5)


@both_regimes
def test_a_batch_is_drawn_by_key_from_what_the_teacher_sees(teacher_data):
    family = make(teacher_data=teacher_data, batch_size=1)
    params, data = random_weights(family), sampled(family)
    keys = jax.random.split(jax.random.key(0), 400)
    drawn = jax.jit(jax.vmap(family.loss, (None, None, 0)))(params, data, keys)
    losses = np.array(losses_oracle(params, image_set().train, data))
    seen = losses if teacher_data == "full" else losses[np.asarray(data["support"])]
    nearest = np.abs(np.asarray(drawn)[:, None] - seen).argmin(1)
    np.testing.assert_allclose(drawn, seen[nearest], rtol=1e-4)
    assert set(nearest) == set(range(len(seen)))


@both_regimes
def test_a_batch_as_large_as_the_data_is_all_of_it(teacher_data):
    whole = make(teacher_data=teacher_data)
    params, data, key = random_weights(whole), sampled(whole), jax.random.key(1)
    family = make(teacher_data=teacher_data, batch_size=3 * NUM_TRAIN)
    np.testing.assert_array_equal(family.loss(params, data, key), whole.loss(params, data, key))


@both_kinds
def test_evaluate_scores_all_query_images_of_the_task(kind):
    family = make(kind)
    params, data = random_weights(family), sampled(family, split="held_out")
    scores = family.evaluate(params, data)
    pool = image_set().query
    np.testing.assert_allclose(
        scores["loss"], np.mean(losses_oracle(params, pool, data)), rtol=1e-5
    )
    hits = [
        log_prob_oracle(params, image).argmax() == label
        for c, label in zip(data["classes"], data["labels"], strict=True)
        for image in pool[c]
    ]
    np.testing.assert_allclose(scores["accuracy"], np.mean(hits), rtol=1e-6)
    assert 0 < scores["accuracy"] < 1


@both_kinds
@both_regimes
def test_query_images_are_seen_by_evaluate_alone(kind, teacher_data):
    images = image_set()
    family = make(kind, images, teacher_data=teacher_data)
    no_query = make(
        kind, images._replace(query=np.full_like(images.query, np.nan)), teacher_data=teacher_data
    )
    no_train = make(
        kind, images._replace(train=np.full_like(images.train, np.nan)), teacher_data=teacher_data
    )
    params, key = random_weights(family), jax.random.key(4)
    data = sampled(family)
    for other in (no_query, no_train):
        chex.assert_trees_all_equal(sampled(other), data)
    chex.assert_trees_all_equal(no_query.context(data, key), family.context(data, key))
    assert no_query.loss(params, data, key) == family.loss(params, data, key)
    assert np.isnan(no_query.evaluate(params, data)["loss"])
    chex.assert_trees_all_equal(no_train.evaluate(params, data), family.evaluate(params, data))
    assert np.isnan(no_train.loss(params, data, key))


@both_kinds
@pytest.mark.parametrize("network", ["linear", "mlp", "conv"])
def test_renaming_the_labels_permutes_the_class_axes(kind, network):
    family = make(kind, network=network)
    params, data, key = random_weights(family), sampled(family), jax.random.key(5)
    order = np.roll(np.arange(family.num_classes), 1)  # the new label l was order[l] before
    renamed = data | {"labels": jnp.argsort(order)[data["labels"]]}
    permuted = jax.tree.map(
        lambda leaf, axis: leaf if axis < 0 else np.take(leaf, order, axis),
        params,
        family.class_axes,
    )
    np.testing.assert_allclose(
        family.loss(permuted, renamed, key), family.loss(params, data, key), rtol=1e-5
    )
    chex.assert_trees_all_close(
        family.evaluate(permuted, renamed), family.evaluate(params, data), rtol=1e-5
    )
    before, after = family.context(data, key), family.context(renamed, key)
    blocks = before["x"].reshape(-1, SHOTS, *SHAPE)
    np.testing.assert_array_equal(after["x"].reshape(blocks.shape), blocks[order, :])
    np.testing.assert_array_equal(after["y"], before["y"])


@both_regimes
def test_all_functions_under_jit_and_vmap_equal_a_loop(teacher_data):
    family = make(network="mlp", teacher_data=teacher_data, batch_size=2)

    def everything(key):
        data_key, init_key, loss_key, context_key = jax.random.split(key, 4)
        data, params = family.sample(data_key), family.init(init_key)
        context = family.context(data, context_key)
        return {
            "data": data,
            "params": params,
            "context": context,
            "loss": family.loss(params, data, loss_key),
            "context_loss": family.context_loss(params, context),
            "scores": family.evaluate(params, data),
        }

    keys = jax.random.split(jax.random.key(0), 3)
    batch = jax.jit(jax.vmap(everything))(keys)
    for i, key in enumerate(keys):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], batch)
        chex.assert_trees_all_close(one, everything(key), rtol=1e-5, atol=1e-6)


def test_the_family_says_its_name_and_number_of_labels():
    assert (make("n_way").name, make("n_way").num_classes) == ("tiny", 3)
    assert make("partitions").num_classes == 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"teacher_data": "all"}, r"teacher_data must be one of \('full', 'support'\), got 'all'"),
        ({"shots": 0}, "shots must be between 1 and 6, .* got 0"),
        ({"shots": 7}, "shots must be between 1 and 6, .* got 7"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_image_family_rejects(options, message):
    with pytest.raises(ValueError, match=f"image_family: {message}"):
        make(**options)
