import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.data.images import ImageSet
from lohp_jax.networks.classifiers import make_network
from lohp_jax.tasks.images import image_family
from lohp_jax.tasks.n_way import n_way_tables
from lohp_jax.tasks.support import (
    ImageSupport,
    SetSupport,
    canonical_order,
    name_canonically,
    relabel,
    support_of,
)
from lohp_jax.types import TaskFamily

NUM_CLASSES, SHAPE = 3, (2, 2, 1)
LABELS = np.array([2, 0, 1, 0, 2, 0], np.int32)
RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(size=(len(LABELS), *SHAPE)).astype(np.float32)
CONTEXT = {"x": IMAGES, "y": LABELS}
SUPPORT = ImageSupport(NUM_CLASSES, SHAPE)
CLASS_MEANS = np.stack(
    [np.float64(IMAGES[np.equal(LABELS, c)]).mean(axis=0).ravel() for c in range(NUM_CLASSES)]
)


def test_the_inputs_of_a_label_are_its_mean_image():
    np.testing.assert_allclose(SUPPORT.inputs(CONTEXT), CLASS_MEANS, rtol=1e-5)
    np.testing.assert_allclose(SUPPORT.describe(CONTEXT), CLASS_MEANS, rtol=1e-5)


def test_a_label_without_examples_has_a_mean_of_zero():
    means = SUPPORT.inputs(CONTEXT | {"y": np.minimum(LABELS, 1)})
    np.testing.assert_array_equal(means[2], np.zeros(4))
    assert np.isfinite(means).all()


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 0, 2], [2, 1, 0]])
def test_the_canonical_order_depends_on_the_examples_alone(order):
    """Whatever labels are called before, they are called the same after; `rank` says what."""
    ordered, rank = SUPPORT.order(CONTEXT)
    assert sorted(rank.tolist()) == [0, 1, 2]
    np.testing.assert_array_equal(ordered["y"], rank[LABELS])
    renamed = CONTEXT | {"y": np.array(order)[LABELS]}
    again, new_rank = SUPPORT.order(renamed)
    np.testing.assert_array_equal(again["y"], ordered["y"])
    np.testing.assert_array_equal(new_rank[np.array(order)], rank)
    np.testing.assert_array_equal(again["x"], IMAGES)


def test_without_class_axes_labels_keep_their_order():
    family = TaskFamily(None, None, None, None, None)
    context, rank = canonical_order(family, CONTEXT)
    assert context is CONTEXT and rank is None


def test_relabel_takes_the_weights_of_label_order_c_to_label_c():
    params = {"head": {"w": np.arange(6.0).reshape(2, 3), "b": np.arange(3.0)}, "body": np.ones(3)}
    class_axes = {"head": {"w": 1, "b": 0}, "body": -1}
    order = np.array([2, 0, 1])
    actual = relabel(params, class_axes, order)
    for c in range(NUM_CLASSES):
        np.testing.assert_array_equal(actual["head"]["w"][:, c], params["head"]["w"][:, order[c]])
        assert actual["head"]["b"][c] == params["head"]["b"][order[c]]
    assert actual["body"] is params["body"]
    assert relabel(params, None, order) is params


@pytest.mark.parametrize("name", ["linear", "mlp", "conv"])
def test_a_relabelled_network_answers_the_relabelled_task(name):
    """What was label `order[c]` is called c: right answers stay right, wrong ones wrong."""
    network = make_network(name, SHAPE, NUM_CLASSES)
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), shapes)
    order = np.array([2, 0, 1])
    renamed = np.argsort(order)[LABELS]

    def correct(params, labels):
        return jnp.argmax(network.apply(params, IMAGES), axis=-1) == labels

    before, after = correct(params, LABELS), relabel(params, network.class_axes, order)
    np.testing.assert_array_equal(correct(after, renamed), before)
    assert not (correct(params, renamed) == before).all()


