"""Several labels a sample, against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score

from kdctl.signals import IGNORE
from kdctl.tasks.multilabel import average_precision, macro_f1, mean_average_precision, micro_f1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40))
def test_equal_to_scikit_learn(seed: int, samples: int) -> None:
    random = np.random.default_rng(seed)
    scores = random.integers(-3, 4, (samples, 4)).astype(float)  # with ties
    targets = (random.random((samples, 4)) < [0.5, 0.3, 0.1, 0.0]).astype(int)
    targets[0, :3] = 1
    found = average_precision(scores, targets)
    expected = [100 * average_precision_score(targets[:, c], scores[:, c]) for c in range(3)]
    assert found[:3] == pytest.approx(expected, abs=1e-6) and math.isnan(found[3])
    assert mean_average_precision(scores, targets) == pytest.approx(np.mean(expected), abs=1e-6)
    chosen = scores > 0
    assert micro_f1(scores, targets) == pytest.approx(100 * f1_score(targets, chosen, average="micro"), abs=1e-6)
    used = (chosen | (targets == 1)).any(0)
    expected_f1 = 100 * f1_score(targets[:, used], chosen[:, used], average="macro", zero_division=0)
    assert macro_f1(scores, targets) == pytest.approx(expected_f1, abs=1e-6)
    assert micro_f1(scores, targets, threshold=1.5) == pytest.approx(
        100 * f1_score(targets, scores > 1.5, average="micro", zero_division=0), abs=1e-6
    )


def test_what_has_no_label_never_counts() -> None:
    random = np.random.default_rng(0)
    scores, targets = random.standard_normal((30, 2)), random.integers(0, 2, (30, 2))
    hidden = random.random((30, 2)) < 0.4
    partly = np.where(hidden, IGNORE, targets)
    kept = ~hidden[:, 1]
    expected = 100 * average_precision_score(targets[kept, 1], scores[kept, 1])
    assert average_precision(scores, partly)[1] == pytest.approx(expected)
    flat = 100 * f1_score(targets[~hidden], scores[~hidden] > 0)
    assert micro_f1(scores, partly) == pytest.approx(flat)


def test_nothing_to_say() -> None:
    nothing = np.full((3, 2), -1.0), np.zeros((3, 2))
    for metric in (mean_average_precision, micro_f1, macro_f1):
        assert math.isnan(metric(*nothing)) and math.isnan(metric(nothing[0], np.full((3, 2), IGNORE)))
    assert micro_f1(np.ones((3, 2)), np.zeros((3, 2))) == 0


def test_a_score_that_is_nan_is_the_lowest() -> None:
    scores, targets = np.array([[np.nan], [-9.0], [1.0]]), np.array([[1], [0], [1]])
    assert average_precision(scores, targets)[0] == pytest.approx(100 * (0.5 * 1 + 0.5 * 2 / 3))
    assert micro_f1(scores, targets) == pytest.approx(100 * 2 / 3)
