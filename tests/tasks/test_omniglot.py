import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax import data as readers
from lohp_jax.tasks import make_family
from lohp_jax.tasks.backbone import Backbone
from lohp_jax.tasks.door import describe_family
from lohp_jax.tasks.omniglot import omniglot_backbone, omniglot_family, split_characters

NUM, EACH, SIDE = 30, 8, 16
SIZES = {"num_train": 20, "num_query": 3, "filters": 2}
CHARACTERS = np.random.default_rng(0).integers(0, 256, (NUM, EACH, SIDE, SIDE, 1), np.uint8)


def mean_pixels(params, images):
    """Features that tell what they were computed of."""
    return params["scale"] * images.reshape(len(images), -1)[:, :6]


BACKBONE = Backbone(mean_pixels, {"scale": np.float32(2)}, (SIDE, SIDE, 1))


def test_the_standard_split_is_1200_characters_with_rotations_and_423_others():
    split = split_characters(1623)
    assert len(split.train) == 4 * 1200 and len(split.held_out) == 423
    train, held_out = ({c // 4 for c in classes} for classes in split)
    assert len(train) == 1200 and not train & held_out and len(train | held_out) == 1623
    assert all(c % 4 == 0 for c in split.held_out)
    turned = split_characters(1623, rotate_held_out=True)
    assert turned.train == split.train
    assert set(turned.held_out) == {4 * c + r for c in held_out for r in range(4)}


def test_the_seed_alone_picks_the_characters():
    first, again, other = (split_characters(50, num_train=30, seed=s) for s in (0, 0, 1))
    assert first == again != other


@pytest.fixture(scope="module", params=["images", "features"])
def family(request):
    heads = {"network": "linear", "backbone": BACKBONE}
    return omniglot_family(CHARACTERS, **SIZES, **(heads if request.param == "features" else {}))


def examples_of(family):
    """What each (character, number, turn) looks like in a context, as bytes."""
    found = {}
    for c, n, r in np.ndindex(NUM, EACH, 4):
        image = np.rot90(CHARACTERS[c, n], r).astype(np.float32) / 255
        example = image if family.support else mean_pixels(BACKBONE.params, image[None])[0]
        found[np.float32(np.round(example, 4)).tobytes()] = (c, n, r)
    return found


def test_support_and_query_are_disjoint_draws_of_the_examples_of_a_class(family):
    known = examples_of(family)
    split = split_characters(NUM, num_train=20)
    pools = family.sample.__self__.pools
    draw = jax.jit(lambda key, side: family.sample(key, side), static_argnums=1)
    dealt = set()
    for side, classes in (("train", split.train), ("held_out", split.held_out)):
        for seed in range(4):
            data = draw(jax.random.key(seed), side)
            context = family.context(data, jax.random.key(seed + 50))
            queries, labels = pools.queries(data, jnp.arange(15))
            support, query = (
                [known[np.float32(np.round(x, 4)).tobytes()] for x in np.asarray(xs)]
                for xs in (context["x"], queries)
            )
            np.testing.assert_array_equal(context["y"], range(5))
            assert len(set(support + query)) == 5 + 15
            for label, (c, _, r) in enumerate(support):
                assert 4 * c + r in classes
                own = np.flatnonzero(np.asarray(labels) == label)
                assert {(query[i][0], query[i][2]) for i in own} == {(c, r)}
                dealt |= {(query[i][1]) for i in own}
    assert dealt == set(range(EACH))


def test_the_family_fits_together(family):
    described = describe_family(family)
    assert described.num_classes == 5 and described.measure == "accuracy"
    shape = "16,16,1" if family.support else "6"
    assert described.context["['x']"] == f"float32[5,{shape}]"


def test_a_dealt_support_is_all_that_a_teacher_sees():
    family = omniglot_family(
        CHARACTERS, **SIZES, network="linear", backbone=BACKBONE, shots=2, teacher_data="support"
    )
    data = family.sample(jax.random.key(0))
    context = family.context(data, jax.random.key(1))
    weights = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    params = {"head": {"w": weights, "b": jnp.zeros(5)}}
    loss = family.loss(params, data, jax.random.key(2))
    np.testing.assert_allclose(loss, family.context_loss(params, context), rtol=1e-5)


def test_features_of_a_backbone_are_kept(tmp_path):
    options = {**SIZES, "network": "linear", "cache": tmp_path}
    omniglot_family(CHARACTERS, **options, backbone=BACKBONE)

    def never(params, images):
        raise AssertionError("computed again")

    again = Backbone(never, BACKBONE.params, BACKBONE.image_shape)
    omniglot_family(CHARACTERS, **options, backbone=again)
    other = Backbone(mean_pixels, {"scale": np.float32(3)}, BACKBONE.image_shape)
    with pytest.raises(ValueError, match=r"another backbone.*`rm "):
        omniglot_family(CHARACTERS, **options, backbone=other)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_train": 30}, "split_characters: num_train must be between 1 and 29.* got 30"),
        ({"num_train": 26}, r"omniglot_family: expected way=5 held-out classes .* got 4; ask"),
        ({"num_query": 8}, "omniglot: .* 8 in all .* got 1 and 8; ask for fewer"),
        ({"shots": 6}, "omniglot: .* got 6 and 3"),
        ({"shots": 0}, "omniglot: .* got 0 and 3"),
        ({"way": 1}, "n_way_tables: way must be at least 2, got 1"),
        ({"network": "conv_4"}, "make_network: .*did you mean 'conv4'"),
        ({"filters": 0}, "make_conv4: filters must be at least 1"),
        (
            {"backbone": Backbone(mean_pixels, {}, (28, 28, 1)), "network": "linear"},
            r"Backbone: expected images of shape \(28, 28, 1\).*got \(16, 16, 1\); .*image_size=28",
        ),
    ],
)
def test_omniglot_family_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        omniglot_family(CHARACTERS, **{**SIZES, **options})


