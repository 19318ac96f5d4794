"""Classification: metrics against scikit-learn and hand computation, signals, batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, recall_score, top_k_accuracy_score
from torch import nn

from kdctl.errors import ConfigError
from kdctl.signals import IGNORE, Batch
from kdctl.tasks.base import Task
from kdctl.tasks.classification import Classification, predictions

TASK = Classification()


@pytest.fixture
def split() -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    targets = random.integers(0, 10, 500)
    logits = 2 * random.standard_normal((500, 10)) + 2 * np.eye(10)[targets]
    return logits.astype(np.float32), targets


def batch(size: int = 2) -> Batch:
    index = torch.arange(size)
    return Batch(torch.zeros(size, 1, 2, 2), torch.zeros(size, dtype=torch.long), index, index)


def measured(logits: Any, targets: Any) -> dict[str, float]:
    return {name: metric(logits, targets) for name, metric in TASK.metrics().items()}


def test_metrics_are_those_of_scikit_learn(split: tuple[Any, Any]) -> None:
    logits, targets = split
    values = measured(logits, targets)
    exact = logits.astype(np.float64)
    p = np.exp(exact) / np.exp(exact).sum(1, keepdims=True)
    assert list(values) == ["top1", "top5", "nll", "ece"] and TASK.primary == "top1"
    assert values["top1"] == pytest.approx(100 * accuracy_score(targets, logits.argmax(1)))
    assert values["top5"] == pytest.approx(100 * top_k_accuracy_score(targets, logits, k=5))
    assert values["nll"] == pytest.approx(log_loss(targets, p), rel=1e-9)
    recall = recall_score(targets, logits.argmax(1), average=None)
    assert [c["top1"] for c in TASK.per_class(logits, targets)] == pytest.approx(100 * recall)
    assert [c["samples"] for c in TASK.per_class(logits, targets)] == np.bincount(targets).tolist()


def test_calibration_error_by_hand() -> None:
    """Confidences .9, .9 (one right), .6 (right), .75 (wrong): bins 13, 13, 8, 11 of 15."""
    confidence = np.array([0.9, 0.9, 0.6, 0.75])
    logits = np.stack([np.log(confidence), np.log(1 - confidence)], 1)
    expected = 100 * (2 * abs(0.5 - 0.9) + abs(1 - 0.6) + abs(0 - 0.75)) / 4
    assert measured(logits, [0, 1, 0, 1])["ece"] == pytest.approx(expected)


def test_calibration_error_of_a_calibrated_and_an_overconfident_model() -> None:
    random = np.random.default_rng(0)
    p = random.uniform(0.5, 1, 200_000)
    targets = (random.uniform(size=p.size) > p).astype(int)
    logits = np.stack([np.log(p / (1 - p)), np.zeros_like(p)], 1)
    assert measured(logits, targets)["ece"] < 0.6
    assert measured(100 * logits, targets)["ece"] == pytest.approx(25, abs=0.5)


def test_certain_and_right_is_no_error() -> None:
    values = measured([[2000.0, 0.0], [0.0, 2000.0]], [0, 1])
    assert values == {"top1": 100.0, "top5": 100.0, "nll": 0.0, "ece": 0.0}


def test_ties_go_to_the_lower_class() -> None:
    logits = np.zeros((3, 7))
    assert predictions(logits).tolist() == [0, 0, 0]
    assert measured(logits, [0, 4, 5])["top1"] == pytest.approx(100 / 3)
    assert measured(logits, [0, 4, 5])["top5"] == pytest.approx(200 / 3)


def test_broken_rows_are_wrong() -> None:
    logits = np.array([[np.nan, 1, 0], [np.nan] * 3, [5, 0, 0]])
    values = measured(logits, [0, 1, 0])
    assert values["top1"] == pytest.approx(100 / 3) and values["top5"] == pytest.approx(100 / 3)
    assert np.isnan(values["nll"]) and np.isnan(values["ece"])
    assert TASK.agreement(logits, logits) == pytest.approx(100 / 3)


def test_unlabelled_samples_do_not_count(split: tuple[Any, Any]) -> None:
    logits, targets = split
    partly = np.concatenate([targets, [IGNORE]])
    assert measured(np.concatenate([logits, logits[:1]]), partly) == measured(logits, targets)
    assert all(np.isnan(v) for v in measured(logits[:2], [IGNORE, IGNORE]).values())


def test_torch_tensors_of_any_precision(split: tuple[Any, Any]) -> None:
    logits, targets = split
    rounded = torch.tensor(logits).bfloat16()
    values = measured(rounded.requires_grad_(True), torch.tensor(targets))
    assert values == measured(rounded.detach().float().numpy(), targets)


def test_a_class_without_samples() -> None:
    assert TASK.per_class([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], [0, 2]) == [
        {"samples": 1, "top1": 100.0},
        {"samples": 0, "top1": None},
        {"samples": 1, "top1": 0.0},
    ]


def test_agreement() -> None:
    a, b = np.eye(3)[[0, 1, 2, 0]], np.eye(3)[[0, 1, 1, 1]]
    assert TASK.agreement(a, b) == 50.0
    assert TASK.agreement(a, 5 * a - 1) == 100.0


def test_chance_is_the_most_frequent_class() -> None:
    assert TASK.chance([0, 0, 0, 1, 2, IGNORE, IGNORE]) == 60.0


def test_samples_without_a_label_are_not_counted() -> None:
    made = batch(3)
    made.targets[1] = IGNORE
    assert int(TASK.num_labelled(made)) == 2


@pytest.mark.parametrize(
    "wrap", [lambda z: z, lambda z: {"logits": z}, lambda z: (z, "aux"), lambda z: SimpleNamespace(logits=z)]
)
def test_signals_find_the_logits(wrap: Any) -> None:
    logits = torch.randn(2, 3)
    signals = TASK.signals(wrap(logits), batch(), {"tap": logits})
    assert signals.logits is logits and signals.link == "softmax" and signals.features == {"tap": logits}


@pytest.mark.parametrize("outputs", [torch.zeros(2, 3, 4, 4), torch.zeros(2), torch.zeros(3, 3), {"out": 1}, None])
def test_other_outputs_are_refused(outputs: Any) -> None:
    with pytest.raises(ConfigError, match=r"needs logits of shape \(2, classes\)"):
        TASK.signals(outputs, batch())


def test_forward_and_supervised() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    given = batch(3)
    given.targets[1] = IGNORE
    signals = TASK.signals(TASK.forward(model, given), given)
    ((name, (value, count)),) = TASK.supervised(signals, given).items()
    expected = nn.functional.cross_entropy(signals.logits, given.targets, ignore_index=IGNORE, reduction="sum")
    assert name == "ce" and int(count) == 2
    torch.testing.assert_close(value, expected)


def test_it_is_a_task() -> None:
    assert isinstance(TASK, Task)
    assert set(vars(Classification)) >= {n for n in vars(Task) if not n.startswith("_")} - {
        "forward", "num_labelled", "outcome", "rows_of", "score", "signals", "link", "target"
    }  # fmt: skip
