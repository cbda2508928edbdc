"""Training on problems whose solutions are known, and the loss against its definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.diffusion.config import DiffusionConfig
from lohp_jax.diffusion.generator import make_denoiser, to_points
from lohp_jax.diffusion.guidance import GuidanceConfig
from lohp_jax.diffusion.loss import make_loss, task_loss
from lohp_jax.diffusion.oracle import OracleConfig, Solved, solved
from lohp_jax.diffusion.sampler import sample
from lohp_jax.diffusion.schedule import Schedule
from lohp_jax.diffusion.training import (
    diffusion_params,
    initial_params,
    solved_pool,
    train_diffusion,
)
from lohp_jax.generation import generate
from lohp_jax.networks.denoiser import DenoiserConfig
from lohp_jax.problems import lasso
from lohp_jax.problems.reference import certified
from lohp_jax.training.engine import DivergedError, Saving
from lohp_jax.types import Composite

SMALL = DiffusionConfig(
    network=DenoiserConfig(width=24, depth=1),
    pool=256,
    batch_size=32,
    updates=300,
    learning_rate=5e-3,
    ema=0.95,
    log_every=150,
)
KEY = jax.random.key(0)


def held_out(family, count=32):
    return jax.vmap(lambda key: family.sample(key, "held_out"))(jax.random.split(KEY, count))


def mean_gap(family, generator, **options):
    """Mean objective of generated points over that of the family's start; the optimum is 0."""
    problems = held_out(family)
    keys = jax.random.split(jax.random.key(1), 32)
    x = jax.jit(jax.vmap(lambda p, key: generator.apply(generator.params, p, key, **options)))(
        problems, keys
    )
    values = [jax.vmap(family.objective)(x, problems).mean() for x in (x, jnp.zeros_like(x))]
    return values[0] / values[1]


@pytest.fixture(scope="module")
def trained(quadratic):
    """On points of all oracles, with all parts of the guidance; and what was reported on the way."""
    config = dataclasses.replace(
        SMALL,
        guidance=GuidanceConfig(
            ("parameters", "gradient", "smoothed_gradient"), (0.2,), "learned", probes=2
        ),
        oracle=OracleConfig(0.6, 0.2, 0.2, trajectory_steps=5),
    )
    reports = []
    return train_diffusion(quadratic, config, KEY, on_progress=reports.append), reports


def test_training_closes_the_gap(quadratic, trained):
    generator, reports = trained
    assert mean_gap(quadratic, generator) < 0.1
    assert [report.step for report in reports] == [150, 300]
    assert all(report.method == "diffusion" and report.updates == 300 for report in reports)
    assert reports[1].metrics["loss"] < reports[0].metrics["loss"]
    assert generator.family == "quadratic" and generator.config.updates == 300


@pytest.mark.parametrize(
    "guidance", [{"parameters": 0.0}, {"gradient": 0.0, "smoothed_gradient": "wiener"}]
)
def test_a_trained_generator_takes_other_weights(quadratic, trained, guidance):
    """On a quadratic the gradient says as much as the parameters."""
    assert mean_gap(quadratic, trained[0], guidance=guidance) < 0.5


def test_generate_and_sample_agree_with_apply(quadratic, trained):
    generator, _ = trained
    problem = quadratic.sample(KEY, "held_out")
    x = generate(generator, problem, KEY, num_samples=3, temperature=1.0, num_steps=4)
    assert x.shape == (3, 2) and np.ptp(np.asarray(x), axis=0).min() > 0
    path = generator.path(generator.params, problem, KEY, num_steps=4)
    assert path.shape == (4, 2)
    one = generator.apply(generator.params, problem, KEY, num_steps=4)
    np.testing.assert_allclose(path[-1], one, rtol=1e-5)
    y = sample(
        make_denoiser(quadratic, generator.config),
        generator.params,
        problem,
        KEY,
        schedule=Schedule(),
        num_steps=4,
    )
    points = to_points(quadratic, generator.config, generator.params, problem, y)
    np.testing.assert_allclose(points[0], one, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"guidance must be 0 or weights of parts.* got 0\.5"):
        generate(generator, problem, KEY, guidance=0.5)