def test_a_task_named_canonically_has_one_name():
    pools = np.random.default_rng(0).uniform(size=(5, 6, *SHAPE)).astype(np.float32)
    images = ImageSet(pools[:, :4], pools[:, 4:], "random")
    tables = n_way_tables(5, way=NUM_CLASSES)
    family = image_family("tiny", images, tables, network="linear", shots=2)
    data, key = family.sample(jax.random.key(0)), jax.random.key(1)
    named = name_canonically(family, data, key)
    assert set(named["labels"].tolist()) == {0, 1, 2}
    for order in ([2, 0, 1], [1, 0, 2]):
        other = family.rename(data, jnp.array(order))
        assert (other["labels"] != data["labels"]).any()
        again = name_canonically(family, other, key)
        np.testing.assert_array_equal(again["labels"], named["labels"])


# --- the generic reading

POINTS = {
    "x": RNG.normal(2, 3, size=(7, 2)).astype(np.float32),
    "y": RNG.normal(-1, 2, size=(7, 1)).astype(np.float32),
}
BOTH = POINTS | {"task": {"level": np.float32(0.5), "code": np.float32([3, -4])}}
LABELLED = {"x": IMAGES, "y": LABELS, "weight": RNG.normal(size=6).astype(np.float32)}
CONTEXTS = {
    "points": (POINTS, 0),
    "points and a task": (BOTH, 0),
    "labels": (LABELLED, NUM_CLASSES),
    "labels and a task": (LABELLED | {"task": np.float32([1, 2])}, NUM_CLASSES),
    "a vector": (np.float32([1, -2, 3]), 0),
    "entries of no set": ([np.float32([1, 2]), (np.int32(4), np.bool_(True))], 0),
}
each_context = pytest.mark.parametrize("context, num_classes", CONTEXTS.values(), ids=CONTEXTS)


def random_like(tree):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.float32(rng.normal(0, 0.3, size=p.shape)), tree)


def with_tasks(context, count=8, seed=3):
    """Similar contexts of `count` tasks, leading axis R."""
    rng = np.random.default_rng(seed)

    def vary(leaf):
        leaf = np.asarray(leaf)
        if leaf.dtype.kind != "f":
            return np.stack([leaf] * count)
        noise = rng.normal(size=(count, *leaf.shape))
        return (leaf + noise).astype(np.float32)

    return jax.tree.map(vary, context)


def shuffled(context, support, seed=0):
    """The same examples in another order."""
    names = support._names()
    if not names:
        return context
    order = np.random.default_rng(seed).permutation(len(context["x"]))
    return {n: leaf[order] if n in names else leaf for n, leaf in context.items()}


def read(support, context):
    return jax.tree.map(np.asarray, support.read(context))


def test_examples_are_what_has_the_leading_axis_of_x():
    reading = read(SetSupport(BOTH), BOTH)
    assert reading.images is None
    np.testing.assert_array_equal(
        reading.features, np.concatenate([POINTS["x"], POINTS["y"]], axis=1)
    )
    np.testing.assert_array_equal(reading.member, np.ones((7, 1)))
    np.testing.assert_array_equal(reading.task, [3, -4, 0.5])  # "code" comes before "level"


def test_integers_are_labels_only_of_a_family_that_has_some():
    reading = read(SetSupport(LABELLED, NUM_CLASSES), LABELLED)
    np.testing.assert_array_equal(reading.member, np.eye(3)[LABELS])
    np.testing.assert_array_equal(reading.images, IMAGES)
    np.testing.assert_array_equal(reading.features, LABELLED["weight"][:, None])
    numbers = read(SetSupport(LABELLED, 0), LABELLED)
    np.testing.assert_array_equal(numbers.member, np.ones((6, 1)))
    np.testing.assert_array_equal(numbers.features[:, 1], LABELS)
    sequences = {"x": np.zeros((6, 2), np.float32), "y": np.stack([LABELS, LABELS], axis=1)}
    assert read(SetSupport(sequences, NUM_CLASSES), sequences).member.shape == (6, 1)


def test_a_context_that_is_no_set_describes_the_task():
    context, _ = CONTEXTS["entries of no set"]
    reading = read(SetSupport(context), context)
    np.testing.assert_array_equal(reading.task, [1, 2, 4, 1])
    assert reading.member.shape == (0, 1) and reading.features.shape == (0, 0)


