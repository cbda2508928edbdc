"""Bounds and rank correlations of the PAC-Bayes study, by their definitions, and its data."""

import itertools
import math

import jax
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.diffl2o_pac_bayes import bounds, report, training


def kl_by_definition(q, p):
    return sum(a * math.log(a / b) for a, b in ((q, p), (1 - q, 1 - p)) if a > 0)


@pytest.mark.parametrize("q", [0.0, 0.01, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("budget", [0.0, 1e-3, 0.1, 2.0])
def test_kl_inverse_equals_a_search_of_a_grid(q, budget):
    grid = np.linspace(q, 1.0, 20001)[:-1]
    inside = [p for p in grid if p > 0 and kl_by_definition(q, p) <= budget + 1e-15]
    expected = max(inside, default=q)
    assert bounds.kl_inverse(q, budget) == pytest.approx(expected, abs=1.1e-4)


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 0.99), st.floats(0, 50), st.integers(8, 10**5), st.floats(1e-6, 0.5))
def test_the_bound_grows_with_loss_and_kl_and_falls_with_instances_and_delta(
    q, divergence, n, delta
):
    bound = bounds.pac_bayes_bound(q, divergence, n, delta)
    assert q <= bound <= 1.0
    assert bounds.pac_bayes_bound(min(1.0, q + 0.01), divergence, n, delta) >= bound
    assert bounds.pac_bayes_bound(q, divergence + 1, n, delta) >= bound
    assert bounds.pac_bayes_bound(q, divergence, 2 * n, delta) <= bound
    assert bounds.pac_bayes_bound(q, divergence, n, delta / 2) >= bound


def test_bounds_refuse_what_they_do_not_hold_for():
    with pytest.raises(ValueError, match="n >= 8 instances, got 7"):
        bounds.pac_bayes_bound(0.1, 0.0, 7, 0.05)
    with pytest.raises(ValueError, match=r"q in \[0, 1\]"):
        bounds.kl_inverse(1.1, 0.0)


def test_the_bound_of_coins_covers_their_chance():
    """Means of coins are below it in all but delta of many draws, though it is not slack."""
    rng, p, n, delta = np.random.default_rng(0), 0.2, 50, 0.1
    means = rng.binomial(n, p, 20000) / n
    found = {mean: bounds.monte_carlo_bound(mean, n, delta) for mean in np.unique(means)}
    misses = np.mean([found[mean] < p for mean in means])
    assert 0.005 < misses <= delta


