"""Several labels a sample: each of C classes is there or not, whatever the others are.

Metrics are of scores (N, C) and binary targets (N, C). Scores are logits unless a threshold says otherwise: 0 is a
probability of one half. A sample has labels of all classes or of none (IGNORE), and then never counts. A score that is
NaN is the lowest of all. Everything is computed in float64 and given in percent; NaN only where nothing can be
said.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from kdctl.data.base import has_label
from kdctl.signals import IGNORE, Batch, Signals
from kdctl.tasks.base import Metric, Task
from kdctl.tasks.classification import as_array, percent


class Multilabel(Task):
    """Any number of C classes a sample: binary cross entropy, mean average precision."""

    primary: ClassVar[str] = "map"
    target: ClassVar[str] = "classes"
    link: ClassVar[Literal["softmax", "sigmoid", "identity", "embedding"]] = "sigmoid"

    def num_labelled(self, batch: Batch) -> Tensor:
        return has_label(batch.targets).sum()

    def supervised(
        self, student: Signals, batch: Batch, *, label_smoothing: float = 0.0, **_: Any
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """The mean over classes of the binary cross entropy with the target (1 - a) y + a / 2, a the smoothing."""
        logits, labelled = student.rows(), has_label(batch.targets)
        wanted = batch.targets.clamp_min(0).to(logits.dtype) * (1 - label_smoothing) + label_smoothing / 2
        loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)
        return {"bce": (loss.masked_fill(~labelled, 0).sum(), labelled.sum())}

    def metrics(self) -> dict[str, Metric]:
        return {
            "map": mean_average_precision,
            "macro_f1": macro_f1,
            "micro_f1": micro_f1,
            "bce": binary_cross_entropy,
        }

    def per_class(self, logits: ArrayLike, targets: ArrayLike) -> list[dict[str, Any]]:
        """Of each class: how many samples have it, and its average precision (None without any)."""
        found = average_precision(logits, targets)
        samples = (as_array(targets) == 1).sum(0)
        rows = zip(samples, found, strict=True)
        return [{"samples": int(n), "ap": None if np.isnan(value) else float(value)} for n, value in rows]

    def agreement(self, logits_a: ArrayLike, logits_b: ArrayLike) -> float:
        """Percent of all decisions, one a sample and class, that two models make alike."""
        a, b = as_array(logits_a), as_array(logits_b)
        return percent(((a > 0) == (b > 0)).ravel())

    def chance(self, targets: ArrayLike) -> float:
        """Mean average precision of equal scores for all samples: the mean share of the classes that occur."""
        truth = as_array(targets)
        shares = (truth[truth[:, 0] != IGNORE] == 1).mean(0)
        return 100 * float(shares[shares > 0].mean()) if (shares > 0).any() else float("nan")


def binary_cross_entropy(logits: ArrayLike, targets: ArrayLike) -> float:
    """Mean over labelled samples and classes of the binary cross entropy, in nats."""
    rows, truth = as_array(logits), as_array(targets)
    labelled = truth[:, 0] != IGNORE
    rows, truth = rows[labelled], truth[labelled]
    if not truth.size:
        return float("nan")
    return float((np.logaddexp(0, rows) - truth * rows).mean())


def average_precision(scores: ArrayLike, targets: ArrayLike) -> NDArray[np.float64]:
    """Average precision of each class (C,): the sum over thresholds of precision times the gain in recall.

    Samples of equal score share a threshold, so their order does not matter; nothing is interpolated. NaN for a class
    without a positive sample.
    """
    rows, truth = _arrays(scores, targets)
    return np.array([_average_precision(*column) for column in zip(rows.T, truth.T, strict=True)], dtype=np.float64)


def mean_average_precision(scores: ArrayLike, targets: ArrayLike) -> float:
    """Mean of the average precision of the classes that have a positive sample (mAP)."""
    return _known_mean(average_precision(scores, targets))


def micro_f1(scores: ArrayLike, targets: ArrayLike, threshold: float = 0.0) -> float:
    """F1 score of all decisions together, a class being chosen where its score is above the threshold."""
    hits, uses = _counts(scores, targets, threshold)
    return _known_mean(_f1(hits.sum(keepdims=True), uses.sum(keepdims=True)))


def macro_f1(scores: ArrayLike, targets: ArrayLike, threshold: float = 0.0) -> float:
    """Mean F1 score of the classes that occur in the targets or are chosen."""
    return _known_mean(_f1(*_counts(scores, targets, threshold)))


def _average_precision(scores: NDArray[np.float64], truth: NDArray[np.int64]) -> float:
    labelled = truth != IGNORE
    scores, positive = scores[labelled], truth[labelled] == 1
    if not positive.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(positive[order])
    last = np.append(scores[order][1:] != scores[order][:-1], True)  # of the samples that share a threshold
    found, seen = found[last], np.flatnonzero(last) + 1
    gain = np.diff(found, prepend=0) / found[-1]
    return 100 * float((found / seen * gain).sum())


def _counts(
    scores: ArrayLike, targets: ArrayLike, threshold: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:  # fmt: skip
    """Of each class (C,): true positives, and positives plus choices."""
    rows, truth = _arrays(scores, targets)
    chosen = (rows > threshold) & (truth != IGNORE)
    positive = truth == 1
    return (chosen & positive).sum(0), chosen.sum(0) + positive.sum(0)


def _f1(hits: NDArray[np.int64], uses: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.divide(200.0 * hits, uses, out=np.full(hits.shape, np.nan), where=uses > 0)


def _known_mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _arrays(scores: ArrayLike, targets: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    rows = as_array(scores)
    return np.where(np.isnan(rows), -np.inf, rows), as_array(targets).astype(np.int64)
