import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax.baselines import adaptation
from lohp_jax.baselines.adaptation import Tuned, adam_on_support, adapt, tune
from lohp_jax.generation import generate
from lohp_jax.types import TaskFamily

START = {"w": jnp.zeros(2), "b": jnp.zeros(())}


def distance(params, target):
    """A bowl around `target` `[3]`, twice as steep along its last entry."""
    return jnp.sum((params["w"] - target[:2]) ** 2) / 2 + (params["b"] - target[2]) ** 2


FAMILY = TaskFamily(
    sample=lambda key, split="train": jax.random.normal(key, (3,)),
    init=lambda key: START,
    loss=lambda params, data, key: jnp.nan * params["b"],  # only the support may be looked at
    evaluate=lambda params, data: {"accuracy": -distance(params, data), "loss": params["b"]},
    context=lambda data, key: data,
    context_loss=distance,
)
NEAR = 0.6  # an objective that is not finite far from the target


def objective(params, data):
    value = distance(params, data)
    return {"objective": jnp.where(value < NEAR, value, jnp.nan), "loss": value}


def accuracy(params, data):
    return {"accuracy": -objective(params, data)["objective"], "loss": distance(params, data)}


def adam_loop(context, learning_rate, num_steps):
    """Every state of Adam on the context loss, as optax's documentation writes the loop."""
    optimizer = optax.adam(learning_rate)
    params, state, states = START, optimizer.init(START), [START]
    for _ in range(num_steps):
        grads = jax.grad(distance)(params, context)
        updates, state = optimizer.update(grads, state)
        params = optax.apply_updates(params, updates)
        states.append(params)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


@pytest.mark.parametrize("record_every", [1, 3, 6])
def test_adapt_is_adam_on_the_support(record_every):
    context = jnp.array([1.0, -2.0, 0.5])
    expected = adam_loop(context, 0.1, 6)
    actual = adapt(FAMILY, START, context, 0.1, num_steps=6, record_every=record_every)
    chex.assert_trees_all_close(
        actual, jax.tree.map(lambda leaf: leaf[::record_every], expected), rtol=1e-5
    )


def test_adapt_refuses_a_step_count_that_is_not_recorded():
    with pytest.raises(
        ValueError, match=r"num_steps=6 and record_every=4; these do: \[1, 2, 3, 6\]"
    ):
        adapt(FAMILY, START, jnp.ones(3), 0.1, num_steps=6, record_every=4)


def test_adapt_can_be_mapped_over_learning_rates():
    rates = jnp.array([0.01, 0.1])
    together = jax.vmap(lambda r: adapt(FAMILY, START, jnp.ones(3), r, num_steps=3))(rates)
    for i, rate in enumerate(rates):
        alone = adapt(FAMILY, START, jnp.ones(3), rate, num_steps=3)
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], together), alone, rtol=1e-5)


@pytest.fixture
def small_grid(monkeypatch):
    monkeypatch.setattr(adaptation, "LEARNING_RATES", (0.1, 1.0, 10.0))
    monkeypatch.setattr(adaptation, "NUM_STEPS", 12)
    monkeypatch.setattr(adaptation, "_RECORD_EVERY", 3)


def tasks():
    """Queries at half of what their supports say: adapting for too long overshoots."""
    contexts = jnp.array([[1.0, -1.0, 0.8], [0.2, 0.3, -0.2]])
    return contexts / 2, contexts


def test_tune_picks_the_best_of_the_table(small_grid):
    data, contexts = tasks()
    table = {}
    for rate in (0.1, 1.0, 10.0):
        runs = [adam_loop(context, rate, 12) for context in contexts]
        for step in (3, 6, 9, 12):
            ends = [jax.tree.map(lambda leaf, step=step: leaf[step], run) for run in runs]
            table[rate, step] = -np.mean([distance(*p) for p in zip(ends, data, strict=True)])
    best = max(table, key=table.get)
    assert best == (1.0, 6)  # inside the grid
    assert tune(FAMILY, START, data, contexts) == Tuned(*best)
    lower = dataclasses.replace(
        FAMILY,
        evaluate=lambda params, data: dict.fromkeys(("objective", "loss"), distance(params, data)),
    )
    assert tune(lower, START, data, contexts) == Tuned(*best)


@pytest.mark.parametrize("evaluate", [accuracy, objective])
def test_tune_leaves_out_what_is_not_finite(small_grid, evaluate):
    """The rate of 10 jumps out of where the score is a number, whichever way is better."""
    data, contexts = tasks()
    tuned = tune(dataclasses.replace(FAMILY, evaluate=evaluate), START, data, contexts)
    assert tuned == Tuned(1.0, 6)


def test_the_generator_ends_where_adapt_does():
    generator = adam_on_support(FAMILY, START, Tuned(0.1, 6))
    context = jnp.array([1.0, -2.0, 0.5])
    assert generator.gradients == 6
    expected = adapt(FAMILY, START, context, 0.1, num_steps=6)
    for sample in range(2):
        chex.assert_trees_all_close(
            jax.tree.map(
                lambda x, s=sample: x[s],
                generate(generator, context, jax.random.key(0), num_samples=2),
            ),
            jax.tree.map(lambda x: x[-1], expected),
            rtol=1e-6,
        )
    with pytest.raises(ValueError, match=r"the context of shape \[3\], got \[2\]"):
        generate(generator, context[:2], jax.random.key(0))


def test_tune_takes_at_least_one_recorded_step(small_grid):
    """Where the start is best, Adam still has to run."""
    _, contexts = tasks()
    assert tune(FAMILY, START, jnp.zeros_like(contexts), contexts).num_steps == 3


@pytest.mark.parametrize("num_steps", [1, 5])
def test_tune_picks_the_best_rate_for_a_given_number_of_steps(small_grid, num_steps):
    data, contexts = tasks()
    ends = {
        rate: [
            jax.tree.map(lambda leaf: leaf[-1], adam_loop(context, rate, num_steps))
            for context in contexts
        ]
        for rate in (0.1, 1.0, 10.0)
    }
    scores = {
        rate: -np.mean([distance(*pair) for pair in zip(of_rate, data, strict=True)])
        for rate, of_rate in ends.items()
    }
    best = max(scores, key=scores.get)
    assert tune(FAMILY, START, data, contexts, num_steps=num_steps) == Tuned(best, num_steps)


def test_a_weight_decay_makes_it_adamw(small_grid):
    context = jnp.array([1.0, -2.0, 0.5])
    optimizer = optax.adamw(0.1, weight_decay=0.3)
    params, state = START, optimizer.init(START)
    for _ in range(6):
        updates, state = optimizer.update(jax.grad(distance)(params, context), state, params)
        params = optax.apply_updates(params, updates)
    tuned = Tuned(0.1, 6, weight_decay=0.3)
    made = generate(adam_on_support(FAMILY, START, tuned), context, jax.random.key(0))
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], made), params, rtol=1e-5)


def test_tune_picks_the_decay_too(small_grid):
    """Queries at half of what supports say: decay stops short of overshooting."""
    data, contexts = tasks()
    plain = tune(FAMILY, START, data, contexts, num_steps=12)
    decayed = tune(FAMILY, START, data, contexts, num_steps=12, weight_decays=(0.0, 0.5))
    assert plain.weight_decay == 0 and decayed.weight_decay == 0.5