def test_certificates_cover_the_known_risk_of_a_trained_posterior():
    """A direction w in the plane is learned from n labels with noise; its Gibbs risk has a closed form.

    A prior N(e_1, s²) and a posterior around what the labels say; the loss of w at x is whether
    the sign of w·x is wrong, labels are those of e_1, turned over with chance 0.1. Then the risk of w
    is 0.1 + 0.8 angle / pi.
    """
    rng, n, draws, spreads = np.random.default_rng(0), 64, 128, (0.1, 0.5, 1.0)
    misses, trials = 0, 300
    for _ in range(trials):
        x = rng.normal(size=(n, 2))
        y = np.sign(x[:, 0]) * np.where(rng.random(n) < 0.1, -1, 1)
        centre = 2 * (x * y[:, None]).mean(axis=0)
        means, divergences = [], []
        for s in spreads:
            w = centre + s * rng.normal(size=(draws, 2))
            wrong = np.sign((w * np.tile(x, (draws // n, 1))).sum(1)) != np.tile(y, draws // n)
            means.append(wrong.mean())
            divergences.append(np.sum((centre - [1.0, 0.0]) ** 2) / (2 * s**2))
        best, bound = bounds.best_certificate(
            means, divergences, num_draws=draws, n=n, delta=0.05, delta_draws=0.01
        )
        many = centre + spreads[best] * rng.normal(size=(4000, 2))
        angle = np.abs(np.arctan2(many[:, 1], many[:, 0]))
        misses += bound < 0.1 + 0.8 * angle.mean() / np.pi
        assert bound < 0.9
    assert misses <= 0.05 * trials


def test_partial_tau_is_zero_where_a_common_cause_explains_it():
    rng = np.random.default_rng(0)
    cause = np.repeat(np.arange(8), 50)
    x, y = cause + 2 * rng.random(400), cause + 2 * rng.random(400)
    assert bounds.tau(x, y) > 0.6
    assert abs(bounds.partial_tau(x, y, cause)) < 0.25
    assert bounds.partial_tau(x, x + 0.1 * rng.random(400), cause) > 0.8
    shuffled = rng.permutation(400)
    assert bounds.partial_tau(x, y, shuffled) == pytest.approx(bounds.tau(x, y), abs=0.05)


def test_partial_tau_equals_its_formula_on_counted_pairs():
    rng = np.random.default_rng(1)
    x, y, z = rng.permuted(np.tile(np.arange(12), (3, 1)), axis=1)

    def counted(a, b):
        pairs = itertools.combinations(range(12), 2)
        return np.mean([np.sign((a[i] - a[j]) * (b[i] - b[j])) for i, j in pairs])

    xy, xz, yz = counted(x, y), counted(x, z), counted(y, z)
    expected = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))
    assert bounds.partial_tau(x, y, z) == pytest.approx(expected)


def test_granulated_tau_sees_what_overall_tau_hides():
    """The first axis rules both but the predictor is wrong along the second, as in Jiang et al."""
    first, second, seed = np.meshgrid(np.arange(5), np.arange(3), np.arange(2), indexing="ij")
    x, y = 10.0 * first - second + 0.01 * seed, 10.0 * first + second + 0.01 * seed
    assert bounds.tau(x, y) > 0.5
    np.testing.assert_allclose(bounds.granulated_tau(x, y, 2), [1.0, -1.0])
    constant = bounds.granulated_tau(x, 10.0 * first, 2)
    assert constant[0] == pytest.approx(1.0)
    assert math.isnan(constant[1])  # nothing to predict there
    np.testing.assert_allclose(bounds.granulated_tau(10.0 * first, y, 2), [1.0, 0.0])


def test_seed_interval_of_a_mean_is_students():
    values = np.random.default_rng(0).normal(size=(4, 5))
    interval = bounds.seed_interval(lambda v: float(v.mean()), values)
    seeds = values.mean(axis=0)
    expected = scipy.stats.t.interval(0.95, 4, seeds.mean(), scipy.stats.sem(seeds))
    np.testing.assert_allclose(interval, expected)


def test_rows_are_of_the_instances_asked_for_and_fill_the_budget():
    m, half = 64, 32
    rows, instance = training.draw_rows(jax.random.key(0), m, half, (20000,))
    rows, instance = np.asarray(rows), np.asarray(instance)
    assert instance.min() == 0
    assert instance.max() == half - 1  # none of the other half, which certifies
    np.testing.assert_array_equal(rows % m, instance)
    assert len(np.unique(rows)) == training.BUDGET // 2
    assert (rows >= m).any()
    assert (rows < m).any()


def test_the_loss_is_zero_at_the_label_and_known_at_the_start():
    from lohp_jax.problems.lasso import lasso

    family = training.known_family(lasso(2, 4, dictionary="fixed"))
    keys = jax.random.split(jax.random.key(0), 3)
    items = training.solved_instances(lasso(2, 4, dictionary="fixed"), keys, "train")
    item = jax.tree.map(lambda leaf: leaf[0], items)
    assert float(training.bounded_loss(family, item.solution, item)) == pytest.approx(0, abs=1e-5)
    start = family.start(item.key)
    expected = 1 - math.exp(-1)
    assert float(training.bounded_loss(family, start, item)) == pytest.approx(expected, rel=1e-4)
    assert float(training.bounded_loss(family, start * np.nan, item)) == 1.0


@pytest.mark.slow
def test_the_prior_sees_no_instance_that_certifies():
    from lohp_jax.problems.rastrigin import rastrigin

    family = rastrigin(1)
    keys = jax.random.split(jax.random.key(0), 32)
    pool = jax.tree.map(lambda leaf: leaf[None], training.solved_instances(family, keys, "train"))
    others = pool._replace(solution=pool.solution.at[:, 8:].add(1.0))
    effort = training.Effort(updates=4, batch_size=8, draws=8, held_out=8, seeds=1)
    study = training.make_study(family, 4, effort)
    run = training.Run(*(np.array([v]) for v in (16, np.float32(0.01), 0.5, np.float32(0.5), 0)))
    one, two = (jax.device_get(study.train(run, each)) for each in (pool, others))
    jax.tree.map(np.testing.assert_array_equal, one["prior"], two["prior"])
    for part in ("solver", "posterior"):
        same = jax.tree.map(np.array_equal, one[part], two[part])
        assert not all(jax.tree.leaves(same))


def rows_of(axes, seeds, **quantities):
    """Cells as the study writes them, of functions of a row."""
    rows = []
    for values in itertools.product(*axes.values(), range(seeds)):
        row = dict(zip((*axes, "seed"), values, strict=True))
        rows.append(row | {name: quantity(row) for name, quantity in quantities.items()})
    return {"all": {"rows": rows}}


def test_the_report_puts_every_run_in_its_place():
    axes = {"m": [32, 64], "width": [4, 8], "noise": [0.0, 0.5]}
    cells = rows_of(
        axes,
        3,
        held_out=lambda r: 1 / r["m"] + 0.01 * r["width"] + 0.1 * r["noise"] + 1e-4 * r["seed"],
        train=lambda r: 0.01 * r["width"],
        bound=lambda r: 0.9 if r["m"] == 32 else 0.1,
        gibbs=lambda r: 0.2,
        gibbs_held_out=lambda r: 0.2,
        divergence=lambda r: 8.0,
        n=lambda r: r["m"] // 2,
        validation=lambda r: 0.01 * r["seed"],
        test_set_bound=lambda r: 0.5,
        prior_held_out=lambda r: 0.2,
        posterior_held_out=lambda r: 0.1,
        weight_norm=lambda r: -r["width"],
        distance=lambda r: 1.0,
    )
    grid = report.read_grid(cells, axes, 3)
    np.testing.assert_allclose(grid["gap"][1, 0, 1], 1 / 64 + 0.05 + 1e-4 * np.arange(3))
    found = report.correlations(grid, "one_over_m", "gap")
    assert found["along m"] == pytest.approx((1.0, 1.0, 1.0))
    assert found["at fixed m"] == (0.0, 0.0, 0.0)
    assert report.correlations(grid, "weight_norm", "held_out")["along others"][0] == -0.5
    settings = {"axes": axes, "budget": 64, "delta": 0.05, "effort": {"seeds": 3}}
    text, grids = report.report({"settings": settings, "cells": {"made up": cells, "half": {}}})
    assert list(grids) == ["made up"]
    assert "Not all runs are there" in text
    assert "holds in 0.5000 of 24 runs" in text
    assert "| 64 | 1 |" in text
    assert "0.0500 [0.0500, 0.0500]" in text  # what noise adds
