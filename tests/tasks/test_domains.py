import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.data import DomainSet
from lohp_jax.tasks import domains as domains_module
from lohp_jax.tasks import make_family
from lohp_jax.tasks.domains import domain_family
from lohp_jax.tasks.door import describe_family

NAMES, NUM_CLASSES, NUM_TRAIN, NUM_QUERY, SHAPE = ("a", "b", "c", "d"), 3, 5, 4, (2, 2, 1)
HELD_OUT, SHOTS = 2, 2
KEYS = jax.random.split(jax.random.key(0), 50)
both_splits = pytest.mark.parametrize("split", ["train", "held_out"])
both_regimes = pytest.mark.parametrize("teacher_data", ["full", "support"])


def domain_set():
    """Images that all differ."""
    rng = np.random.default_rng(0)
    sizes = (len(NAMES), NUM_CLASSES), (NUM_TRAIN, NUM_QUERY)
    pools = [rng.uniform(size=(*sizes[0], n, *SHAPE)).astype(np.float32) for n in sizes[1]]
    return DomainSet(*pools, NAMES, "random")


def make(domains=None, **options):
    options = {"network": "linear", "shots": SHOTS} | options
    return domain_family(domains or domain_set(), NAMES[HELD_OUT], **options)


def random_weights(family):
    rng = np.random.default_rng(1)
    like = jax.eval_shape(family.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), like)


def log_prob_oracle(params, image):
    """`[classes]` log-probabilities of the linear network, in float64."""
    logits = np.float64(image).ravel() @ np.float64(params["head"]["w"]) + params["head"]["b"]
    return logits - np.log(np.sum(np.exp(logits)))


