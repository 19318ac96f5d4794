"""Classification of images: one of C classes a sample.

Metrics are computed in float64 from all logits (N, C) and targets (N,) of a split; samples without a label do not
count, and without any labelled sample a metric is NaN. Ties are broken the same way everywhere: the lower class index
wins. A row with a NaN decides for no class.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from kdctl.signals import IGNORE, Batch, Signals
from kdctl.tasks.base import Metric, Task

ECE_BINS = 15


class Classification(Task):
    """One of C classes a sample: cross entropy, top-1."""

    primary: ClassVar[str] = "top1"

    def supervised(
        self, student: Signals, batch: Batch, *, label_smoothing: float = 0.0, **_: Any
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Cross entropy with the target (1 - a) onehot + a / C, a the smoothing (Szegedy et al., 2016).

        Unlabelled samples contribute nothing, and their logits get no gradient.
        """
        value, count = cross_entropy(student, batch, label_smoothing)
        return {"ce": (value, count)}

    def metrics(self) -> dict[str, Metric]:
        return {"top1": top1, "top5": top5, "nll": negative_log_likelihood, "ece": calibration_error}

    def per_class(self, logits: ArrayLike, targets: ArrayLike) -> list[dict[str, Any]]:
        """Of each class: how many samples have it, and the percent of these that are recognised (None without any)."""
        rows, truth = labelled_rows(logits, targets)
        right = predictions(rows) == truth
        samples = np.bincount(truth, minlength=rows.shape[1])
        hits = np.bincount(truth, weights=right, minlength=rows.shape[1])
        return [
            {"samples": int(n), "top1": 100 * float(h) / int(n) if n else None}
            for n, h in zip(samples, hits, strict=True)
        ]

    def agreement(self, logits_a: ArrayLike, logits_b: ArrayLike) -> float:
        """Percent of samples for which two models choose the same class."""
        a, b = predictions(logits_a), predictions(logits_b)
        return percent((a == b) & (a >= 0))

    def chance(self, targets: ArrayLike) -> float:
        """Top-1 of always answering the most frequent class, in percent."""
        truth = as_array(targets)
        truth = truth[truth != IGNORE].astype(np.int64)
        return 100 * float(np.bincount(truth).max()) / truth.size if truth.size else float("nan")


def cross_entropy(student: Signals, batch: Batch, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """The sum over the labelled rows of -(1 - a) log p_y - a mean(log p), and their count."""
    log_p = F.log_softmax(student.rows(), dim=1)
    labels, labelled = batch.row_labels()
    chosen = log_p.gather(1, labels[:, None]).squeeze(1)
    loss = -(1 - label_smoothing) * chosen
    if label_smoothing:
        loss = loss - label_smoothing * log_p.mean(1)
    return loss.masked_fill(~labelled, 0).sum(), labelled.sum()


def predictions(logits: ArrayLike) -> NDArray[np.int64]:
    """The chosen class of each row: the largest logit, the lower index where several are; -1 for a row with a NaN."""
    rows = as_array(logits)
    return np.where(np.isnan(rows).any(1), -1, rows.argmax(1))


def top1(logits: ArrayLike, targets: ArrayLike) -> float:
    """Percent of samples whose label is the chosen class."""
    return _top(logits, targets, 1)


def top5(logits: ArrayLike, targets: ArrayLike) -> float:
    """Percent of samples whose label is among the five largest logits (with fewer than five classes: always)."""
    return _top(logits, targets, 5)


def negative_log_likelihood(logits: ArrayLike, targets: ArrayLike) -> float:
    """Mean of -log softmax(logits)[label], in nats."""
    rows, truth = labelled_rows(logits, targets)
    if not truth.size:
        return float("nan")
    return float(-log_softmax(rows)[np.arange(truth.size), truth].mean())


def calibration_error(logits: ArrayLike, targets: ArrayLike) -> float:
    """Expected calibration error in percent (Guo et al., ICML 2017, eq. 3).

    Samples are put into 15 bins of equal width by the probability of their chosen class, bin m covering
    ((m - 1) / 15, m / 15]; the error is the mean over samples of |accuracy - confidence| of their bin.
    """
    rows, truth = labelled_rows(logits, targets)
    if not truth.size:
        return float("nan")
    confidence = np.exp(log_softmax(rows).max(1))
    gap = (predictions(rows) == truth) - confidence
    if np.isnan(gap).any():
        return float("nan")
    gaps = np.bincount(calibration_bins(confidence), weights=gap, minlength=ECE_BINS)
    return 100 * float(np.abs(gaps).sum()) / truth.size


def calibration_bins(confidence: NDArray[np.float64]) -> NDArray[np.int64]:
    """The bin (N,), 0..14, of each confidence (N,) in [0, 1]: see `calibration_error`."""
    return np.clip(np.ceil(confidence * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)


def _top(logits: ArrayLike, targets: ArrayLike, k: int) -> float:
    rows, truth = labelled_rows(logits, targets)
    own = rows[np.arange(truth.size), truth][:, None]
    before = (rows > own) | ((rows == own) & (np.arange(rows.shape[1]) < truth[:, None]))
    right = before.sum(1) < min(k, rows.shape[1])
    return percent(right & ~np.isnan(rows).any(1))


def percent(right: NDArray[np.bool_]) -> float:
    """How much of it is true; NaN of nothing."""
    return 100 * float(right.mean()) if right.size else float("nan")


def labelled_rows(logits: ArrayLike, targets: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Logits (N, C) in float64 and targets (N,) of the samples that have a label."""
    rows, truth = as_array(logits), as_array(targets).astype(np.int64)
    labelled = truth != IGNORE
    return rows[labelled], truth[labelled]


def as_array(values: ArrayLike) -> NDArray[np.float64]:
    """An array or tensor of any device in float64."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def log_softmax(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log probabilities of logits (N, C)."""
    shifted = rows - rows.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
