import dataclasses

import jax
import numpy as np
import pytest

from lohp_jax.evaluation import scores
from lohp_jax.runs import rivals
from lohp_jax.runs.config import RIVALS, EvaluationConfig, from_json
from lohp_jax.runs.rivals import check_rivals, make_rival
from lohp_jax.tasks import make_family
from lohp_jax.tasks.regression import sine_regression


@pytest.fixture(scope="module")
def family():
    return make_family("digits_5way", shots=5)


@pytest.mark.parametrize(
    "name",
    [
        *("maml", "prototypes"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("maml_first_order", "reptile")),
    ],
)
def test_a_rival_is_tuned_on_training_tasks_and_says_what_it_took(family, name, monkeypatch):
    monkeypatch.setattr(rivals, "INNER_RATES", (1e-9, 1.0))
    monkeypatch.setattr(rivals, "STEPS", (1, 2))
    tuning = scores.draw_tasks(family, jax.random.key(0), 8, "train")
    generator, told = make_rival(family, name, jax.random.key(1), 5, tuning)
    assert 0 < told["compile_seconds"] < told["train_seconds"] and told["updates"] == 5
    if name != "prototypes":
        assert told["rate"] == 1.0  # the other one learns nothing
        assert generator.gradients == told["num_steps"] in (1, 2)
    held_out = scores.draw_tasks(family, jax.random.key(2), 8, "held_out")
    producer = scores.make_producer(scores.from_generator(generator))
    weights = producer.many(held_out.contexts, held_out.keys)
    assert scores.scores(family, weights, held_out.data).mean() > 0.5  # chance is 0.2
    assert np.isfinite(weights["head"]["w"]).all()


def test_a_rival_that_a_family_cannot_have_is_refused(family):
    check_rivals(family, RIVALS)
    check_rivals(sine_regression(), ("maml", "maml_first_order", "reptile"))
    with pytest.raises(ValueError, match=r"prototypes needs labelled examples.*'sine' has none"):
        check_rivals(sine_regression(), ("prototypes",))
    blind = dataclasses.replace(family, context_loss=None)
    with pytest.raises(ValueError, match=r"reptile descends the context loss.*'digits_5way' lacks"):
        check_rivals(blind, ("reptile",))


def test_settings_of_rivals_are_checked():
    assert from_json({"rivals": ["maml"]}, EvaluationConfig).rivals == ("maml",)
    with pytest.raises(ValueError, match="maml"):
        EvaluationConfig(rivals=("mamml",))
    with pytest.raises(ValueError, match="none twice"):
        EvaluationConfig(rivals=("maml", "maml"))
    with pytest.raises(ValueError, match="rival_updates must be at least 1"):
        EvaluationConfig(rival_updates=0)
    assert set(rivals._MAKERS) == set(RIVALS)