@pytest.mark.slow
def test_an_ensemble_trains_in_one_call_and_a_training_goes_on_where_it_stopped(
    quadratic, tmp_path
):
    """Members on given problems are those of `train_diffusion`; an interruption changes no bit."""
    config = dataclasses.replace(SMALL, updates=4, log_every=2, pool=16, batch_size=8)
    keys = jax.random.split(KEY, 2)

    @jax.jit
    @jax.vmap
    def train(key):
        pool = solved_pool(quadratic, config, jax.random.split(key, 4)[0])
        return diffusion_params(quadratic, config, key, pool=pool)

    members = train(keys)
    whole = train_diffusion(quadratic, config, keys[1])
    jax.tree.map(
        lambda many, one: np.testing.assert_allclose(many[1], one, rtol=2e-4, atol=2e-6),
        members,
        whole.params,
    )

    def interrupt(progress):
        raise KeyboardInterrupt

    saving = Saving(tmp_path, 4, {})
    with pytest.raises(KeyboardInterrupt):
        train_diffusion(quadratic, config, keys[1], saving=saving, on_progress=interrupt)
    reports = []
    part = train_diffusion(quadratic, config, keys[1], saving=saving, on_progress=reports.append)
    assert [report.step for report in reports] == [4]
    jax.tree.map(np.testing.assert_array_equal, part.params, whole.params)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"num_steps": 0}, "num_steps must be a positive whole number, got 0"),
        ({"b": np.zeros(3)}, r"expected b of shape \[2\], as in training, got \[3\]; .* one size"),
    ],
)
def test_what_a_generator_cannot_do(quadratic, trained, options, message):
    problem = {"b": options.get("b", np.zeros(2))}
    options = {name: value for name, value in options.items() if name != "b"}
    with pytest.raises(ValueError, match=message):
        generate(trained[0], problem, KEY, **options)


@pytest.mark.slow
def test_both_wells_are_found(two_wells):
    """In the shares that the label solver has; their mean is no solution."""
    config = dataclasses.replace(SMALL, alpha=0.9, updates=600)
    generator = train_diffusion(two_wells, config, KEY)
    problem = two_wells.sample(KEY, "held_out")
    x = generate(generator, problem, KEY, num_samples=400, temperature=1.0, num_steps=20)[:, 0]
    assert (np.abs(np.abs(x) - 1) < 0.25).mean() > 0.9
    np.testing.assert_allclose((x < 0).mean(), 0.3, atol=0.12)


@pytest.mark.slow
def test_a_rollout_diffuses_what_a_warm_start_leaves(quadratic):
    config = dataclasses.replace(
        SMALL,
        training="rollout",
        rollout_steps=4,
        num_steps=4,
        updates=200,
        warm_start=True,
        pool=0,
    )
    reports = []
    generator = train_diffusion(quadratic, config, KEY, on_progress=reports.append)
    assert [report.method for report in reports] == ["warm_start"] * 2 + ["diffusion"] * 2
    assert 0 < generator.params["warm"]["scale"] < 0.2
    assert mean_gap(quadratic, generator) < 0.02


def test_the_loss_equals_its_definition(quadratic):
    """Of the untrained network, which says x_0 = 0, the centre of the frame, whatever it sees."""
    config = dataclasses.replace(SMALL, alpha=0.25)
    start = jax.jit(functools.partial(initial_params, quadratic, config))
    label = jax.jit(functools.partial(solved, quadratic, config.oracle))
    params, item = start(KEY), jax.tree.map(lambda leaf: leaf[0], label(KEY[None]))
    levels = []
    for regression in (False, True):
        loss_fn = jax.jit(make_loss(quadratic, config, regression=regression))
        loss, metrics = loss_fn(params, item, jax.random.key(3))
        target = (np.float64(item.solution) - 0.5) / 2
        np.testing.assert_allclose(metrics["reconstruction"], (target**2).mean(), rtol=1e-4)
        squared = [((x - np.float64(item.solution)) ** 2).sum() for x in (0.5, 0.0)]
        levels.append(metrics["task"] / np.log1p(squared[0] / squared[1]))
        expected = 0.25 * metrics["reconstruction"] + 0.75 * metrics["task"]
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert 0 < levels[0] < 1  # α² of a random level
    np.testing.assert_allclose(levels[1], 1, rtol=1e-4)


def test_units_of_the_gap():
    """f* = 2, and 10 at the start: f = 6 is half the gap of the start, and twice the optimum."""
    item = Solved(None, None, jnp.float32(2.0), jnp.float32(10.0), None)
    for unit, gap in (("start", 0.5), ("optimum", 2.0)):
        np.testing.assert_allclose(
            task_loss(unit, jnp.float32(6.0), item), np.log1p(gap), rtol=1e-6
        )
    np.testing.assert_allclose(task_loss("optimum", jnp.float32(1.0), item), -0.5, rtol=1e-6)


@pytest.mark.slow
def test_a_solution_out_of_reach_of_the_frame_is_not_learned_from(quadratic):
    start = jax.jit(functools.partial(initial_params, quadratic, SMALL))(KEY)
    item = jax.tree.map(lambda leaf: leaf[0], solved(quadratic, SMALL.oracle, KEY[None]))
    loss_fn = jax.jit(jax.value_and_grad(make_loss(quadratic, SMALL), has_aux=True))
    (near, _), slopes = loss_fn(start, item, KEY)
    assert near > 0 and any(slope.any() for slope in jax.tree.leaves(slopes))
    for far in (1e3, 1e30):
        (loss, _), slopes = loss_fn(start, item._replace(solution=jnp.full(2, far)), KEY)
        assert loss == 0 and not any(slope.any() for slope in jax.tree.leaves(slopes))


