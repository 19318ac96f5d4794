"""A number a sample, such as how alike two texts are."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from kdctl.data.base import has_label
from kdctl.signals import Batch, Signals
from kdctl.tasks.base import Metric, Task
from kdctl.tasks.classification import as_array


class Regression(Task):
    """A number a sample: squared error; correlations as in STS-B, in percent."""

    primary: ClassVar[str] = "spearman"
    target: ClassVar[str] = "number"
    link: ClassVar[Literal["softmax", "sigmoid", "identity", "embedding"]] = "identity"

    def num_labelled(self, batch: Batch) -> Tensor:
        return has_label(batch.targets).sum()

    def supervised(self, student: Signals, batch: Batch, **_: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """The squared error of each labelled sample."""
        labelled = has_label(batch.targets)
        error = student.rows()[:, 0] - batch.targets.nan_to_num()
        return {"mse": (error.square().masked_fill(~labelled, 0).sum(), labelled.sum())}

    def metrics(self) -> dict[str, Metric]:
        return {"spearman": spearman, "pearson": pearson, "mse": squared_error}

    def agreement(self, logits_a: ArrayLike, logits_b: ArrayLike) -> float:
        """Spearman's correlation of two models' numbers, in percent."""
        return spearman(logits_a, as_array(logits_b)[:, 0])

    def chance(self, targets: ArrayLike) -> float:
        """The correlation of a constant answer."""
        return 0.0


def pearson(logits: ArrayLike, targets: ArrayLike) -> float:
    """Pearson's correlation with the targets, in percent; 0 where either does not vary."""
    return _correlation(*_pair(logits, targets))


def spearman(logits: ArrayLike, targets: ArrayLike) -> float:
    """Spearman's correlation with the targets, in percent: Pearson's of the ranks, ties sharing their mean rank."""
    a, b = _pair(logits, targets)
    return _correlation(_ranks(a), _ranks(b))


def squared_error(logits: ArrayLike, targets: ArrayLike) -> float:
    """Mean squared error."""
    a, b = _pair(logits, targets)
    return float(np.square(a - b).mean()) if a.size else float("nan")


def _pair(logits: ArrayLike, targets: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    said, truth = as_array(logits)[:, 0], as_array(targets)
    known = ~np.isnan(truth)
    return said[known], truth[known]


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    if a.size < 2:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt(np.square(a).sum() * np.square(b).sum())
    return 0.0 if size == 0 else 100 * float((a * b).sum() / size)


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    if np.isnan(values).any():
        return np.full(values.shape, np.nan)
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