@each_context
def test_the_order_of_the_examples_does_not_matter(context, num_classes):
    support = SetSupport(context, num_classes).measured_on(with_tasks(context))
    encoder = support.encode(4)
    params = random_like(jax.eval_shape(encoder.init, jax.random.key(0), context))
    seen = jax.jit(lambda context: (encoder.apply(params, context), support.describe(context)))
    for seed in range(2):
        other = shuffled(context, support, seed)
        for a, b in zip(seen(other), seen(context), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@each_context
def test_every_number_is_read_and_described(context, num_classes):
    """A generator could tell any two contexts apart, and so could retrieval."""
    support = SetSupport(context, num_classes)
    encoder = support.encode(4)
    params = random_like(jax.eval_shape(encoder.init, jax.random.key(0), context))
    seen = jax.jit(lambda context: (encoder.apply(params, context), support.describe(context)))
    leaves, tree = jax.tree.flatten(context)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(context)]
    for i, name in enumerate(names):
        if not np.issubdtype(leaves[i].dtype, np.floating):
            continue
        moved = tree.unflatten([*leaves[:i], leaves[i] + np.float32(0.7), *leaves[i + 1 :]])
        rows, described = (
            np.abs(a - b).max() for a, b in zip(seen(moved), seen(context), strict=True)
        )
        assert rows > 1e-3, name
        assert described > 1e-3 or name == "['weight']"  # labels are described by x alone


def test_permuting_the_labels_permutes_the_rows():
    support, order = SetSupport(LABELLED, NUM_CLASSES), np.array([2, 0, 1])
    encoder = support.encode(4)
    params = random_like(jax.eval_shape(encoder.init, jax.random.key(0), LABELLED))
    renamed = LABELLED | {"y": order[LABELS]}
    encode = jax.jit(lambda context: encoder.apply(params, context))
    for rows in (encode, support.describe, support.inputs):
        assert len(rows(LABELLED)) == NUM_CLASSES
        np.testing.assert_allclose(rows(renamed)[order], rows(LABELLED), rtol=1e-4, atol=1e-5)


@each_context
def test_units_make_the_reading_the_same_in_other_units(context, num_classes):
    """Each number scaled and shifted by amounts of its own: pixels of 255, prices, degrees."""
    rng = np.random.default_rng(5)

    def change(leaf):
        leaf = np.asarray(leaf)
        if leaf.dtype.kind != "f":
            return leaf, leaf
        scale, offset = rng.uniform(10, 255, (2, *leaf.shape[1:])) if leaf.ndim else (30.0, 7.0)
        return np.float32(scale), np.float32(offset)

    changes = jax.tree.map(change, context)

    def converted(tree):
        def convert(leaf, pair):
            leaf = np.asarray(leaf)
            return np.float32(leaf * pair[0] + pair[1]) if leaf.dtype.kind == "f" else leaf

        return jax.tree.map(convert, tree, changes)

    contexts = with_tasks(context)
    before = SetSupport(context, num_classes).measured_on(contexts)
    after = SetSupport(context, num_classes).measured_on(converted(contexts))
    for a, b in zip(
        jax.tree.leaves(before.read(context)),
        jax.tree.leaves(after.read(converted(context))),
        strict=True,
    ):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-3)


def test_in_its_units_a_reading_has_mean_0_and_deviation_1():
    contexts = with_tasks(BOTH, count=50)
    support = SetSupport(BOTH).measured_on(contexts)
    readings = jax.vmap(support.read)(contexts)
    for values in (np.asarray(readings.features).reshape(-1, 3), np.asarray(readings.task)):
        np.testing.assert_allclose(values.mean(axis=0), 0, atol=1e-4)
        np.testing.assert_allclose(values.std(axis=0), 1, rtol=1e-4)


def test_what_never_varies_is_left_at_its_size():
    context = {"x": np.full((4, 1), 3, np.float32), "y": np.zeros((4, 1), np.float32)}
    contexts = jax.tree.map(lambda leaf: np.stack([leaf] * 3), context)
    reading = read(SetSupport(context).measured_on(contexts), context)
    np.testing.assert_array_equal(reading.features, np.zeros((4, 2)))