def test_images_that_are_neither_bytes_nor_floats_are_refused():
    with pytest.raises(ValueError, match=r"bytes, or floats in .* got int32"):
        omniglot_family(CHARACTERS.astype(np.int32), **SIZES)


def test_images_that_cannot_be_turned_are_refused():
    with pytest.raises(ValueError, match=r"side, side.*got shape \[30, 8, 15, 16, 1\]"):
        omniglot_family(CHARACTERS[:, :, 1:], **SIZES)


def test_a_backbone_that_is_kept_is_read_again(tmp_path):
    options = {"num_train": 20, "filters": 2, "num_steps": 2, "way": 3}
    first = omniglot_backbone(CHARACTERS, tmp_path, **options)
    again = omniglot_backbone(CHARACTERS, tmp_path, **options)
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    with pytest.raises(ValueError, match=r"made with other arguments: key is .*`rm -r "):
        omniglot_backbone(CHARACTERS, tmp_path, seed=1, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"data": "digits"}, "'omniglot' is made of data='tfds:omniglot'.*got 'digits'"),
        ({"holdout": "tasks"}, "'omniglot' holds out whole classes, got holdout='tasks'"),
        ({"targets": ("digits",)}, r"'omniglot' takes no targets.*one of \['transfer'\]"),
    ],
)
def test_make_family_rejects(options, message):
    with pytest.raises(ValueError, match=f"make_family: {message}"):
        make_family("omniglot", **options)


def test_make_family_hands_its_options_on(monkeypatch):
    many = np.random.default_rng(1).integers(0, 256, (1210, 7, SIDE, SIDE, 1), np.uint8)
    monkeypatch.setattr("lohp_jax.tasks.named.read_omniglot", lambda data_dir: many)
    family = make_family("omniglot", way=3, shots=2, filters=2, seed=4)
    described = describe_family(family)
    assert described.context["['x']"] == f"float32[6,{SIDE},{SIDE},1]"
    assert described.params["['conv']['w']"] == "float32[3,3,1,2]"
    drawn = family.sample(jax.random.key(0), "held_out")["classes"]
    assert set(drawn.tolist()) <= set(split_characters(1210, seed=4).held_out)
    asked = {}

    def backbone(characters, directory, **settings):
        asked.update(settings, directory=directory)
        return BACKBONE

    monkeypatch.setattr("lohp_jax.tasks.named.omniglot_backbone", backbone)
    heads = make_family("omniglot_heads", filters=3, seed=4)
    assert asked == {"directory": None, "filters": 3, "seed": 4}
    assert describe_family(heads).params["['head']['w']"] == "float32[6,5]"


def test_omniglot_that_is_not_prepared_tells_how_to_prepare_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tfds\.builder\('omniglot'.*download_and_prepare"):
        make_family("omniglot", data_dir=str(tmp_path))


# --- real characters


@pytest.fixture(scope="module")
def real(prepared):
    return readers.omniglot(data_dir=prepared("omniglot"))


@pytest.mark.slow
def test_real_characters(real):
    assert real.shape == (1623, 20, 28, 28, 1) and real.dtype == np.uint8
    ink = real.mean(axis=(2, 3, 4))
    assert 5 < ink.mean() < 60 and (ink > 0).all() and real.max() == 255
    same = np.corrcoef(real[:400].reshape(400, 20, -1).mean(1))  # means of 20 drawings differ
    assert np.sort(same[~np.eye(400, dtype=bool)])[-1] < 0.999


@pytest.mark.slow
def test_a_backbone_and_a_head_learn_new_characters(real, tmp_path):
    backbone = omniglot_backbone(real, tmp_path, filters=8, num_steps=150)
    family = omniglot_family(
        real[:60], num_train=40, network="linear", backbone=backbone, cache=tmp_path
    )
    optimizer = optax.adam(0.1)

    def accuracy(key):
        data = family.sample(key, "held_out")
        params = family.init(key)

        def step(carry, step_key):
            params, state = carry
            updates, state = optimizer.update(jax.grad(family.loss)(params, data, step_key), state)
            return (optax.apply_updates(params, updates), state), None

        start = (params, optimizer.init(params))
        (params, _), _ = jax.lax.scan(step, start, jax.random.split(key, 50))
        return family.evaluate(params, data)["accuracy"]

    found = jax.jit(jax.vmap(accuracy))(jax.random.split(jax.random.key(0), 100))
    assert found.mean() > 0.7  # chance is 0.2
