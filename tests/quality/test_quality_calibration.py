"""Calibration against scikit-learn, and against sums written out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from kdctl.quality.calibration import adaptive_calibration_error, brier, fit_temperature, reliability
from kdctl.signals import IGNORE
from kdctl.tasks.classification import calibration_error, log_softmax


def made(seed: int = 0, samples: int = 300, classes: int = 7, sharpness: float = 2.0) -> tuple[Any, Any]:
    random = np.random.default_rng(seed)
    targets = random.integers(0, classes, samples)
    return sharpness * (random.standard_normal((samples, classes)) + 1.5 * np.eye(classes)[targets]), targets


def softmax(logits: Any) -> Any:
    return np.exp(log_softmax(np.asarray(logits, dtype=np.float64)))


@pytest.mark.parametrize("samples", [1, 2, 300])
def test_brier_is_that_of_scikit_learn(samples: int) -> None:
    logits, targets = made(samples=samples)
    squares = (softmax(logits) - np.eye(7)[targets]) ** 2
    assert brier(logits, targets) == pytest.approx(squares.sum() / samples, rel=1e-12)
    logits, targets = made(samples=samples, classes=2)
    if samples > 2:
        assert brier(logits, targets) == pytest.approx(2 * brier_score_loss(targets, softmax(logits)[:, 1]), rel=1e-9)


def test_brier_of_the_certain() -> None:
    assert brier([[900.0, 0, 0]], [0]) == 0 and brier([[900.0, 0, 0]], [1]) == 2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_adaptive_error_has_the_bins_of_scikit_learn(seed: int) -> None:
    logits, targets = made(seed)
    p = softmax(logits)
    right, confidence = p.argmax(1) == targets, p.max(1)
    accuracy, mean = calibration_curve(right, confidence, n_bins=15, strategy="quantile")
    assert len(accuracy) == 15  # of 20 samples each
    assert adaptive_calibration_error(logits, targets) == pytest.approx(100 * np.abs(accuracy - mean).mean(), rel=1e-9)


def test_adaptive_error_where_bins_differ_in_size() -> None:
    logits, targets = made(samples=40)
    p = softmax(logits)
    gap = ((p.argmax(1) == targets) - p.max(1))[np.argsort(p.max(1))]
    bins = np.split(gap, np.cumsum([3] * 10 + [2] * 5)[:-1])
    expected = 100 * sum(abs(part.sum()) for part in bins) / 40
    assert adaptive_calibration_error(logits, targets) == pytest.approx(expected, rel=1e-9)
    few = adaptive_calibration_error(logits[:3], targets[:3])  # a bin a sample
    assert few == pytest.approx(100 * np.abs((p.argmax(1) == targets) - p.max(1))[:3].mean(), rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 80))
def test_ties_and_order_do_not_matter(seed: int, samples: int) -> None:
    """Logits of few values, so that many samples have one confidence."""
    random = np.random.default_rng(seed)
    logits, targets = random.integers(0, 3, (samples, 3)).astype(float), random.integers(0, 3, samples)
    order = random.permutation(samples)
    one = adaptive_calibration_error(logits, targets)
    assert one == pytest.approx(adaptive_calibration_error(logits[order], targets[order]), abs=1e-9)
    assert 0 <= one <= 100
    mean_gap = abs(((softmax(logits).argmax(1) == targets) - softmax(logits).max(1)).mean())
    assert one >= 100 * mean_gap - 1e-9


def test_reliability_is_the_curve_of_scikit_learn_and_adds_up_to_the_error() -> None:
    logits, targets = made(samples=500)
    rows = reliability(logits, targets)
    p = softmax(logits)
    accuracy, mean = calibration_curve(p.argmax(1) == targets, p.max(1), n_bins=15)
    full = [row for row in rows if row["samples"]]
    assert [row["accuracy"] for row in full] == pytest.approx(100 * accuracy)
    assert [row["confidence"] for row in full] == pytest.approx(100 * mean)
    assert len(rows) == 15 and rows[0] == {
        "low": 0,
        "high": 100 / 15,
        "samples": 0,
        "confidence": None,
        "accuracy": None,
    }
    error = sum(row["samples"] * abs(row["accuracy"] - row["confidence"]) for row in full) / 500
    assert error == pytest.approx(calibration_error(logits, targets))
    assert all(row["low"] <= row["confidence"] <= row["high"] for row in full)


@pytest.mark.parametrize("sharpness", [0.001, 0.3, 3.0, 1000.0])
def test_temperature_is_the_best_there_is(sharpness: float) -> None:
    logits, targets = made(sharpness=sharpness)
    found = fit_temperature(logits + 100 * sharpness, targets)  # what all logits share says nothing

    def nll(log_t: float) -> float:
        return float(log_loss(targets, softmax(logits / math.exp(log_t)), labels=range(7)))

    middle = math.log(sharpness)
    best = minimize_scalar(nll, bounds=(middle - 4, middle + 4), method="bounded", options={"xatol": 1e-9})
    assert math.log(found) == pytest.approx(best.x, abs=1e-4)
    assert nll(math.log(found)) <= best.fun + 1e-12
    assert fit_temperature(5 * logits, targets) == pytest.approx(5 * found, rel=1e-6)


def test_no_temperature_is_best() -> None:
    logits, targets = made()
    assert math.isnan(fit_temperature(20 * np.eye(3), [0, 1, 2]))  # every sample is right
    assert math.isnan(fit_temperature(np.zeros((3, 3)), [0, 1, 2]))
    assert math.isnan(fit_temperature(-logits, targets))  # worse than chance
    assert math.isnan(fit_temperature(logits, np.full(300, IGNORE)))
    broken = logits.copy()
    broken[3, 2] = np.nan
    assert math.isnan(fit_temperature(broken, targets))


@pytest.mark.parametrize("metric", [brier, adaptive_calibration_error, fit_temperature])
def test_samples_without_a_label_do_not_count(metric: Any) -> None:
    logits, targets = made()
    partly = targets.copy()
    partly[::3] = IGNORE
    kept = partly != IGNORE
    assert metric(logits, partly) == pytest.approx(metric(logits[kept], targets[kept]), rel=1e-9)
    assert math.isnan(metric(logits, np.full(300, IGNORE)))
    assert sum(row["samples"] for row in reliability(logits, partly)) == kept.sum()


def test_a_row_that_is_nan() -> None:
    logits, targets = made(samples=20)
    logits[4] = np.nan
    assert math.isnan(brier(logits, targets)) and math.isnan(adaptive_calibration_error(logits, targets))
    assert sum(row["samples"] for row in reliability(logits, targets)) == 19
