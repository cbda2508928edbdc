import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lohp_jax.data.volume import synthetic_volume
from lohp_jax.trajectories.rollout import rollout
from lohp_jax.workloads.siren import init_siren, position, render, siren, siren_apply, siren_widths

KEY = jax.random.key(0)
W0 = 20.0
RNG = np.random.default_rng(0)
VOLUME = RNG.integers(1000, 5000, (4, 5, 6)).astype(np.uint16)


def count(widths):
    return sum(n * m + m for n, m in itertools.pairwise(widths))


def network(params, x):
    """Outputs `[N]` at `x` `[N, 3]`, in float64."""
    layers = [params[f"linear_{i}"] for i in range(len(params))]
    for i, layer in enumerate(layers):
        x = x @ np.asarray(layer["w"], np.float64) + np.asarray(layer["b"], np.float64)
        x = x if i == len(layers) - 1 else np.sin(W0 * x)
    return x[:, 0]


def grid(shape):
    axes = (np.linspace(-1, 1, n) for n in shape)
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


def test_the_budget_of_the_paper():
    """64³ voxels of 2 bytes, ratio 256, 4 bytes a weight: 512 weights, in seven layers."""
    family = siren()
    params = jax.eval_shape(family.init, KEY)
    shapes = [params[f"linear_{i}"]["w"].shape for i in range(len(params))]
    assert shapes == list(itertools.pairwise((3, 17, 8, 8, 8, 8, 8, 1)))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 509 <= 64**3 * 2 / 256 / 4


def test_the_batch_of_the_paper():
    family = siren(VOLUME, ratio=1.0)
    data = family.sample(KEY)
    text = str(jax.make_jaxpr(lambda p: family.loss(p, data, KEY))(family.init(KEY)))
    assert "f32[100000]" in text and "f32[4096]" not in text


def test_half_the_bytes_leave_half_the_weights():
    volume = (RNG.random((16, 16, 16)) * 255).astype(np.uint8)
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(siren(v, ratio=8).init, KEY)))
        for v in (volume, volume.astype(np.uint16))
    ]
    assert sizes == [count(siren_widths(n)) for n in (128, 256)]


@pytest.mark.parametrize("hidden_layers", [1, 2, 6])
@pytest.mark.parametrize("num_weights", [21, 512, 5000])
def test_the_widest_network_that_fits(num_weights, hidden_layers):
    widths = siren_widths(num_weights, hidden_layers)
    fits = {}
    for f in range(1, 1200):
        candidate = (3, int(f * 2.2), *(f,) * (hidden_layers - 1), 1)
        fits[candidate] = count(candidate) <= num_weights
    assert widths == max((w for w, fit in fits.items() if fit), key=count)


def test_initial_weights():
    widths = (3, 400, 300, 1)
    params = init_siren(KEY, widths, w0=W0)
    for i, limit in enumerate([1 / 3, np.sqrt(6 / 400) / W0, np.sqrt(6 / 300) / W0]):
        w, b = params[f"linear_{i}"]["w"], params[f"linear_{i}"]["b"]
        assert w.shape == widths[i : i + 2] and w.dtype == b.dtype == jnp.float32
        assert 0.98 * limit < np.abs(w).max() <= limit
        assert np.abs(b).max() <= 1 / np.sqrt(widths[i])
    assert np.abs(params["linear_0"]["b"]).max() > 0.98 / np.sqrt(3)


def test_positions_are_a_grid_between_the_corners():
    shape = (4, 5, 6)
    actual = jax.vmap(lambda voxel: position(voxel, shape))(jnp.arange(120))
    np.testing.assert_allclose(actual, grid(shape), atol=1e-6)


def test_the_network_equals_its_definition():
    params, x = init_siren(KEY, (3, 11, 5, 5, 1)), RNG.uniform(-1, 1, (7, 3))
    actual = jax.vmap(lambda c: siren_apply(params, c))(jnp.float32(x))
    np.testing.assert_allclose(actual, network(params, x), atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 5, 6), (26, 26, 26)])  # 120 and 17,576 voxels
def test_a_volume_is_rendered_voxel_by_voxel(shape):
    params = init_siren(KEY, (3, 8, 4, 1))
    expected = network(params, grid(shape)).reshape(shape)
    np.testing.assert_allclose(render(params, shape), expected, atol=1e-5)