def test_only_labels_have_an_order_and_inputs():
    assert SetSupport(POINTS).order is None and SetSupport(POINTS).inputs is None
    assert SetSupport(LABELLED, NUM_CLASSES).order is not None
    ordered, rank = SetSupport(LABELLED, NUM_CLASSES).order(LABELLED)
    np.testing.assert_array_equal(ordered["weight"], LABELLED["weight"])
    np.testing.assert_array_equal(ordered["y"], rank[LABELS])


def test_the_description_of_a_regression_is_affine_in_y():
    """Of the means of y and of its products with features of x: one row, zeros for y = 0."""
    support = SetSupport(POINTS)
    at = {size: support.describe(POINTS | {"y": size * POINTS["y"]}) for size in (0, 1, 2)}
    assert at[1].shape == (1, 2 + 2 * 64)
    assert at[1][0, 0] == 1 and at[1][0, 1] == pytest.approx(POINTS["y"].mean(), rel=1e-5)
    np.testing.assert_allclose(at[2] - at[0], 2 * (at[1] - at[0]), rtol=1e-4, atol=1e-5)
    assert np.abs(at[1] - at[0])[0, 2:].max() > 0.1


# --- the reading of a family


def family_with(context, **fields):
    return TaskFamily(
        sample=lambda key, split="train": jax.random.normal(key, (4, 1)),
        init=None,
        loss=None,
        evaluate=None,
        context=context,
        **fields,
    )


def scaled(data, key):
    return {"x": 10 + 5 * data, "y": jnp.full((4, 1), 3.0), "task": data.sum()}


def test_a_family_is_read_in_units_of_its_training_tasks():
    support = support_of(family_with(scaled))
    mean, std = support.units["x"]
    assert abs(mean.item() - 10) < 1.5 and abs(std.item() - 5) < 1
    assert support.units["y"][0].item() == 3 and support.units["y"][1].item() == 1
    assert support_of(family_with(scaled, num_classes=4)).num_classes == 4


def test_the_reading_of_a_family_is_measured_once():
    calls = []

    def context(data, key):
        calls.append(0)
        return scaled(data, key)

    family = family_with(context)
    assert support_of(family) is support_of(family)
    assert len(calls) == 1


def test_units_are_constants_also_where_the_caller_is_traced():
    family = family_with(scaled)
    one = scaled(jnp.ones((4, 1)), None)
    traced = jax.jit(lambda context: support_of(family).read(context).features)(one)
    assert isinstance(support_of(family).units["x"][0], np.ndarray)
    np.testing.assert_allclose(traced, support_of(family).read(one).features, rtol=1e-5)


def test_a_family_may_bring_its_own_reading():
    own = SetSupport(POINTS)
    assert support_of(family_with(None, support=own)) is own


# --- contexts that cannot be read


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_a_good_context_passes(convert):
    context = {name: convert(x) for name, x in CONTEXT.items()}
    assert SUPPORT.check(context) is None


@each_context
def test_a_context_may_have_any_number_of_examples(context, num_classes):
    support = SetSupport(context, num_classes)
    assert support.check(context) is None
    names = support._names()
    if names:
        twice = {n: np.concatenate([x, x]) if n in names else x for n, x in context.items()}
        assert support.check(twice) is None


def with_value(value):
    images = IMAGES.copy()
    images[1, 0, 1] = value
    return images


LIKE_IMAGES = r"a context like \{'x': 'float32\[3, 2, 2, 1\]', 'y': 'int32\[3\]'\}"


