"""The map of all that is said about one classifier."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from kdctl.quality import calibration
from kdctl.quality.describe import describe, describe_confusion, describe_fidelity
from kdctl.signals import IGNORE
from kdctl.tasks.classification import calibration_error, negative_log_likelihood

NAMES = ["a", "b", "c"]
KEYS = {
    "nll", "brier", "ece", "adaptive_ece", "temperature", "scaled", "reliability", "balanced_accuracy", "macro_f1",
    "worst_class", "groups",
}  # fmt: skip


def said(seed: int) -> tuple[Any, Any]:
    random = np.random.default_rng(seed)
    targets = random.integers(0, 3, 200)
    return (8 * (random.standard_normal((200, 3)) + np.eye(3)[targets])).astype(np.float32), targets


def test_with_and_without_validation() -> None:
    test, val = said(0), said(1)
    plain = describe(test, NAMES, [50, 50, 50])
    assert set(plain) == KEYS and plain["temperature"] is plain["scaled"] is plain["groups"] is None
    found = describe(test, NAMES, [500, 50, 5], val)
    assert set(found["groups"]) == {"many", "medium", "few"}
    temperature = calibration.fit_temperature(*val)
    assert found["temperature"] == temperature > 1
    cooler = test[0].astype(float) / temperature
    assert found["scaled"] == {
        "nll": negative_log_likelihood(cooler, test[1]),
        "brier": calibration.brier(cooler, test[1]),
        "ece": calibration_error(cooler, test[1]),
        "adaptive_ece": calibration.adaptive_calibration_error(cooler, test[1]),
    }
    assert found["scaled"]["nll"] < found["nll"] and found["scaled"]["ece"] < found["ece"]


@pytest.mark.parametrize("broken", ["nothing labelled", "nan", "one sample"])
def test_the_document_is_json_whatever_the_model_says(broken: str) -> None:
    logits, targets = said(0)
    if broken == "nothing labelled":
        targets = np.full(200, IGNORE)
    elif broken == "nan":
        logits[3] = np.nan
    else:
        logits, targets = logits[:1], targets[:1]
    found = describe((logits, targets), NAMES, [1, 1, 1], said(1))
    assert set(json.loads(json.dumps(found, allow_nan=False))) == KEYS
    assert (found["nll"] is None) == (broken != "one sample")
    shared = describe_fidelity(logits, logits, targets)
    assert json.dumps(shared, allow_nan=False) and (shared["kl"] is None) == (broken == "nan")


def test_confusions_of_few_classes_alone() -> None:
    logits, targets = said(0)
    found = describe_confusion(logits, None, targets)
    assert found is not None and found["teacher"] is None and np.sum(found["student"]) == 200
    both = describe_confusion(logits, -logits, targets)
    assert both is not None and both["teacher"] != both["student"]
    assert describe_confusion(np.zeros((1, 101)), None, [0]) is None
