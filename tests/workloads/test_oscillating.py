import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lohp_jax.optimizers.hub import hand_shares
from lohp_jax.workloads.oscillating import oscillating, oscillation

KEY = jax.random.key(0)
FORMS = ("radial", "separable")


def objective(family, x):
    return family.loss({"x": jnp.asarray(x)}, (), KEY)


def gradient(family, x):
    return jax.grad(lambda x: objective(family, x))(jnp.asarray(x))


def slope(s, lambda_):
    return 1 + 2 * lambda_ * s + np.cos(1 / s) + np.sin(1 / s) / s


@pytest.mark.parametrize("lambda_", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("k", [0, 1, 5, 40])
def test_values_and_slopes_in_closed_form(k, lambda_):
    with jax.enable_x64(True):
        value_and_slope = jax.value_and_grad(lambda s: oscillation(s, lambda_))
        odd = (2 * k + 1) * np.pi
        value, slope = value_and_slope(jnp.float64(1 / odd))
        np.testing.assert_allclose(value, lambda_ / odd**2, rtol=1e-10)
        np.testing.assert_allclose(slope, 2 * lambda_ / odd, rtol=1e-8)
        quarter = (4 * k + 1) * np.pi
        slope = value_and_slope(jnp.float64(2 / quarter))[1]
        np.testing.assert_allclose(slope, 1 + 4 * lambda_ / quarter + quarter / 2, rtol=1e-10)


@settings(deadline=None, max_examples=30)
@given(
    x=st.lists(st.floats(-1, 1).filter(lambda v: abs(v) > 1e-3), min_size=3, max_size=3),
    lambda_=st.floats(0.01, 5),
)
def test_gradients_follow_the_sign(x, lambda_):
    x = np.array(x)
    with jax.enable_x64(True):
        radial = gradient(oscillating(len(x), lambda_=lambda_), x)
        separable = gradient(oscillating(len(x), form="separable", lambda_=lambda_), x)
    size = np.abs(x)
    np.testing.assert_allclose(
        radial, slope(size.sum(), lambda_) * np.sign(x), rtol=1e-7, atol=1e-7
    )
    np.testing.assert_allclose(separable, slope(size, lambda_) * np.sign(x), rtol=1e-7, atol=1e-7)


def test_the_forms_agree_in_one_dimension_only():
    x = [0.3, -0.2]
    one = [objective(oscillating(1, form=form, lambda_=1.0), x[:1]) for form in FORMS]
    two = [objective(oscillating(2, form=form, lambda_=1.0), x) for form in FORMS]
    assert one[0] == one[1] and abs(two[0] - two[1]) > 0.1


@pytest.mark.parametrize("dimension", [2, 1000])
def test_the_gate_of_hub_is_constant_in_the_radial_form_alone(dimension):
    """Equal |g_i| make s = 1 / K (HUB paper, eq. 10) at every point."""
    shares = {}
    for form in FORMS:
        family = oscillating(dimension, form=form, width=1.0 / dimension)
        params = family.init(jax.random.key(1))
        grads = jax.grad(family.loss)(params, (), KEY)
        shares[form] = np.asarray(hand_shares(grads)["x"])
    np.testing.assert_allclose(shares["radial"], 1 / dimension, rtol=1e-6)
    assert np.ptp(shares["separable"]) > 0.1 / dimension


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("x", [[0.0, 0.0], [0.0, 0.5], [1e-30, 0.0], [-1e-38, 1e-22], [1e-18, 0.0]])
def test_value_and_gradient_are_finite_near_zero(form, x):
    family = oscillating(2, form=form)
    value, grads = objective(family, np.float32(x)), gradient(family, np.float32(x))
    assert value >= 0 and np.all(np.isfinite(grads))
    np.testing.assert_array_equal(np.asarray(grads)[np.array(x) == 0], 0)


@settings(deadline=None)
@given(s=st.floats(0, 10, width=32), lambda_=st.floats(0.01, 5))
def test_the_minimum_is_at_zero(s, lambda_):
    value = oscillation(jnp.float32(s), lambda_)
    assert oscillation(jnp.float32(0), lambda_) == 0
    assert lambda_ * s**2 * (1 - 1e-5) - 1e-6 <= value <= (2 * s + lambda_ * s**2) * (1 + 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_settings_of_the_paper(form):
    """λ = .01 and d = 1000, so that f(s) is .01 s² where it touches its bound, here at s = 1 / π."""
    family = oscillating(form=form)
    x = jnp.zeros(1000).at[7].set(-1 / np.pi)
    assert family.init(KEY)["x"].shape == (1000,)
    np.testing.assert_allclose(objective(family, x), 0.01 / np.pi**2, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [1.0, 1e-3])
def test_the_start_is_uniform_within_its_width(form, width):
    family = oscillating(form=form, width=width)
    x = np.asarray(jax.vmap(family.init)(jax.random.split(KEY, 20))["x"])
    assert x.shape == (20, 1000) and x.dtype == np.float32
    assert 0.999 * width < np.abs(x).max() <= width and abs(x.mean()) < 0.02 * width
    np.testing.assert_allclose(
        np.abs(x).sum(-1), 500 * width, rtol=0.06
    )  # |x| has the mean width / 2


@pytest.mark.parametrize("form", FORMS)
def test_the_family_has_one_task(form):
    family = oscillating(3, form=form, lambda_=0.5)
    params = {"x": jnp.array([0.1, 0.2, -0.4])}
    data = family.sample(KEY, "held_out")
    scores = family.evaluate(params, data)
    assert family.name == f"oscillating_{form}" and family.context(data, KEY) == ()
    assert scores["objective"] == scores["loss"] == family.loss(params, data, KEY)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"form": "radail"}, r"form must be one of \('radial', 'separable'\), got 'radail'"),
        ({"dimension": 0}, "dimension must be at least 1, got 0"),
        ({"lambda_": 0.0}, "lambda_ must be positive and finite, got 0.0"),
        ({"lambda_": float("nan")}, "lambda_ must be positive and finite, got nan"),
        ({"width": 0.0}, "width must be positive and finite, got 0.0"),
    ],
)
def test_oscillating_rejects(options, message):
    with pytest.raises(ValueError, match=f"oscillating: {message}"):
        oscillating(**options)


def test_sample_rejects_an_unknown_split():
    with pytest.raises(ValueError, match=r"sample: split must be one of .*, got 'test'"):
        oscillating().sample(KEY, "test")
