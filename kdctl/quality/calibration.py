"""Whether the probabilities of a classifier are what they say.

Everything is computed in float64 from logits (N, C) and targets (N,); samples without a label do not count. A number is
NaN where there is no labelled sample, or where a row has a NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdctl.tasks.classification import ECE_BINS, calibration_bins, labelled_rows, log_softmax, predictions

_LARGEST = 1e6
"""The largest inverse temperature that is looked for, of logits whose standard deviation is 1."""
_STEPS = 200


def brier(logits: ArrayLike, targets: ArrayLike) -> float:
    """Mean over samples of the squared distance between the probabilities and the one-hot label, in [0, 2] (Brier,
    "Verification of forecasts expressed in terms of probability", 1950)."""
    rows, truth = labelled_rows(logits, targets)
    if not truth.size:
        return float("nan")
    p = np.exp(log_softmax(rows))
    p[np.arange(truth.size), truth] -= 1
    return float((p**2).sum(1).mean())


def adaptive_calibration_error(logits: ArrayLike, targets: ArrayLike) -> float:
    """Calibration error in percent over 15 bins of equal mass (Nixon et al., "Measuring calibration in deep learning",
    2019) of the chosen class.

    Samples are sorted by the probability of their chosen class and cut into 15 bins whose sizes differ by at most one
    (fewer bins with fewer samples); the error is the mean over samples of |accuracy - confidence| of their bin. Where
    samples of one confidence fall into two bins, each bin gets its part of all of them, so the order of the samples
    does not matter.
    """
    confidence, right = _confidence(logits, targets)
    gap = right - confidence
    if not gap.size or np.isnan(gap).any():
        return float("nan")
    _, group, sizes = np.unique(confidence, return_inverse=True, return_counts=True)
    level = np.bincount(group, weights=gap) / sizes
    bins = np.array_split(np.repeat(level, sizes), min(ECE_BINS, gap.size))
    return 100 * sum(abs(float(part.sum())) for part in bins) / gap.size


def reliability(logits: ArrayLike, targets: ArrayLike) -> list[dict[str, Any]]:
    """The 15 bins of equal width of the calibration error, all numbers in percent.

    Of each: `low` and `high`, how many `samples` have their confidence in (low, high], and their mean `confidence` and
    `accuracy`, None where the bin is empty. A row with a NaN is in no bin.
    """
    confidence, right = _confidence(logits, targets)
    kept = ~np.isnan(confidence)
    bins = calibration_bins(confidence[kept])
    samples = np.bincount(bins, minlength=ECE_BINS)
    sums = [np.bincount(bins, weights=values[kept], minlength=ECE_BINS) for values in (confidence, right)]
    rows = []
    for number, count in enumerate(samples.tolist()):
        means = [100 * float(total[number]) / count if count else None for total in sums]
        edges = {"low": 100 * number / ECE_BINS, "high": 100 * (number + 1) / ECE_BINS}
        rows.append(edges | {"samples": count, "confidence": means[0], "accuracy": means[1]})
    return rows


def fit_temperature(logits: ArrayLike, targets: ArrayLike) -> float:
    """The temperature T for which logits / T have the least negative log-likelihood (Guo et al., ICML 2017, section 4).

    The likelihood is convex in 1 / T, so the root of its slope is bracketed and then found by bisection. Fit it on
    validation samples. NaN where no T is best: without labelled samples, with a NaN in the logits, where every sample
    is right (smaller is always better), or where the logits say no more than chance (larger is always better).
    """
    rows, truth = labelled_rows(logits, targets)
    if not truth.size or not np.isfinite(rows).all():
        return float("nan")
    shifted = rows - rows.max(1, keepdims=True)
    scale = float(shifted.std()) or 1.0
    shifted /= scale
    behind = shifted[np.arange(truth.size), truth]
    own = float(behind.mean())

    def slope(inverse: float) -> float:
        """Of the mean negative log-likelihood by the inverse temperature."""
        p = np.exp(inverse * shifted)
        return float(((p * shifted).sum(1) / p.sum(1)).mean()) - own

    low, high = 0.0, 1.0
    if not (behind < 0).any() or slope(low) >= 0:
        return float("nan")
    while slope(high) < 0:
        low, high = high, 2 * high
        if high > _LARGEST:
            return float("nan")
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if middle in (low, high) or high - low <= 1e-12 * high:
            break
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return scale / ((low + high) / 2)


def _confidence(logits: ArrayLike, targets: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each labelled sample the probability of the chosen class (N,), and whether that class is right: 1 or 0."""
    rows, truth = labelled_rows(logits, targets)
    return np.exp(log_softmax(rows).max(1)), (predictions(rows) == truth).astype(np.float64)
