"""From a family to weights in one call, with our methods and with one of the user's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lohp_jax as lj
from lohp_jax.evaluation.scores import make_producer
from lohp_jax.methods import METHODS

NUM_TASKS, LEVELS = 12, np.arange(24, dtype=np.float32)
SIZES = {
    "num_tasks": 6,
    "num_steps": 4,
    "compression": 2,
    "updates": 4,
    "batch_size": 2,
    "log_every": 2,
}
SMALL = lj.NetworkConfig(trunk="mlp", widths=(8,), embedding=8)
KEY = jax.random.key(0)


def init(key):
    return {"slope": jax.random.normal(key, (1,)), "offset": (jnp.zeros(1), None)}


def apply(params, x):
    return params["slope"][None] * x + params["offset"][0][None]


@pytest.fixture(scope="module")
def family():
    """Lines y = slope x through the origin, a slope for each of 24 tasks."""
    x = np.random.default_rng(0).uniform(-1, 1, (len(LEVELS), 12, 1)).astype(np.float32)
    return lj.supervised_family(init, apply, x, x * LEVELS[:, None, None] / 24, shots=3)


def own_method(**fields):
    """A method in ten lines: it remembers the mean end of all trajectories, whatever the context."""

    def loss(params, example, key):
        error = params["end"] - example.tokens[-1]
        return jnp.mean(error**2), {"size": jnp.abs(params["end"]).max()}

    def walk(params, context, key, *, temperature=0.0, num_steps=None, guidance=0.0):
        noise = temperature * jax.random.normal(key, params["end"].shape)
        return jnp.stack([jnp.zeros_like(noise), params["end"] + noise])

    def start(key, example):
        return {"end": jnp.zeros(example.tokens.shape[1:])}

    return lj.Method("mean_end", start, loss, walk, **fields)


@pytest.fixture(scope="module")
def kept(family, tmp_path_factory):
    """Directory of a fit, and its generator; nothing may change it."""
    directory = tmp_path_factory.mktemp("kept")
    return directory, lj.fit(family, own_method(), key=KEY, directory=directory, **SIZES)


def test_a_users_own_method_trains_generates_and_is_evaluated_beside_ours(family, tmp_path):
    sizes = SIZES | {"updates": 300, "learning_rate": 0.05}
    mine = lj.fit(family, own_method(), key=KEY, directory=tmp_path / "mine", **sizes)
    ours = lj.fit(family, lj.hypernetwork_regression(network=SMALL), key=KEY, **SIZES)
    context = family.context(family.sample(KEY), KEY)
    weights = lj.generate(mine, context, KEY, num_samples=3, temperature=1.0)
    assert jax.tree.structure(weights) == jax.tree.structure(family.init(KEY))
    assert weights["slope"].shape == (3, 1) and len(np.unique(weights["slope"])) == 3

    results = lj.evaluate(family, {"mine": mine, "ours": ours}, KEY, num_tasks=4)
    assert results["measure"] == "objective"
    assert [row["method"] for row in results["rows"]] == ["mine", "ours"]
    assert all(np.isfinite(row["objective"]) for row in results["rows"])

    again = lj.load(tmp_path / "mine", own_method(), family)
    for a, b in zip(
        *map(jax.tree.leaves, (lj.generate(again, context, KEY), _mean(mine, context))), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def _mean(generator, context):
    return lj.generate(generator, context, KEY)


def test_what_the_own_method_learns_is_the_mean_of_the_stored_ends(family, tmp_path):
    sizes = SIZES | {"updates": 600, "learning_rate": 0.05}
    mine = lj.fit(family, own_method(), key=KEY, directory=tmp_path, **sizes)
    ends = lj.open_store(tmp_path / "trajectories").load(lambda shard: shard["states"])
    slopes = np.asarray(jax.tree.leaves(ends)[1])[:, -1]  # offset before slope
    context = family.context(family.sample(KEY), KEY)
    slope = lj.generate(mine, context, KEY)["slope"][0]
    np.testing.assert_allclose(slope, slopes.mean(axis=0), atol=0.02)


def test_the_same_key_gives_the_same_weights_in_memory_and_on_disk(family, kept):
    directory, generator = kept
    in_memory = lj.fit(family, own_method(), key=KEY, **SIZES)
    for other in (in_memory, lj.load(directory, own_method(), family)):
        np.testing.assert_array_equal(other.params["end"], generator.params["end"])


def test_a_fit_that_was_stopped_goes_on_to_the_same_bits(family, tmp_path):
    sizes = SIZES | {"updates": 8, "checkpoint_every": 2}
    whole = lj.fit(family, own_method(), key=KEY, **sizes)

    def stop(at):
        if at.method == "mean_end" and at.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lj.fit(family, own_method(), key=KEY, directory=tmp_path, on_progress=stop, **sizes)
    seen = []
    resumed = lj.fit(
        family,
        own_method(),
        key=KEY,
        directory=tmp_path,
        resume=True,
        on_progress=lambda at: seen.append((at.method, at.step)),
        **sizes,
    )
    assert [step for name, step in seen if name == "mean_end"] == [6, 8]
    np.testing.assert_array_equal(resumed.params["end"], whole.params["end"])


def test_a_method_goes_on_from_the_one_it_starts_from(family):
    names = []
    first = own_method()
    second = own_method(starts_from=first, share=0.5)
    second = dataclasses.replace(second, name="second")
    told = {"on_progress": lambda at: names.append((at.method, at.updates))}
    generator = lj.fit(family, second, key=KEY, **SIZES, **told)
    alone = lj.fit(family, first, key=KEY, **SIZES)
    assert [name for name in names if name[0] != "prepare"] == [
        ("mean_end", 4),
        ("mean_end", 4),
        ("second", 2),
    ]
    assert np.abs(generator.params["end"] - alone.params["end"]).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_every_method_fits_a_family_that_knows_no_images(family, make):
    generator = lj.fit(family, make(network=SMALL), key=KEY, **SIZES)
    context = family.context(family.sample(KEY), KEY)
    weights = lj.generate(generator, context, KEY, num_samples=2, temperature=1.0)
    assert weights["slope"].shape == (2, 1) and weights["offset"][1] is None
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(weights))


@pytest.mark.slow
def test_regression_finds_the_slopes_of_unseen_lines(family):
    """Three points of a line say all of it: far better than the mean line."""
    sizes = {"num_tasks": 200, "num_steps": 60, "compression": 60, "updates": 400}
    method = lj.hypernetwork_regression(network=lj.NetworkConfig("mlp", (32,), 32))
    generator = lj.fit(family, method, key=KEY, teachers=optax.sgd(0.5), **sizes)
    keys = jax.random.split(KEY, 16)
    tasks = jax.vmap(lambda k: family.sample(k, "held_out"))(keys)
    contexts = jax.vmap(family.context)(tasks, keys)
    producer = make_producer(lambda c, k: _mean(generator, c))
    scores = jax.vmap(family.evaluate)(
        jax.tree.map(lambda w: w[:, 0], producer.many(contexts, keys)), tasks
    )
    assert scores["objective"].mean() < 0.2 * scores["chance"].mean()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"num_task": 3},
            "fit: a setting must be one of .*, got 'num_task'; did you mean 'num_tasks'",
        ),
        ({"record_every": 4}, r"record_every must divide compression=2, got 4"),
        ({"record_every": 0}, r"record_every must be at least 1, got 0"),
        ({"compression": 3}, r"compression must divide num_steps=4, got 3; these do: \[1, 2, 4\]"),
        ({"num_tasks": 0}, "fit: num_tasks must be at least 1, got 0"),
        ({"updates": 0}, "updates must be at least 1, got 0"),
        ({"batch_size": 3}, "batch_size must be even and at least 2, got 3"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite and positive, got nan"),
        ({"teachers": ()}, "make_teachers: expected at least one teacher, got none"),
        ({"teachers": "adm:1"}, "did you mean 'adam'"),
        ({"teachers": optax.sgd(1e9)}, "prepare: all 6 runs of teacher '0' diverged"),
    ],
)
def test_bad_arguments_are_refused(family, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        lj.fit(family, own_method(), key=KEY, directory=tmp_path, **SIZES | arguments)
    assert not (tmp_path / "checkpoints").exists()


def test_a_directory_of_another_fit_is_refused_and_left_alone(family, kept):
    directory, _ = kept

    def fit(method, **other):
        lj.fit(family, method, key=KEY, directory=directory, **SIZES | other)

    before = {p: p.stat().st_mtime_ns for p in directory.rglob("*")}
    with pytest.raises(ValueError, match=r"holds a run; go on with resume=True, or choose another"):
        fit(own_method())
    with pytest.raises(ValueError, match=r"other arguments: fit.updates is 4 there and 6 here"):
        fit(own_method(), resume=True, updates=6)
    assert {p: p.stat().st_mtime_ns for p in directory.rglob("*")} == before


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 2])
def test_a_generator_follows_the_teacher_that_it_is_told(family, tmp_path, window):
    """Far apart, as one of them does not move; all windows of a network follow the same one."""
    method = lj.cloning(network=lj.NetworkConfig(widths=(8, 8), embedding=8, window=window))
    sizes = SIZES | {"updates": 60, "learning_rate": 0.02, "channels": 1, "batch_size": 8}
    teachers = [("none", optax.set_to_zero()), ("sgd", optax.sgd(0.3))]
    given = {"key": KEY, "teachers": teachers, "directory": tmp_path} | sizes
    best = lj.fit(family, method, **given)
    mixed = lj.fit(family, method, imitate="mixed", resume=True, **given)
    context = family.context(family.sample(KEY, "held_out"), KEY)
    keys = jax.random.split(KEY, 12)

    def ends(generator):
        weights = jax.jit(jax.vmap(lambda key: lj.generate(generator, context, key)))(keys)
        return np.hstack([leaf.reshape(len(keys), -1) for leaf in jax.tree.leaves(weights)])

    each = [ends(lj.load(tmp_path, method, family, imitate=name)) for name in ("none", "sgd")]
    np.testing.assert_array_equal(ends(best), each[1])
    assert np.abs(each[0] - each[1]).max(axis=1).min() > 0.1
    apart = [np.abs(ends(mixed) - end).max(axis=1) for end in each]
    drawn = np.argmin(apart, axis=0)
    assert np.min(apart, axis=0).max() < 1e-5 and 0 < drawn.sum() < len(keys)


def test_a_teacher_that_no_run_had_is_refused(family, kept):
    with pytest.raises(ValueError, match=r"'best', 'mixed', 'adam'.*got 'adan'.*'adam'"):
        lj.load(kept[0], own_method(), family, imitate="adan")
    with pytest.raises(ValueError, match=r"must be one of .*got 'bset'; did you mean 'best'"):
        lj.fit(family, own_method(), key=KEY, imitate="bset", **SIZES)


def test_loading_asks_for_what_a_directory_cannot_know(family, kept):
    directory, _ = kept
    with pytest.raises(ValueError, match=r"does not know where its family comes from; .*family="):
        lj.load(directory, own_method())
    with pytest.raises(ValueError, match=r"'mean_end' .* is not of this package; .*method="):
        lj.load(directory, "mean_end", family)
    with pytest.raises(FileNotFoundError):
        lj.load(directory, "lohp", family)
    other = dataclasses.replace(family, init=lambda key: init(key) | {"slope": jnp.zeros(2)})
    with pytest.raises(
        ValueError, match=r"run of another family: params.*slope.* is .float32.* there and .float32"
    ):
        lj.load(directory, own_method(), other)


def test_a_method_with_other_settings_is_not_loaded(family, kept):
    """What a policy sees of a task, say, leaves no trace in the shapes of its params."""
    other = own_method(config={"sees": "loss"})
    message = r"other settings: method\.sees is absent there and 'loss' here; give the method as"
    with pytest.raises(ValueError, match=message):
        lj.load(kept[0], other, family)


def test_a_context_that_does_not_fit_is_refused(family, kept):
    _, generator = kept
    context = family.context(family.sample(KEY), KEY)
    with pytest.raises(ValueError, match=r"expected x of shape \[n, 1\], got \[3, 2\]"):
        lj.generate(generator, context | {"x": np.ones((3, 2), np.float32)}, KEY)
    with pytest.raises(ValueError, match="expected a context like"):
        lj.generate(generator, {"x": context["x"]}, KEY)
    with pytest.raises(ValueError, match="expected finite numbers in y, got 3 NaN"):
        lj.generate(generator, context | {"y": np.full((3, 1), np.nan, np.float32)}, KEY)


# --- windows


WINDOW = lj.NetworkConfig(widths=(8,), embedding=8, window=1)


@pytest.fixture(scope="module")
def windowed(family, tmp_path_factory):
    """Directory of a fit on windows of one token, and its generator; nothing may change it."""
    directory = tmp_path_factory.mktemp("windowed")
    sizes = SIZES | {"channels": 1, "record_every": 2}
    method = lj.lohp(network=WINDOW)
    return directory, lj.fit(family, method, key=KEY, directory=directory, **sizes)


def test_a_generator_of_windows_is_loaded_again(family, windowed):
    directory, generator = windowed
    context = family.context(family.sample(KEY), KEY)
    loaded = lj.load(directory, family=family)
    expected = lj.generate(generator, context, KEY, temperature=1.0)
    actual = lj.generate(loaded, context, KEY, temperature=1.0)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert loaded.config["window"] == 1


def test_only_the_states_that_are_matched_are_stored(windowed):
    store = lj.open_store(windowed[0] / "trajectories")
    assert store.read(0)["states"]["slope"].shape == (3, 1)  # of 5, of which compression matches 3


@pytest.mark.parametrize("window", [2, None])
def test_a_generator_saved_with_another_window_is_refused(family, windowed, window):
    network = dataclasses.replace(WINDOW, window=window)
    message = rf"was trained with window=1, got a method with window={window}; give the"
    with pytest.raises(ValueError, match=message):
        lj.load(windowed[0], lj.lohp(network=network), family)


def test_a_run_with_another_window_is_not_gone_on_with(family, windowed):
    method = lj.lohp(network=dataclasses.replace(WINDOW, window=2))
    sizes = SIZES | {"channels": 1, "record_every": 2}
    with pytest.raises(ValueError, match=r"network.window is 1 there and 2 here"):
        lj.fit(family, method, key=KEY, directory=windowed[0], resume=True, **sizes)


def test_a_window_that_no_tensor_fills_is_refused_by_fit(family):
    method = lj.lohp(network=dataclasses.replace(WINDOW, window=3))
    with pytest.raises(ValueError, match=r"window must be between 1 and 2 tokens of 16 .*got 3"):
        lj.fit(family, method, key=KEY, **SIZES)


def test_fewer_states_in_the_store_are_the_same_states(family):
    """A fit on every second state is the fit on all of them, of which every second is matched."""
    method = lj.lohp(network=SMALL)
    few, all_of_them = (
        lj.fit(family, method, key=KEY, record_every=every, **SIZES) for every in (2, 1)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        few.params,
        all_of_them.params,
    )
