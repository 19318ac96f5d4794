"""Ranges and steps, on distributions whose right answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from kdctl.errors import KdctlError
from kdctl.quant.ranges import BINS, Spread, central, least_entropy, least_mse, squared_error, to_grid, weight_scales

METHODS = ("minmax", "percentile", "entropy", "mse")


def spread(values):
    seen = Spread()
    for part in np.array_split(values, 3):
        seen.stretch(part)
    for part in np.array_split(values, 3):
        seen.count(part)
    return seen


def counts(values, low, high):
    return np.histogram(values, BINS, (low, high))[0]


def test_minmax_holds_zero_and_every_value():
    assert spread(np.array([0.5, 0.25, 3.0])).range("minmax") == (0.0, 3.0)
    assert spread(np.array([-0.5, -2.0, -1.0])).range("minmax") == (-2.0, 0.0)


def test_percentile_leaves_outliers_out():
    values = np.random.default_rng(0).standard_normal(100_000)
    values[0] = 100.0
    low, high = spread(values).range("percentile")
    assert -4.5 < low < -3.6 and 3.6 < high < 4.5  # 3.9 sigma
    assert spread(values).range("minmax")[1] == 100.0


def test_percentile_counts_zeros():
    values = np.concatenate([np.zeros(999_000), np.linspace(0, 1, 1_000)])
    assert spread(values).range("percentile")[1] < 0.97  # 0.005 % of all are the last 5 % of the others


def test_central_keeps_everything_of_a_uniform_range():
    low, high = central(np.full(BINS, 10**6), (-1.0, 3.0))
    assert low == pytest.approx(-1, abs=2e-3) and high == pytest.approx(3, abs=2e-3)


def test_entropy_cuts_a_long_tail_but_no_uniform_range():
    values = np.random.default_rng(0).exponential(1.0, 10**6)
    values[0] = 60.0
    assert least_entropy(counts(values, 0, 60), (0.0, 60.0))[1] < 30
    assert least_entropy(np.full(BINS, 100), (-2.0, 2.0)) == (-2.0, 2.0)


def test_zeros_of_a_relu_do_not_draw_the_range_in():
    values = 2 * np.maximum(np.random.default_rng(0).standard_normal(100_000), 0)
    assert spread(values).range("entropy")[1] > 4
    assert spread(values).range("mse", 16)[1] > 4
    seen = spread(values)
    assert seen.zeros == (values == 0).sum() > 0 and seen.counts.sum() == (values != 0).sum()


def test_mse_is_the_range_with_the_least_error():
    """Against every pair of ends on the same grid, and the optimum for 4 bits of a Laplace tensor: 5.03 b."""
    values = np.random.default_rng(0).laplace(0.0, 1.0, 100_000)
    full = (float(values.min()), float(values.max()))
    low, high = least_mse(counts(values, *full), full, 16)
    assert high == pytest.approx(5.03, abs=0.7) and -low == pytest.approx(5.03, abs=0.7)
    ones = np.ones(len(values))
    found = squared_error(values, ones, (low, high), 16)
    tried = [squared_error(values, ones, (a * full[0], a * full[1]), 16) for a in np.linspace(1 / 16, 1, 16)]
    assert found <= 1.02 * min(tried) < 0.5 * squared_error(values, ones, full, 16)


def test_mse_cuts_one_side_alone():
    values = np.concatenate([np.random.default_rng(0).uniform(-1, 1, 100_000), [10.0]])
    low, high = spread(values).range("mse", 16)
    assert low == pytest.approx(-1, abs=0.1) and high < 2


def test_squared_error_is_that_of_rounding():
    values = np.array([-0.2, 0.0, 0.26, 1.3])
    levels = np.array([0.0, 0.0, 1 / 3, 1.0])  # four levels over 0 .. 1
    expected = float(((values - levels) ** 2).sum())
    assert squared_error(values, np.ones(4), (0.0, 1.0), 4) == pytest.approx(expected)


def test_bins_stand_for_what_is_in_them():
    """The error from a histogram is that of the values, even where a level is no wider than two bins."""
    values = np.random.default_rng(0).uniform(-1, 1, 10**5)
    full, width = (-8.0, 8.0), 16 / BINS
    centres = full[0] + width * (np.arange(BINS) + 0.5)
    estimate = squared_error(centres, counts(values, *full).astype(float), (-1.0, 1.0), 256)
    assert estimate == pytest.approx(squared_error(values, np.ones(10**5), (-1.0, 1.0), 256), rel=0.03)


def test_dead_and_broken_tensors():
    for method in METHODS:
        assert spread(np.zeros(12)).range(method) == (0.0, 0.0)
    for value in (np.nan, np.inf):
        with pytest.raises(KdctlError, match="not finite"):
            spread(np.array([0.0, value, 1.0]))


def test_weights_on_their_grid():
    rows = np.array([[0.5, -1.27, 0.3], [0.0, 0.0, 0.0]], np.float32)
    scales = weight_scales(rows, 8)
    np.testing.assert_allclose(scales, [0.01, 0.01], rtol=1e-6)
    assert weight_scales(rows[1:], 8).tolist() == [1.0]
    assert to_grid(rows, scales, 8).tolist() == [[50, -127, 30], [0, 0, 0]]
    assert to_grid(rows * 2, scales, 8).tolist() == [[100, -127, 60], [0, 0, 0]]


def test_searched_scales_lose_less():
    rows = np.random.default_rng(0).standard_normal((8, 500)).astype(np.float32)

    def loss(scales):
        return ((to_grid(rows, scales, 4) * scales[:, None] - rows) ** 2).sum(1)

    plain, searched = weight_scales(rows, 4), weight_scales(rows, 4, search=True)
    assert (loss(searched) < 0.85 * loss(plain)).all()
    assert (searched < plain).all()
