"""Lo-Hp with its loop closed, from training over its gate to what it tells of a walk."""

import dataclasses
import functools
import importlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lohp_jax as lj
from lohp_jax.evaluation.scores import draw_tasks
from lohp_jax.methods.lohp_feedback import lohp_feedback
from lohp_jax.networks.policy import NetworkConfig
from lohp_jax.policy.config import FeedbackConfig
from lohp_jax.policy.feedback import NUM_KNOWN

KEY = jax.random.key(0)
NETWORK = NetworkConfig("mlp", (16,), embedding=16)
LOOP = FeedbackConfig(widths=(8,))
FITTING = {
    "teachers": "adam:0.1",
    "num_tasks": 32,
    "num_steps": 20,
    "compression": 10,
    "updates": 60,
    "log_every": 20,
    "checkpoint_every": 20,
    "key": KEY,
}
START = lj.Generator(lambda params, context, key, **_: params, {"slope": 0.0, "offset": 0.0})
module = importlib.import_module("lohp_jax.methods.lohp_feedback")


@pytest.fixture(scope="module")
def generator(lines):
    return lj.fit(lines, lohp_feedback(network=NETWORK, loop=LOOP), **FITTING)


def of_slope(slope):
    """The context of a line."""
    x = jnp.linspace(-1, 1, 5)[:, None]
    return {"x": x, "y": slope * x + 1.0}


def appraise(generator, context):
    return jax.jit(generator.appraise)(generator.params, context, KEY)


@pytest.mark.parametrize("sees, gradients, passes", [("gradient", 2, 5), ("loss", 0, 7)])
def test_lohp_with_feedback_is_this_method_and_counts_what_it_spends(
    space, sees, gradients, passes
):
    method = lj.lohp(network=NETWORK, feedback=sees)
    expected = lohp_feedback(network=NETWORK, loop=FeedbackConfig(sees=sees))
    assert (method.name, method.config) == ("lohp_feedback", expected.config)
    bound = method.bound(space)  # two steps; the gate walks them once more and looks at the end
    assert (bound.gradients, bound.forward_passes) == (gradients, passes)


def test_what_makes_no_sense_is_refused(lines, space):
    with pytest.raises(ValueError, match=r"feedback must be one of .*did you mean 'gradient'"):
        lj.lohp(feedback="gradients")
    with pytest.raises(ValueError, match=r"anchor must be 0 with feedback, got 0\.5"):
        lj.lohp(feedback="loss", anchor=0.5)
    blind = space._replace(family=dataclasses.replace(lines, context_loss=None))
    with pytest.raises(ValueError, match="the family 'lines' has no context_loss"):
        lohp_feedback().bound(blind)
    whole = r"network\.window must be None, got 2: the task loss of generated weights needs all"
    with pytest.raises(ValueError, match=whole):
        loop = dataclasses.replace(LOOP, objective="task_loss")
        lohp_feedback(network=NetworkConfig(window=2), loop=loop)


@pytest.mark.parametrize(
    "objective, name",
    [("balance", "hybrid_loss"), ("likelihood", "cloning_loss"), ("task_loss", "task_loss")],
)
def test_each_objective_trains_both_halves(monkeypatch, space, example, objective, name):
    called, loss = [], getattr(module, name)

    def recorded(*arguments):
        called.append(name)
        return loss(*arguments)

    monkeypatch.setattr(module, name, recorded)
    loop = dataclasses.replace(LOOP, objective=objective)
    method = lohp_feedback(network=NETWORK, loop=loop).bound(space)
    params = method.init(KEY, example)

    def mean_loss(params):
        losses = jax.vmap(lambda key: method.loss(params, example, key)[0])
        return jnp.mean(losses(jax.random.split(KEY, 16)))

    grads = jax.jit(jax.grad(mean_loss))(params)
    assert set(called) == {name}
    for half in ("network", "rule"):
        assert max(np.abs(g).max() for g in jax.tree.leaves(grads[half])) > 0
    assert all((leaf == 0).all() for leaf in grads["known"].values())


def test_familiarity_is_spread_evenly_over_training_tasks(lines, generator):
    for known in generator.params["known"].values():
        assert known.shape == (NUM_KNOWN,) and np.isfinite(known).all()
        assert (np.diff(known) >= 0).all() and known[0] < known[-1]
    tasks = draw_tasks(lines, jax.random.key(5), 128, "train")
    one = functools.partial(generator.appraise, generator.params)
    told = jax.jit(jax.vmap(one))(tasks.contexts, tasks.keys)
    assert 0.3 < float(told["familiarity"].mean()) < 0.7
    assert (told["fallbacks"] == 0).all()


