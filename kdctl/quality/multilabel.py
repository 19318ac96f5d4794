"""Metrics where a sample has any number of classes: scores (N, C) and binary targets (N, C).

Scores are logits unless a threshold says otherwise: 0 is a probability of one half. A target without a label (IGNORE)
never counts, whatever the others of its sample are. A score that is NaN is the lowest of all. Everything is computed in
float64 and given in percent; NaN only where nothing can be said.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdctl.signals import IGNORE
from kdctl.tasks.classification import as_array


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