def test_scores_by_their_definition():
    family = siren(VOLUME, ratio=1.0)
    params, data = family.init(KEY), family.sample(KEY)
    raw = VOLUME.astype(np.float64)
    low, high = raw.min(), raw.max()
    output = network(params, grid(VOLUME.shape)).reshape(VOLUME.shape)
    error = np.mean((output - 100 * (raw - low) / (high - low)) ** 2)
    raw_error = np.mean((low + output / 100 * (high - low) - raw) ** 2)
    scores = family.evaluate(params, data)
    np.testing.assert_allclose(scores["objective"], error, rtol=1e-5)
    np.testing.assert_allclose(scores["loss"], error, rtol=1e-5)
    np.testing.assert_allclose(scores["psnr_type"], 10 * np.log10(65535**2 / raw_error), rtol=1e-5)
    np.testing.assert_allclose(
        scores["psnr_data"], 10 * np.log10((high - low) ** 2 / raw_error), rtol=1e-5
    )
    assert data["intensity"].min() == 0 and data["intensity"].max() == 100


def test_a_batch_estimates_the_loss():
    whole, batches = (
        siren(VOLUME, ratio=1.0, batch_size=None),
        siren(VOLUME, ratio=1.0, batch_size=64),
    )
    params, data = whole.init(KEY), whole.sample(KEY)
    expected = whole.evaluate(params, data)["loss"]
    np.testing.assert_allclose(whole.loss(params, data, KEY), expected, rtol=1e-5)
    losses = jax.vmap(lambda key: batches.loss(params, data, key))(jax.random.split(KEY, 300))
    assert len(np.unique(losses)) > 250
    np.testing.assert_allclose(np.mean(losses), expected, rtol=0.02)


def test_synthetic_tasks_differ_by_key_and_split():
    family = siren(size=16, ratio=32)
    sample = jax.jit(family.sample, static_argnums=1)
    samples = [
        np.asarray(sample(jax.random.key(seed), split)["intensity"])
        for seed in (0, 1)
        for split in ("train", "held_out")
    ]
    assert all(np.mean(a != b) > 0.9 for i, a in enumerate(samples) for b in samples[:i])
    assert family.context(family.sample(KEY), KEY) == () and family.name == "siren"


def test_adamax_compresses():
    """To predict the mean costs the variance of the intensities, here 231.

    Measured after 1500 steps from three starts: 45 to 73.
    """
    volume = np.asarray(synthetic_volume(KEY, 16))
    family = siren(volume, ratio=16, hidden_layers=2, batch_size=256)
    data = family.sample(KEY)

    @jax.jit
    def final_loss(key):
        path = rollout(
            family,
            optax.adamax(0.02),
            data,
            family.init(key),
            key,
            num_steps=1500,
            record_every=1500,
        )
        return family.evaluate(jax.tree.map(lambda state: state[-1], path.states), data)["loss"]

    assert final_loss(KEY) < 0.5 * np.var(data["intensity"])


@pytest.mark.parametrize(
    "volume, options, message",
    [
        (
            VOLUME.astype(np.float32),
            {},
            "siren: expected .* uint16, .* got float32; use `resample",
        ),
        (VOLUME[0], {}, r"siren: expected an array of three axes .* got shape \(5, 6\)"),
        (
            np.full((4, 4, 4), 7, np.uint8),
            {},
            "siren: expected a volume that varies, got 7 everywhere",
        ),
        (VOLUME, {"ratio": 0}, "siren: ratio must be positive and finite, got 0"),
        (
            VOLUME,
            {"ratio": 256},
            "siren_widths: no network .* fits into 0 weights; use a smaller ratio",
        ),
        (VOLUME, {"w0": float("nan")}, "siren: w0 must be positive and finite, got nan"),
        (VOLUME, {"batch_size": 0}, "siren: batch_size must be at least 1, got 0"),
        (VOLUME, {"hidden_layers": 0}, "siren: hidden_layers must be at least 1, got 0"),
        (None, {"size": 1}, "siren_widths: no network .* use a smaller ratio or a larger volume"),
    ],
)
def test_siren_rejects(volume, options, message):
    with pytest.raises(ValueError, match=message):
        siren(volume, **options)


def test_sample_rejects_an_unknown_split():
    with pytest.raises(ValueError, match=r"sample: split must be one of .*, got 'test'"):
        siren(VOLUME, ratio=1.0).sample(KEY, "test")
