import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Ridge

from lohp_jax.baselines import ridge_probe as probes
from lohp_jax.baselines.heads import example_entries, linear_head
from lohp_jax.baselines.mean_weights import mean_weights
from lohp_jax.baselines.ridge_probe import fit_probe, ridge_probe, tune_probe
from lohp_jax.codec import make_codec
from lohp_jax.evaluation.scores import draw_tasks
from lohp_jax.generation import generate
from lohp_jax.tasks import make_family
from lohp_jax.tasks.regression import sine_regression
from lohp_jax.tasks.support import canonical_order, relabel


@pytest.fixture(scope="module", params=["linear", "mlp"])
def digits(request):
    return make_family("digits_5way", network=request.param)


def features_by_hand(params, x):
    flat = np.asarray(x).reshape(len(x), -1)
    for name, layer in params.items():
        if name != "head":
            flat = np.maximum(flat @ np.asarray(layer["w"]) + np.asarray(layer["b"]), 0)
    return flat


def a_task(family):
    data = draw_tasks(family, jax.random.key(1), 1, "held_out")
    return jax.tree.map(lambda leaf: leaf[0], data)


def test_features_are_what_the_last_layer_sees(digits):
    head, task = linear_head(digits), a_task(digits)
    params = digits.init(jax.random.key(0))
    assert head.alone == (set(params) == {"head"})
    expected = features_by_hand(params, task.contexts["x"])
    actual = jax.jit(head.features)(params, task.contexts)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_put_replaces_the_last_layer_alone(digits):
    head, params = linear_head(digits), digits.init(jax.random.key(0))
    width = params["head"]["w"].shape[0]
    made = head.put(params, jnp.ones((width, 5)), jnp.full(5, 2.0))
    np.testing.assert_array_equal(made["head"]["w"], np.ones((width, 5)))
    np.testing.assert_array_equal(made["head"]["b"], np.full(5, 2.0))
    for name in set(params) - {"head"}:
        np.testing.assert_array_equal(made[name]["w"], params[name]["w"])


def test_families_without_such_a_layer(digits):
    assert linear_head(sine_regression()) is None
    assert example_entries(sine_regression()) is None
    assert linear_head(dataclasses.replace(digits, class_axes=None)) is None
    assert linear_head(dataclasses.replace(digits, context_loss=None)) is None

    def another(params, context):  # the same layer under another loss
        return 0.5 * digits.context_loss(params, context)

    assert linear_head(dataclasses.replace(digits, context_loss=another)) is None


def test_the_probe_is_ridge_regression_of_the_labels(digits):
    head, task = linear_head(digits), a_task(digits)
    params = digits.init(jax.random.key(0))
    features = features_by_hand(params, task.contexts["x"]).astype(np.float64)
    oracle = Ridge(alpha=0.3).fit(features, np.eye(5)[np.asarray(task.contexts["y"])])
    fitted = fit_probe(digits, head, params, task.contexts, 0.3)["head"]
    np.testing.assert_allclose(fitted["w"], oracle.coef_.T, rtol=1e-2, atol=2e-4)
    np.testing.assert_allclose(fitted["b"], oracle.intercept_, rtol=1e-2, atol=2e-3)


def test_the_penalty_is_the_best_on_training_tasks(digits, monkeypatch):
    monkeypatch.setattr(probes, "PENALTIES", (1e-4, 1.0, 1e6))
    head, params = linear_head(digits), digits.init(jax.random.key(0))
    tasks = draw_tasks(digits, jax.random.key(2), 8, "train")
    means = {}
    for penalty in probes.PENALTIES:
        fitted = jax.vmap(lambda c, p=penalty: fit_probe(digits, head, params, c, p))(
            tasks.contexts
        )
        means[penalty] = jax.vmap(digits.evaluate)(fitted, tasks.data)["accuracy"].mean()
    tuned = tune_probe(digits, head, params, tasks.data, tasks.contexts)
    assert means[tuned.penalty] == max(means.values()) > 0.6
    task = a_task(digits)
    made = generate(ridge_probe(digits, head, params, tuned), task.contexts, jax.random.key(0))
    expected = fit_probe(digits, head, params, task.contexts, tuned.penalty)
    np.testing.assert_allclose(made["head"]["w"][0], expected["head"]["w"], rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"expected x of shape \[n, 8, 8, 1\]"):
        generate(
            ridge_probe(digits, head, params, tuned),
            {"x": jnp.zeros((5, 4)), "y": jnp.arange(5)},
            jax.random.key(0),
        )


def test_mean_weights_go_by_the_names_of_the_task(digits):
    params = digits.init(jax.random.key(0))
    codec = make_codec(params, channels=4, class_axes=digits.class_axes)
    tokens = jax.random.normal(jax.random.key(1), (6, *codec.mask.shape))
    generator = mean_weights(digits, codec, tokens)
    context = a_task(digits).contexts
    context = context | {"y": (context["y"] + 2) % 5}
    _, rank = canonical_order(digits, context)
    assert rank.tolist() != list(range(5))
    expected = relabel(codec.decode(tokens.mean(axis=0)), digits.class_axes, rank)
    made = generate(generator, context, jax.random.key(0))
    np.testing.assert_allclose(made["head"]["w"][0], expected["head"]["w"], rtol=1e-6)
    assert generator.gradients == 0
