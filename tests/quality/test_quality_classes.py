"""Single classes against scikit-learn, on random cases with ties, missing classes and single samples."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score

from kdctl.quality.classes import balanced_accuracy, confused, confusion, groups, macro_f1, recalls, worst_class
from kdctl.signals import IGNORE

NAMES = ["a", "b", "c", "d", "e"]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.booleans())
def test_equal_to_scikit_learn(seed: int, samples: int, missing: bool) -> None:
    random = np.random.default_rng(seed)
    logits = random.integers(0, 4, (samples, 5)).astype(float)  # with ties: the lower class wins
    targets = random.integers(0, 3 if missing else 5, samples)
    chosen = logits.argmax(1)
    assert (confusion(logits, targets) == confusion_matrix(targets, chosen, labels=range(5))).all()
    expected = 100 * f1_score(targets, chosen, average="macro", zero_division=0)
    assert macro_f1(logits, targets) == pytest.approx(expected, abs=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of choices that no label has
        expected = 100 * balanced_accuracy_score(targets, chosen)
    assert balanced_accuracy(logits, targets) == pytest.approx(expected, abs=1e-6)


def test_nothing_labelled() -> None:
    said = np.zeros((2, 5)), [IGNORE, IGNORE]
    assert math.isnan(balanced_accuracy(*said)) and math.isnan(macro_f1(*said)) and worst_class(*said, NAMES) is None
    assert confusion(*said).sum() == 0 and confused(*said, NAMES) == []


def test_a_row_that_is_nan_is_wrong_and_in_no_column() -> None:
    logits: Any = np.eye(5)[[0, 0, 1]]
    logits[1] = np.nan
    assert recalls(logits, [0, 0, 1])[:2].tolist() == [50, 100]
    assert confusion(logits, [0, 0, 1]).sum() == 2
    assert macro_f1(logits, [0, 0, 1]) == pytest.approx(100 * (2 / 3 + 1) / 2)


def test_the_worst_class_is_one_with_samples() -> None:
    logits = np.eye(5)[[0, 0, 1, 2, 2]]
    assert worst_class(logits, [0, 0, 1, 1, IGNORE], NAMES) == {"name": "b", "top1": 50}
    assert worst_class(logits, [1, 3, 1, 1, 2], NAMES) == {"name": "d", "top1": 0}


def test_the_most_frequent_confusions() -> None:
    truth = [0, 0, 0, 1, 1, 2, 3, 4]
    logits = np.eye(5)[[1, 1, 2, 0, 0, 1, 3, 0]]
    assert confused(logits, truth, NAMES, most=3) == [
        {"truth": "a", "chosen": "b", "samples": 2},
        {"truth": "b", "chosen": "a", "samples": 2},
        {"truth": "a", "chosen": "c", "samples": 1},
    ]
    assert len(confused(logits, truth, NAMES)) == 5


def test_groups_by_training_samples() -> None:
    """Classes with 101, 100, 20, 19 and 0 training samples; the last has no sample here."""
    logits, truth = np.eye(5)[[0, 1, 0, 2, 2, 2]], [0, 1, 1, 2, 3, 3]
    found = groups(logits, truth, [101, 100, 20, 19, 0])
    assert found == {
        "many": {"classes": 1, "samples": 1, "top1": 100},
        "medium": {"classes": 2, "samples": 3, "top1": 75},  # the mean of two classes, not of three samples
        "few": {"classes": 2, "samples": 2, "top1": 0},
    }
    assert groups(logits, truth, [40, 20, 20, 20, 20]) is None
    unseen = groups(logits[:1], truth[:1], [101, 100, 100, 100, 10])
    assert unseen is not None and unseen["few"] == {"classes": 1, "samples": 0, "top1": None}
