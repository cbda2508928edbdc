"""Scores of optimizers are those of a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax.evaluation.learning import (
    ADAM_RATES,
    adam,
    adam_settings,
    best_of,
    make_trainer,
)
from lohp_jax.types import TaskFamily

FAMILY = TaskFamily(
    sample=lambda key, split="train": jax.random.normal(key, (2,)) + 5.0 * (split == "held_out"),
    init=lambda key: jax.random.normal(key, (2,)),
    loss=lambda p, data, key: jnp.sum((p - data) ** 2) + 0.1 * jax.random.uniform(key),
    evaluate=lambda p, data: {"loss": jnp.sum(jnp.abs(p - data)), "accuracy": p[0]},
    context=lambda data, key: (),
)
KEYS = jax.random.split(jax.random.key(0), 3)


def sgd(setting, num_steps):
    return optax.sgd(setting / num_steps)


@pytest.mark.parametrize("split, num_steps", [("train", 40), ("held_out", 20)])
def test_scores_are_those_of_a_loop(split, num_steps):
    trainer = make_trainer(FAMILY, sgd, split=split, segment=2)
    rates = np.float32([0.5, 2.0])
    scores = trainer(rates, KEYS, num_steps)
    assert {name: value.shape for name, value in scores.items()} == dict.fromkeys(
        ("mean_loss", "final_loss", "query_loss", "accuracy"), (2, 3)
    )
    for s, rate in enumerate(rates):
        for n, key in enumerate(KEYS):
            task_key, init_key, loss_key = jax.random.split(key, 3)
            data = np.asarray(FAMILY.sample(task_key, split))
            p, losses = np.asarray(FAMILY.init(init_key)), []
            for t in range(num_steps):
                noise = 0.1 * float(jax.random.uniform(jax.random.fold_in(loss_key, t)))
                losses.append(min(10.0, np.sum((p - data) ** 2) + noise))
                p = p - rate / num_steps * 2 * (p - data)
            close = {"rtol": 1e-4, "atol": 1e-5}
            np.testing.assert_allclose(scores["mean_loss"][s, n], np.mean(losses), **close)
            tail = num_steps // 2 // 10 * 2
            np.testing.assert_allclose(scores["final_loss"][s, n], np.mean(losses[-tail:]), **close)
            query = min(10.0, np.abs(p - data).sum())
            np.testing.assert_allclose(scores["query_loss"][s, n], query, **close)
            np.testing.assert_allclose(scores["accuracy"][s, n], p[0], **close)


def test_one_compilation_for_all_horizons():
    traced = []

    def counted(setting, num_steps):
        traced.append(num_steps)
        return optax.sgd(setting)

    trainer = make_trainer(FAMILY, counted, segment=2)
    trainer(np.float32([0.1]), KEYS, 2)
    first = len(traced)
    trainer(np.float32([0.1]), KEYS, 8)
    assert len(traced) == first > 0


def test_settings_that_diverge_count_as_the_largest_loss():
    scores = make_trainer(FAMILY, sgd, segment=2)(np.float32([1e8]), KEYS, 20)
    assert np.all(scores["final_loss"] == 10.0) and np.all(scores["query_loss"] == 10.0)


def test_horizon_that_is_no_multiple():
    with pytest.raises(ValueError, match=r"num_steps must be a multiple of 2, got 5"):
        make_trainer(FAMILY, sgd, segment=2)(np.float32([0.1]), KEYS, 5)


def test_best_of_each_score():
    scores = {
        "mean_loss": np.array([[1.0, 3.0], [1.5, 1.5]]),
        "accuracy": np.array([[0.2, 0.4], [0.1, 0.2]]),
    }
    found = best_of(scores)
    assert found == {"mean_loss": 1.5, "accuracy": pytest.approx(0.3)}


@pytest.mark.parametrize("cosine", [False, True])
def test_adam_is_that_of_optax(cosine):
    settings, params = adam_settings(cosine=cosine), jnp.array([1.0, -2.0])
    assert settings["rate"].tolist() == np.float32(ADAM_RATES).tolist()
    ours = adam(jax.tree.map(lambda leaf: leaf[2], settings), 4)
    rate = optax.cosine_decay_schedule(0.01, 4) if cosine else 0.01
    theirs = optax.adam(rate)
    states = [ours.init(params), theirs.init(params)]
    for i in range(6):
        gradients = params + i
        (mine, states[0]), (other, states[1]) = (
            o.update(gradients, s) for o, s in zip((ours, theirs), states, strict=True)
        )
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-9)