def test_labels_of_columns_in_any_unit_are_certified():
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(5, 10)) * np.logspace(-2, 2, 10)
    family = lasso(dictionary=columns, penalty=1e-2)
    keys = jax.random.split(KEY, 16)
    rough = jax.jit(functools.partial(solved, family, SMALL.oracle))(keys)
    assert not certified(family, rough.value, rough.excess).all()
    pool = solved_pool(family, SMALL, KEY, 16)
    np.testing.assert_array_equal(jax.random.key_data(pool.key), jax.random.key_data(rough.key))
    assert certified(family, pool.value, pool.excess).all()
    assert pool.solution.dtype == pool.value.dtype == pool.excess.dtype == jnp.float32
    problems = jax.vmap(lambda key: family.sample(key, "train"))(pool.key)
    values = jax.vmap(family.objective)(pool.solution, problems)
    np.testing.assert_allclose(values, pool.value, rtol=1e-4)


def test_labels_that_nothing_certifies_are_named():
    family = dataclasses.replace(lasso(5, 10), certificate=lambda x, problem: jnp.inf)
    with pytest.warns(UserWarning, match=r"of 'lasso' proven .* got 8 of 8 that are not"):
        solved_pool(family, SMALL, KEY, 8)


def test_labels_and_trajectories_are_those_of_the_family(quadratic):
    oracle = OracleConfig(trajectories=1.0, trajectory_steps=30)
    smooth = Composite(
        quadratic.objective, lambda x, step, problem: jnp.maximum(x, 0.0), lambda problem: 2.0
    )
    for family in (quadratic, dataclasses.replace(quadratic, composite=smooth)):
        items = jax.jit(functools.partial(solved, family, oracle))(jax.random.split(KEY, 3))
        problem = jax.vmap(lambda key: quadratic.sample(key, "train"))(items.key)
        values = jax.vmap(jax.vmap(quadratic.objective, (0, None)))(items.iterates, problem)
        assert values.shape == (3, 30) and (values[:, -1] < values[:, 0]).all()
        np.testing.assert_allclose(items.value, 0, atol=1e-6)
        np.testing.assert_allclose(
            items.start_value, (items.solution**2).sum(axis=1) / 2, rtol=1e-4
        )
    # proximal descent by half a step each, kept from negative numbers
    exact = np.maximum(0, np.float64(items.solution))
    np.testing.assert_allclose(items.iterates[:, 0], exact / 2, rtol=1e-4)
    np.testing.assert_allclose(items.iterates[:, -1], exact, rtol=1e-4)


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (DiffusionConfig, {"prediction": "x1"}, r"prediction must be .* did you mean 'x0'\?"),
        (DiffusionConfig, {"training": "roll"}, r"training must be .* did you mean 'rollout'\?"),
        (DiffusionConfig, {"sampler": "ddpm"}, r"sampler must be one of .*, got 'ddpm'"),
        (DiffusionConfig, {"gap_unit": "label"}, r"gap_unit must be one of .*, got 'label'"),
        (DiffusionConfig, {"updates": 0}, "updates must be at least 1, got 0"),
        (DiffusionConfig, {"window": 11}, "window must be at most rollout_steps=10, got 11"),
        (DiffusionConfig, {"pool": -1}, "pool must be at least 0, got -1"),
        (DiffusionConfig, {"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1\.5"),
        (DiffusionConfig, {"ema": 1.0}, r"ema must be in \[0, 1\), got 1\.0"),
        (DiffusionConfig, {"learning_rate": 0.0}, "learning_rate must be finite and positive"),
        (
            DiffusionConfig,
            {"network": DenoiserConfig("lasso"), "prediction": "eps"},
            r"prediction must be 'x0' with network\.kind='lasso', got 'eps'",
        ),
        (OracleConfig, {"solutions": 0.0}, r"one of them positive, got \(0\.0, 0\.0, 0\.0\)"),
        (OracleConfig, {"artificial": -1.0}, "must not be negative"),
        (OracleConfig, {"trajectory_steps": 0}, "trajectory_steps must be at least 1, got 0"),
        (OracleConfig, {"noise": float("inf")}, "noise must be finite and positive, got inf"),
    ],
)
def test_bad_settings_are_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_a_family_without_labels_and_a_loss_that_is_not_finite_are_named(quadratic):
    with pytest.raises(ValueError, match="expected a family with solve, frame, got 'quadratic'"):
        train_diffusion(dataclasses.replace(quadratic, solve=None, frame=None), SMALL, KEY)
    broken = dataclasses.replace(quadratic, solve=lambda problem, key: jnp.full(2, jnp.nan))
    config = dataclasses.replace(SMALL, updates=2, pool=2, batch_size=2)
    with pytest.raises(DivergedError, match=r"not finite at update 1\. Lower the learning rate"):
        train_diffusion(broken, config, KEY)