@pytest.mark.parametrize(
    "context, message",
    [
        (IMAGES, rf"expected {LIKE_IMAGES}, got ndarray"),
        ({"x": IMAGES}, rf"expected {LIKE_IMAGES}, got \['x'\]"),
        (CONTEXT | {"z": IMAGES}, rf"expected {LIKE_IMAGES}, got \['x', 'y', 'z'\]"),
        (CONTEXT | {"x": IMAGES[0]}, r"expected x of shape \[n, 2, 2, 1\], got \[2, 2, 1\]"),
        (CONTEXT | {"x": IMAGES[:, :1]}, r"x of shape \[n, 2, 2, 1\], got \[6, 1, 2, 1\]"),
        (CONTEXT | {"y": LABELS[:4]}, "as many examples in y as in x, .* got 4 and 6"),
        (CONTEXT | {"y": LABELS[:, None]}, r"expected y of shape \[n\], got \[6, 1\]"),
        (CONTEXT | {"y": np.float32(LABELS)}, "expected integer y, got float32; convert it"),
        (CONTEXT | {"y": LABELS == 1}, "expected integer y, got bool; convert it"),
        (CONTEXT | {"x": np.uint8(IMAGES)}, "expected floating-point x, got uint8; convert it"),
        ({"x": IMAGES[:0], "y": LABELS[:0]}, "and one at least, got 0 and 0"),
        (CONTEXT | {"x": with_value(np.nan)}, "finite numbers in x, got 1 NaN and 0 infinite"),
        (CONTEXT | {"x": with_value(np.inf)}, "finite numbers in x, got 0 NaN and 1 infinite"),
        (CONTEXT | {"x": with_value(255.0)}, r"images in \[0, 1\], .* to 255.0; divide"),
        (CONTEXT | {"x": with_value(-1.0)}, r"images in \[0, 1\], got values from -1.0"),
        (CONTEXT | {"y": np.minimum(LABELS, 1)}, r"missing \[2\], unknown \[\]"),
        (CONTEXT | {"y": LABELS + 1}, r"every label 0..2 .* missing \[0\], unknown \[3\]"),
        (CONTEXT | {"y": LABELS - 1}, r"missing \[2\], unknown \[-1\]"),
        (
            CONTEXT | {"x": IMAGES.astype(">f4")},
            r"expected x in the byte order of this machine, got >f4; .*`x.astype\('float32'\)`",
        ),
        (CONTEXT | {"y": LABELS.astype(">i8")}, r"byte order .* >i8; .*`y.astype\('int64'\)`"),
    ],
)
def test_a_bad_context_says_what_came(context, message):
    with pytest.raises(ValueError, match=f"generate: .*{message}"):
        SUPPORT.check(context)


@pytest.mark.parametrize(
    "like, context, message",
    [
        (BOTH, POINTS, r"expected a context like \{'task': .*, got \['x', 'y'\]"),
        (BOTH, list(POINTS.values()), "expected a context like .*, got list"),
        (
            BOTH,
            BOTH | {"task": BOTH["task"] | {"code": np.float32([1, 2, 3])}},
            r"expected task.code of shape \[2\], got \[3\]",
        ),
        (
            BOTH,
            BOTH | {"task": BOTH["task"] | {"level": np.float32(np.nan)}},
            "finite numbers in task.level, got 1 NaN",
        ),
        (
            POINTS,
            POINTS | {"y": np.full_like(POINTS["y"], np.inf)},
            "finite numbers in y, got 0 NaN and 7 infinite",
        ),
        (POINTS, POINTS | {"y": POINTS["y"][:3]}, "as many examples in y as in x, .* 3 and 7"),
        (POINTS, POINTS | {"x": POINTS["x"][:, 0]}, r"x of shape \[n, 2\], got \[7\]"),
        (np.float32([1, 2]), np.float32([1]), r"the context of shape \[2\], got \[1\]"),
        (np.array([True]), np.array([1]), "expected boolean the context, got int64"),
    ],
)
def test_a_bad_context_of_any_family_says_what_came(like, context, message):
    with pytest.raises(ValueError, match=f"generate: .*{message}"):
        SetSupport(like).check(context)


def test_any_number_is_allowed_where_x_is_no_image():
    context = {"x": 255 * IMAGES.reshape(6, 4), "y": LABELS}
    assert SetSupport(context, NUM_CLASSES).check(context) is None
    with pytest.raises(ValueError, match=r"missing \[2\]"):
        SetSupport(context, NUM_CLASSES).check(context | {"y": np.minimum(LABELS, 1)})
