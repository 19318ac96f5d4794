"""Ranges of activations, on distributions whose right answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from kdctl.compress import calibration
from kdctl.compress.calibration import BINS, central, least_entropy, ranges
from kdctl.errors import KdctlError


class Session:
    """Outputs `a` = 2 x and `b` = x - 1; counts the images of each call."""

    def __init__(self):
        self.calls = []

    def get_inputs(self):
        return [type("Input", (), {"name": "x"})]

    def run(self, names, feed):
        x = feed["x"]
        self.calls.append(len(x))
        return [{"a": 2 * x, "b": x - 1}[name] for name in names]


def test_minmax_holds_zero_and_every_image():
    x = np.array([0.5, 0.2, 3.0], np.float32).reshape(3, 1, 1, 1)
    found = ranges(Session(), ["a", "b"], x, "minmax")
    assert found["a"] == (0.0, 6.0)  # zero is always inside
    assert found["b"] == pytest.approx((-0.8, 2.0))


def test_batches_fit_the_memory(monkeypatch):
    session = Session()
    x = np.ones((20, 1, 4, 4), np.float32)
    monkeypatch.setattr(calibration, "ACTIVATION_BYTES", 6 * 2 * 16 * 4)
    ranges(session, ["a", "b"], x, "minmax")
    assert session.calls == [1, 6, 6, 6, 2]


def test_percentile_leaves_outliers_out():
    x = np.random.default_rng(0).standard_normal((100, 1, 100, 10)).astype(np.float32)
    x[0, 0, 0, 0] = 100.0
    low, high = ranges(Session(), ["a"], x, "percentile")["a"]
    assert -9 < low < -7.2 and 7.2 < high < 9  # 2 * 3.9 sigma
    assert ranges(Session(), ["a"], x, "minmax")["a"][1] == 200.0


def test_central_keeps_everything_of_a_uniform_range():
    low, high = central(np.full(BINS, 10**6), (-1.0, 3.0))
    assert low == pytest.approx(-1, abs=2e-3) and high == pytest.approx(3, abs=2e-3)


def test_entropy_cuts_a_long_tail_but_no_uniform_range():
    values = np.random.default_rng(0).exponential(1.0, 10**6)
    values[0] = 60.0
    counts = np.histogram(values, BINS, (0, 60))[0]
    assert least_entropy(counts, (0.0, 60.0))[1] < 30
    low, high = least_entropy(np.full(BINS, 100), (-2.0, 2.0))
    assert (low, high) == (-2.0, 2.0)


def test_zeros_of_a_relu_do_not_draw_the_range_in():
    x = np.maximum(np.random.default_rng(0).standard_normal((100, 1, 100, 10)), 0).astype(np.float32)
    assert ranges(Session(), ["a"], x, "entropy")["a"][1] > 4  # 2 sigma of the doubled half-normal


def test_dead_tensor_and_broken_tensor():
    zeros = np.zeros((4, 1, 2, 2), np.float32)
    for method in ("minmax", "percentile", "entropy"):
        assert ranges(Session(), ["a"], zeros, method)["a"] == (0.0, 0.0)
    for value in (np.nan, np.inf):
        broken = zeros.copy()
        broken[2, 0, 1, 1] = value
        with pytest.raises(KdctlError, match="not finite"):
            ranges(Session(), ["a"], broken, "minmax")