def images_of(pool, numbers):
    """(class, image) pairs of the numbers `[classes, n]` of a task."""
    per_class = pool.shape[2]
    return [
        (c, pool[number // per_class, c, number % per_class])
        for c, row in enumerate(np.asarray(numbers))
        for number in row
    ]


def spoilt(pools, domains):
    """The set with NaN in place of the images of some domains in some pools."""
    source = domain_set()
    changed = {}
    for name in pools:
        pool = getattr(source, name).copy()
        pool[list(domains)] = np.nan
        changed[name] = pool
    return source._replace(**changed)


def everything(family, split, key):
    data_key, loss_key, context_key = jax.random.split(key, 3)
    data, params = family.sample(data_key, split), random_weights(family)
    context = family.context(data, context_key)
    return {
        "data": data,
        "loss": family.loss(params, data, loss_key),
        "context": context,
        "context_loss": family.context_loss(params, context),
        "evaluate": family.evaluate(params, data),
    }


@both_regimes
@pytest.mark.parametrize(
    "split, others",
    [("train", (HELD_OUT,)), ("held_out", (0, 1, 3))],
    ids=["train", "held_out"],
)
def test_no_task_of_a_split_sees_a_domain_of_the_other(split, others, teacher_data):
    family, clean = (
        make(domains, teacher_data=teacher_data)
        for domains in (spoilt(("train", "query"), others), None)
    )
    for key in KEYS[:5]:
        found = everything(family, split, key)
        chex.assert_tree_all_finite(found)
        chex.assert_trees_all_equal(found, everything(clean, split, key))


@both_splits
def test_query_images_are_seen_by_evaluate_alone(split):
    every = range(len(NAMES))
    no_query = everything(make(spoilt(("query",), every)), split, KEYS[0])
    assert np.isnan(no_query.pop("evaluate")["loss"])
    chex.assert_tree_all_finite(no_query)
    no_train = everything(make(spoilt(("train",), every)), split, KEYS[0])
    chex.assert_tree_all_finite(no_train["evaluate"])
    assert np.isnan(no_train["loss"]) and np.isnan(no_train["context_loss"])


def test_a_held_out_task_has_every_image_of_its_domain_once():
    family = make()
    for key in KEYS[:5]:
        data = family.sample(key, "held_out")
        for pool, size in (("train", NUM_TRAIN), ("query", NUM_QUERY)):
            expected = np.tile(HELD_OUT * size + np.arange(size), (NUM_CLASSES, 1))
            np.testing.assert_array_equal(np.sort(data[pool], axis=1), expected)


def test_training_tasks_mix_the_other_domains_without_repeating_an_image():
    family = make()
    data = jax.jit(jax.vmap(family.sample))(jax.random.split(jax.random.key(1), 400))
    numbers = np.sort(data["train"], axis=-1)
    assert (np.diff(numbers, axis=-1) > 0).all()
    domains = numbers // NUM_TRAIN
    shares = np.stack([(domains == d).mean(axis=(1, 2)) for d in range(len(NAMES))], axis=1)
    assert (shares[:, HELD_OUT] == 0).all()
    trained = np.delete(shares, HELD_OUT, axis=1)
    np.testing.assert_allclose(trained.mean(axis=0), 1 / 3, atol=0.06)
    assert 0.1 < (trained.max(axis=1) == 1).mean() < 0.9  # single domains, and mixtures
    of_query = np.asarray(data["query"]) // NUM_QUERY
    agree = [np.bincount(q.ravel(), minlength=4).argmax() for q in of_query]
    assert np.mean(np.array(agree) == shares.argmax(axis=1)) > 0.8  # the same mixture


def test_images_are_drawn_by_the_odds_of_their_domains():
    odds = np.array([0.6, 0.3, 0.0, 0.1])
    pool = np.zeros((4, 20_000, 1, 1, 1, 1))
    drawn = domains_module._draw(jax.random.key(0), jnp.log(odds), pool)
    shares = np.bincount(drawn.ravel(), minlength=4) / 20_000
    np.testing.assert_allclose(shares, odds, atol=4 * np.sqrt(0.25 / 20_000))
    assert shares[2] == 0


@both_splits
def test_losses_and_scores_equal_their_definitions(split):
    family, source = make(), domain_set()
    params, data = random_weights(family), family.sample(KEYS[3], split)

    def mean_loss(pairs):
        return np.mean([-log_prob_oracle(params, image)[c] for c, image in pairs])

    train = images_of(source.train, data["train"])
    query = images_of(source.query, data["query"])
    np.testing.assert_allclose(family.loss(params, data, KEYS[0]), mean_loss(train), rtol=1e-5)
    scores = family.evaluate(params, data)
    np.testing.assert_allclose(scores["loss"], mean_loss(query), rtol=1e-5)
    hits = [log_prob_oracle(params, image).argmax() == c for c, image in query]
    np.testing.assert_allclose(scores["accuracy"], np.mean(hits), rtol=1e-6)
    np.testing.assert_allclose(scores["chance"], 1 / NUM_CLASSES, rtol=1e-6)
    context = family.context(data, KEYS[1])
    pairs = list(zip(context["y"].tolist(), np.asarray(context["x"]), strict=True))
    np.testing.assert_allclose(family.context_loss(params, context), mean_loss(pairs), rtol=1e-5)


@both_regimes
def test_a_support_has_distinct_images_of_each_class_from_the_training_ones(teacher_data):
    family, source = make(teacher_data=teacher_data), domain_set()
    data = family.sample(KEYS[0])
    known = {image.tobytes(): c for c, image in images_of(source.train, data["train"])}
    seen = set()
    for key in KEYS:
        context = family.context(data, key)
        np.testing.assert_array_equal(context["y"], np.repeat(np.arange(NUM_CLASSES), SHOTS))
        images = [image.tobytes() for image in np.asarray(context["x"])]
        assert len(set(images)) == len(images)
        assert [known[image] for image in images] == context["y"].tolist()
        seen |= set(images)
    assert len(seen) == NUM_CLASSES * (NUM_TRAIN if teacher_data == "full" else SHOTS)


def test_a_dealt_support_is_all_that_loss_and_context_see():
    family = make(teacher_data="support")
    params, data = random_weights(family), family.sample(KEYS[0])
    context = family.context(data, KEYS[1])
    for key in KEYS[:2]:
        np.testing.assert_allclose(
            family.loss(params, data, key), family.context_loss(params, context), rtol=1e-6
        )


@both_regimes
def test_a_batch_is_drawn_by_key_from_what_the_teacher_sees(teacher_data):
    family = make(teacher_data=teacher_data, batch_size=1)
    params, data = random_weights(family), family.sample(KEYS[0])
    pairs = images_of(domain_set().train, data["train"])
    if teacher_data == "support":
        pairs = [pairs[i] for i in data["support"].tolist()]
    losses = np.array([-log_prob_oracle(params, image)[c] for c, image in pairs])
    keys = jax.random.split(jax.random.key(2), 200)
    drawn = jax.jit(jax.vmap(family.loss, (None, None, 0)))(params, data, keys)
    nearest = np.abs(np.asarray(drawn)[:, None] - losses).argmin(axis=1)
    np.testing.assert_allclose(drawn, losses[nearest], rtol=1e-4)
    assert set(nearest) == set(range(len(losses)))


def test_labels_may_be_kept_from_the_generator():
    family, labelled = make(labels=False), make()
    data = family.sample(KEYS[0])
    context = family.context(data, KEYS[1])
    assert list(context) == ["x"] and family.context_loss is None
    np.testing.assert_array_equal(context["x"], labelled.context(data, KEYS[1])["x"])
    described = describe_family(family)
    assert (described.measure, described.num_classes) == ("accuracy", NUM_CLASSES)


def test_labels_keep_their_names():
    family = make()
    assert family.num_classes == NUM_CLASSES
    assert family.class_axes is None and family.rename is None


def test_functions_under_jit_and_vmap_equal_a_loop():
    family = make(network="mlp", teacher_data="support", batch_size=2)
    for split in ("train", "held_out"):
        batch = jax.jit(jax.vmap(lambda key, split=split: everything(family, split, key)))(KEYS[:3])
        for i, key in enumerate(KEYS[:3]):
            one = jax.tree.map(lambda leaf, i=i: leaf[i], batch)
            chex.assert_trees_all_close(one, everything(family, split, key), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"teacher_data": "all"}, r"teacher_data must be one of \('full', 'support'\), got 'all'"),
        ({"shots": 0}, "shots must be between 1 and 5, .* got 0"),
        ({"shots": 6}, "shots must be between 1 and 5, .* got 6"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (
            {"domains": domain_set()._replace(train=np.zeros((4, 3, 5, 2, 2, 1), np.uint8))},
            "expected floating-point images in .* in train, got uint8",
        ),
    ],
)
def test_domain_family_rejects(options, message):
    with pytest.raises(ValueError, match=f"domain_family: {message}"):
        make(**options)


def test_a_domain_that_is_not_there_gets_the_nearest_name():
    source = domain_set()._replace(domains=("art_painting", "cartoon", "photo", "sketch"))
    with pytest.raises(
        ValueError, match=r"held_out must be .* got 'cartoons'; did you mean 'cartoon'"
    ):
        domain_family(source, "cartoons")


def test_a_single_domain_leaves_nothing_to_train_on():
    source = domain_set()
    alone = DomainSet(source.train[:1], source.query[:1], ("a",), "alone")
    with pytest.raises(ValueError, match=r"expected two or more domains, .* got \('a',\)"):
        domain_family(alone, "a")


def test_by_name_the_seed_picks_the_domain_unless_it_is_named():
    def held_out_images(**options):
        family = make_family("domains", network="linear", **options)
        assert (family.name, family.num_classes) == ("domains", 10)
        data = family.sample(jax.random.key(0), "held_out")
        return np.unique(np.asarray(data["train"]) // 16).tolist()

    assert held_out_images(seed=8) == [2]
    assert held_out_images(seed=8, domain="75") == [5]
