"""A vector a text: texts that mean alike lie near each other.

How near two texts are is the cosine of their vectors. Everything is computed in float64, a block of rows at a time; of
equally near neighbours the one that comes first counts, and a vector that is zero or not finite is near to none.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from kdctl.errors import ConfigError, Problem
from kdctl.signals import IGNORE, Batch, Signals
from kdctl.tasks.base import Metric, Task
from kdctl.tasks.classification import as_array, percent

_BLOCK = 1024
"""Rows whose cosines with all others are in memory at once."""


class SentenceEmbedding(Task):
    """A vector a text, as a teacher has it: nearest neighbours.

    There is no loss of its own: terms on the pooled states, `bert.pooler`, take them to the teacher's, or have the
    texts of a batch lie to each other as the teacher's do, so that labels are not needed and widths may differ. Labels,
    where there are some, measure: nearest is the percent of labelled texts whose nearest other labelled text of the
    split is of the same class. Two models agree where a text has the same nearest neighbour in both.
    """

    primary: ClassVar[str] = "nearest"
    target: ClassVar[str] = "embedding"
    link: ClassVar[Literal["softmax", "sigmoid", "identity", "embedding"]] = "embedding"

    def supervised(self, student: Signals, batch: Batch, **options: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """There is none. Raises ConfigError."""
        message = "sentence_embedding has no loss of its own: labels only measure embeddings"
        hint = "terms on features with a teacher, such as {kind: cosine, weight: 1, taps: [bert.pooler]}"
        raise ConfigError(Problem(message, key="losses", hint=hint))

    def metrics(self) -> dict[str, Metric]:
        return {"nearest": same_class_nearest}

    def per_class(self, logits: ArrayLike, targets: ArrayLike) -> list[dict[str, Any]]:
        """Nothing: what a text's neighbours are is no property of its class."""
        return []

    def agreement(self, logits_a: ArrayLike, logits_b: ArrayLike) -> float:
        """Percent of texts with the same nearest other text in two models, of any width each."""
        a, b = nearest(as_array(logits_a)), nearest(as_array(logits_b))
        return percent((a == b) & (a >= 0))

    def chance(self, targets: ArrayLike) -> float:
        """Percent of texts of which another one, taken at random, is of the same class: the sum of p_c squared."""
        truth = as_array(targets).astype(np.int64)
        truth = truth[truth != IGNORE]
        return 100 * float(np.square(np.bincount(truth) / truth.size).sum()) if truth.size else float("nan")


def same_class_nearest(embeddings: ArrayLike, targets: ArrayLike) -> float:
    """Percent of labelled texts whose nearest other labelled text has their label; NaN of fewer than two."""
    vectors, truth = as_array(embeddings), as_array(targets).astype(np.int64)
    labelled = truth != IGNORE
    vectors, truth = vectors[labelled], truth[labelled]
    if truth.size < 2:
        return float("nan")
    found = nearest(vectors)
    return percent((truth[found] == truth) & (found >= 0))


def nearest(vectors: NDArray[np.float64]) -> NDArray[np.int64]:
    """For each of the vectors (N, D) the number of the other one with the largest cosine, -1 where there is none."""
    lengths = np.sqrt(np.square(vectors).sum(1))
    there = np.isfinite(lengths) & (lengths > 0)
    unit = np.divide(vectors, lengths[:, None], out=np.zeros_like(vectors), where=there[:, None])
    found = np.full(len(vectors), -1, np.int64)
    for start in range(0, len(vectors), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(vectors)))
        cosines = unit[rows] @ unit.T
        cosines[:, ~there] = -np.inf
        cosines[np.arange(len(rows)), rows] = -np.inf
        best = cosines.argmax(1)
        known = there[rows] & np.isfinite(cosines[np.arange(len(rows)), best])
        found[rows[known]] = best[known]
    return found
