"""Gradients and their signal-to-noise against closed forms, weights, and the ledger of calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.diffusion.guidance import (
    GuidanceConfig,
    gate,
    gate_start,
    gradient_calls,
    gradients_at,
    observe,
    resolve_weights,
)
from lohp_jax.diffusion.schedule import alpha_sigma

BOTH = ("gradient", "smoothed_gradient")
EVERYTHING = ("parameters", *BOTH)
RNG = np.random.default_rng(0)
Z = RNG.normal(size=3).astype(np.float32)
HALF_WAY = jnp.zeros(())
"""λ where α² = σ² = 1/2."""


def take(objective, probes=4, log_snr=HALF_WAY, parts=BOTH, **options):
    options |= {"parts": parts, "probes": probes}
    return gradients_at(objective, Z, log_snr, jax.random.key(0), **options)


def quadratic(y):
    return y @ jnp.diag(jnp.array([1.0, 2.0, 5.0])) @ y / 2 + 3.0 * y[0]


def test_antithetic_probes_are_exact_on_a_quadratic():
    """So that their smoothed gradient is trusted as far as numbers go."""
    gradients = take(quadratic, probes=2)
    alpha, _ = alpha_sigma(0.0)
    exact = np.array([1.0, 2.0, 5.0]) * np.float64(alpha) * Z + np.array([3.0, 0, 0])
    np.testing.assert_allclose(gradients.values["gradient"], exact, rtol=1e-5)
    np.testing.assert_allclose(gradients.values["smoothed_gradient"], exact, rtol=1e-5, atol=1e-6)
    assert gradients.log_snr["smoothed_gradient"] == 10


def test_gradients_can_be_taken_around_z_over_alpha():
    gradients = take(quadratic, log_snr=jnp.float32(1.0), around="scaled")
    exact = np.array([1.0, 2.0, 5.0]) * Z * np.sqrt(1 + np.exp(-1)) + np.array([3.0, 0, 0])
    for value in gradients.values.values():
        np.testing.assert_allclose(value, exact, rtol=1e-4, atol=1e-5)


def test_gradients_and_snr_of_a_rippled_quadratic():
    """h |y|² / 2 + c Σ cos(w y): moments of cos(w σ d) for normal d are exponentials."""
    h, c, w, probes = 2.0, 0.5, 4.0, 8192
    gradients = take(lambda y: h * y @ y / 2 + c * jnp.sum(jnp.cos(w * y)), probes=probes)
    y, sigma = np.sqrt(0.5) * Z.astype(np.float64), np.sqrt(0.5)
    damped = np.exp(-((w * sigma) ** 2) / 2)
    mean = h * y - c * w * damped * np.sin(w * y)
    cosine_variance = (1 + damped**4) / 2 - damped**2
    sine_variance = (1 - damped**4) / 2
    pair = ((c * w * np.sin(w * y)) ** 2 * cosine_variance).sum()
    # a single probe also has the part odd in d: h σ d - c w cos(w y) sin(w σ d)
    cross = h * sigma * c * w * np.cos(w * y) * w * sigma * damped
    odd = (h * sigma) ** 2 - 2 * cross + (c * w * np.cos(w * y)) ** 2 * sine_variance
    values, log_snr = gradients
    np.testing.assert_allclose(values["gradient"], h * y - c * w * np.sin(w * y), rtol=1e-4)
    np.testing.assert_allclose(values["smoothed_gradient"], mean, atol=0.05)
    expected = np.log((mean**2).sum() / (pair + odd.sum()))
    np.testing.assert_allclose(log_snr["gradient"], expected, atol=0.1)
    few = take(lambda y: h * y @ y / 2 + c * jnp.sum(jnp.cos(w * y)), probes=2)
    assert few.log_snr["smoothed_gradient"] < log_snr["smoothed_gradient"]
    many = np.log((mean**2).sum() / (pair / probes))
    np.testing.assert_allclose(log_snr["smoothed_gradient"], min(10, many), atol=0.1)


def test_the_snr_of_noise_is_about_zero():
    """Without the subtraction it would be about 1, and the gate half open."""

    @jax.jit
    @jax.vmap
    def weight(key):
        part = "smoothed_gradient"
        gradients = gradients_at(
            lambda y: jnp.sum(jnp.cos(40.0 * y)), Z, HALF_WAY, key, parts=(part,), probes=8
        )
        return jax.nn.sigmoid(gradients.log_snr[part])

    assert weight(jax.random.split(jax.random.key(1), 200)).mean() < 0.3


def test_a_gradient_that_is_not_finite_is_taken_as_zero():
    gradients = take(lambda y: jnp.sum(jnp.sqrt(y - y)), with_snr=False)
    np.testing.assert_array_equal(gradients.values["gradient"], np.zeros(3))
    np.testing.assert_array_equal(gradients.values["smoothed_gradient"], np.zeros(3))


def see(config, objective=quadratic, gates=None, previous=None, keep=None, **weights):
    return observe(
        config,
        gate_start(config) if gates is None else gates,
        objective,
        jnp.arange(2.0),
        "prepared",
        jnp.asarray(Z),
        HALF_WAY,
        previous,
        jax.random.key(0),
        weights=resolve_weights(config, weights),
        keep=keep,
    )


def test_gradients_enter_without_units():
    config = GuidanceConfig(EVERYTHING)
    small, large = see(config), see(config, lambda y: 1e4 * quadratic(y))
    np.testing.assert_allclose(large.vectors, small.vectors, rtol=1e-4)
    np.testing.assert_allclose((small.vectors**2).mean(axis=0), [1, 1], rtol=1e-4)
    np.testing.assert_array_equal(small.features, [0, 1])
    assert small.prepared == "prepared" and small.known == 1
    log_size = (large.scalars - small.scalars) * 5
    np.testing.assert_allclose(log_size, np.log(1e4) * np.isin(range(7), [2, 5]), atol=1e-3)


@pytest.mark.parametrize("part", EVERYTHING)
def test_a_part_that_is_off_is_zeros_and_its_flag_too(part):
    """By its weight at sampling, and by dropout in training."""
    config = GuidanceConfig(EVERYTHING)
    keep = {p: jnp.float32(p != part) for p in EVERYTHING}
    on = see(config)
    for off in (see(config, **{part: 0.0}), see(config, keep=keep)):
        if part == "parameters":
            assert off.known == 0 == off.scalars[0] and not off.features.any()
            np.testing.assert_array_equal(off.vectors, on.vectors)
        else:
            column = BOTH.index(part)
            assert not off.vectors[:, column].any() and on.vectors[:, column].all()
            assert not off.scalars[1 + 3 * column : 4 + 3 * column].any()
            np.testing.assert_array_equal(off.vectors[:, 1 - column], on.vectors[:, 1 - column])
            np.testing.assert_array_equal(off.features, on.features)


def test_learned_gates_start_as_wieners_and_learn():
    learned, wiener = (GuidanceConfig(EVERYTHING, combination=c) for c in ("learned", "wiener"))

    def rippled(y):
        return quadratic(y) + jnp.sum(jnp.cos(4.0 * y))

    seen = [see(config, rippled) for config in (learned, wiener)]
    np.testing.assert_allclose(seen[0].vectors, seen[1].vectors, rtol=1e-5)
    flag = float(seen[0].scalars[4])
    assert 0.01 < flag < 0.99
    slope = jax.grad(lambda gates: see(learned, rippled, gates).vectors[0, 1])(gate_start(learned))
    assert np.abs(slope["smoothed_gradient"]).min() == 0 < np.abs(slope["smoothed_gradient"]).max()
    assert gate(jnp.zeros(6), HALF_WAY, HALF_WAY) == 0.5
    assert see(learned, rippled, smoothed_gradient="wiener").scalars[4] == flag


@pytest.mark.parametrize("combination", ["fixed", "wiener", "learned"])
def test_snrs_are_shown_as_in_training_whatever_the_weights(combination):
    """So that no input changes its meaning: a denoiser that never saw one does not, and the reverse."""
    config = GuidanceConfig(EVERYTHING, combination=combination)

    def rippled(y):
        return quadratic(y) + jnp.sum(jnp.cos(4.0 * y))

    for weights in ({}, {"gradient": "wiener", "smoothed_gradient": 0.5}):
        shown = see(config, rippled, **weights).scalars[jnp.array([3, 6])]
        assert np.all(shown == 0) if combination == "fixed" else np.all(shown != 0)


def test_a_training_can_move_learned_gates():
    """A tenth in a coefficient, a few hundred updates of Adam, turns the odds by e."""
    start = gate_start(GuidanceConfig(BOTH, combination="learned"))["gradient"]
    for size in (0.0, 0.5):
        before, after = (
            gate(p, HALF_WAY, jnp.float32(size)) for p in (start, start.at[0].add(0.1))
        )
        np.testing.assert_allclose(after / (1 - after), np.e * before / (1 - before), rtol=1e-5)
        np.testing.assert_allclose(before, 1 / (1 + np.exp(-size)), rtol=1e-5)


def test_the_x0_before_is_fed_where_it_is_given():
    config = GuidanceConfig(("parameters",))
    assert see(config).vectors.shape == (3, 0)
    np.testing.assert_array_equal(see(config, previous=jnp.ones(3)).vectors, np.ones((3, 1)))


def counted(config, weights):
    """Gradients that one observation really takes."""
    calls = []

    @jax.custom_vjp
    def objective(y):
        return quadratic(y)

    def backward(y, cotangent):
        jax.debug.callback(lambda _: calls.append(1), y[0])
        return (cotangent * y,)

    objective.defvjp(lambda y: (quadratic(y), y), backward)
    jax.block_until_ready(see(config, objective, **weights).vectors)
    jax.effects_barrier()
    return len(calls)


@pytest.mark.parametrize(
    "config, weights",
    [
        (GuidanceConfig(), {}),
        (GuidanceConfig(("gradient",)), {}),
        (GuidanceConfig(("gradient",), combination="wiener", probes=3), {}),
        (GuidanceConfig(BOTH, probes=2), {}),
        (GuidanceConfig(BOTH, combination="learned"), {"gradient": 0.0}),
        (GuidanceConfig(BOTH, combination="wiener"), {"gradient": 0.5, "smoothed_gradient": 0.0}),
        (GuidanceConfig(BOTH), {"gradient": "wiener", "smoothed_gradient": 0.0}),
    ],
)
def test_gradient_calls_are_those_that_are_made(config, weights):
    calls = counted(config, weights)
    assert gradient_calls(config, 1, weights=weights) == calls
    assert gradient_calls(config, 10, 4, weights=weights) == 40 * calls
    assert gradient_calls(config, 10, sampler="heun", weights=weights) == 19 * calls


@pytest.mark.parametrize(
    "options, message",
    [
        ({"parts": ("gradients",)}, r"parts must be one of .* did you mean 'gradient'\?"),
        ({"parts": ("gradient", "gradient")}, "parts must name each part once"),
        ({"combination": "weiner"}, r"combination must be .* did you mean 'wiener'\?"),
        (
            {"dropout": (0.1, 0.2)},
            r"dropout must have 1 number or one for each of \('parameters',\)",
        ),
        ({"dropout": (1.0,)}, r"dropout must be in \[0, 1\), got \(1\.0,\)"),
        ({"around": "means"}, r"around must be .* did you mean 'mean'\?"),
        ({"probes": 1}, "probes must be at least 2, .* got 1"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GuidanceConfig(**options)


@pytest.mark.parametrize("weight", [2, np.float32(2.0), np.int64(2)])
def test_a_weight_is_any_number(weight):
    assert resolve_weights(GuidanceConfig(), {"parameters": weight}) == {"parameters": 2.0}


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"gradiant": 1.0}, r"guidance must be one of .* did you mean 'gradient'\?"),
        ({"gradient": "learned"}, r"weight of 'gradient' must be .* got 'learned'"),
        ({"gradient": float("nan")}, r"weight of 'gradient' must be a finite number.* got nan"),
        ({"parameters": "wiener"}, r"weight of 'parameters' must be .* got 'wiener'"),
    ],
)
def test_bad_weights_are_named(weights, message):
    with pytest.raises(ValueError, match=message):
        resolve_weights(GuidanceConfig(EVERYTHING), weights)