def test_a_task_like_no_other_is_walked_by_the_rule_alone(generator):
    """There it does not matter what the network that reads the condition says."""
    params = generator.params
    network = jax.tree.map(lambda p: p + 0.1, params["network"])
    other = dataclasses.replace(generator, params=params | {"network": network})
    usual, strange = of_slope(0.5), of_slope(300.0)
    assert float(lj.familiarity(generator, usual)) > 0.05
    least = 1 / (NUM_KNOWN + 1)
    np.testing.assert_allclose(lj.familiarity(generator, strange), least, rtol=1e-6)
    assert appraise(generator, strange)["trust"] == appraise(other, strange)["trust"] == 0
    slopes = [
        lj.generate(g, c, KEY)["slope"][0] for c in (usual, strange) for g in (generator, other)
    ]
    assert slopes[0] != slopes[1] and slopes[2] == slopes[3] != 0


def test_steps_samples_and_guidance_work_as_without_feedback(generator):
    context = of_slope(0.5)
    states = jax.jit(generator.path)(generator.params, context, KEY)
    first = lj.generate(generator, context, KEY, num_steps=1)
    np.testing.assert_allclose(first["slope"][0], states["slope"][1], rtol=1e-5)
    samples = lj.generate(generator, context, KEY, num_samples=4, temperature=1.0)
    assert np.std(samples["slope"]) > 0
    plain, guided = (
        lj.generate(generator, context, KEY, guidance=strength)["slope"] for strength in (0.0, 1.0)
    )
    assert np.isfinite(guided).all() and not np.allclose(plain, guided)


@pytest.mark.slow
def test_rows_tell_what_was_spent_and_met(lines, generator):
    """At slopes above a tenth the loss is not a number: there the walk falls back, and is counted."""

    def broken(params, context):
        loss = lines.context_loss(params, context)
        return jnp.where(params["slope"] > 0.1, jnp.nan, loss)

    (row,) = lj.evaluate(lines, {"lohp_feedback": generator}, KEY, num_tasks=16)["rows"]
    assert (row["gradients"], row["forward_passes"], row["fallbacks"]) == (2, 5, 0)
    assert 0 < row["familiarity"] <= 1 and 0 <= row["trust"] <= 1
    family = dataclasses.replace(lines, context_loss=broken)
    fallen = lj.fit(family, lohp_feedback(network=NETWORK, loop=LOOP), **FITTING)
    (row,) = lj.evaluate(family, {"lohp_feedback": fallen}, KEY, num_tasks=16)["rows"]
    assert row["fallbacks"] > 0 and np.isfinite(row["objective"])


def cut_off_and_resumed(directory, lines, method):
    """The generator of a run that was stopped after 40 updates and went on, read from disk."""

    def stop(progress):
        if progress.method == "lohp_feedback" and progress.step == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lj.fit(lines, method, directory=directory, on_progress=stop, **FITTING)
    lj.fit(lines, method, directory=directory, resume=True, **FITTING)
    return lj.load(directory, method, lines)


def test_a_run_that_was_cut_off_ends_with_the_same_bits(tmp_path, lines, generator):
    loaded = cut_off_and_resumed(tmp_path, lines, lohp_feedback(network=NETWORK, loop=LOOP))
    chex.assert_trees_all_equal(loaded.params, generator.params)
    assert lj.familiarity(loaded, of_slope(0.5)) == lj.familiarity(generator, of_slope(0.5))


@pytest.mark.slow
def test_in_windows_it_trains_goes_on_walks_and_is_written_as_the_whole(tmp_path, lines):
    network = NetworkConfig(widths=(16,), embedding=16, window=1)  # one for each of both weights
    method = lohp_feedback(network=network, loop=LOOP)
    generator = lj.fit(lines, method, **FITTING)
    loaded = cut_off_and_resumed(tmp_path, lines, method)
    chex.assert_trees_all_equal(loaded.params, generator.params)
    errors = [
        lj.evaluate(lines, {"it": g}, KEY)["rows"][0]["objective"] for g in (generator, START)
    ]
    assert errors[0] < 0.3 * errors[1]
    context = of_slope(0.5)
    samples = lj.generate(loaded, context, KEY, num_samples=3, temperature=1.0, guidance=0.5)
    assert np.std(samples["slope"]) > 0 and np.isfinite(samples["slope"]).all()
    weights = jax.tree.map(lambda leaf: leaf[0], lj.generate(loaded, context, KEY))
    lj.write_weights(tmp_path / "weights.safetensors", weights)
    chex.assert_trees_all_equal(load_file(tmp_path / "weights.safetensors"), weights)
    with pytest.raises(ValueError, match="or sees them whole at every step"):
        lj.stream_weights(loaded, context, KEY, tmp_path / "streamed.safetensors")


def test_only_generators_that_measure_it_tell_familiarity(generator):
    with pytest.raises(ValueError, match="expected a generator that measures how familiar"):
        lj.familiarity(dataclasses.replace(generator, appraise=None), of_slope(0.5))
    with pytest.raises(ValueError, match="expected a context like"):
        lj.familiarity(generator, {"x": jnp.zeros((5, 1))})
