"""How the quality of a classifier is spread over the classes.

Everything is computed from logits (N, C) and targets (N,); samples without a label do not count. A row with a NaN
decides for no class, and is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdctl.tasks.classification import labelled_rows, predictions

MANY, FEW = 100, 20
"""More training samples than the one make a class `many`, fewer than the other `few` (Liu et al., "Large-scale
long-tailed recognition in an open world", CVPR 2019); what lies between is `medium`."""


def confusion(logits: ArrayLike, targets: ArrayLike) -> NDArray[np.int64]:
    """How many samples of each class (row) were taken for each class (column): (C, C)."""
    truth, chosen, classes = _decided(logits, targets)
    return np.bincount(truth * classes + chosen, minlength=classes**2).reshape(classes, classes)


def confused(logits: ArrayLike, targets: ArrayLike, names: Sequence[str], most: int = 10) -> list[dict[str, Any]]:
    """The most frequent confusions, with class names: `truth`, `chosen` and `samples`; the lower classes first where
    several are as frequent."""
    truth, chosen, classes = _decided(logits, targets)
    wrong = truth != chosen
    pairs, samples = np.unique(truth[wrong] * classes + chosen[wrong], return_counts=True)
    order = np.argsort(-samples, kind="stable")[:most]
    return [
        {"truth": names[pair // classes], "chosen": names[pair % classes], "samples": count}
        for pair, count in zip(pairs[order].tolist(), samples[order].tolist(), strict=True)
    ]


def balanced_accuracy(logits: ArrayLike, targets: ArrayLike) -> float:
    """Mean recall, in percent, of the classes that have samples; NaN without any."""
    known = recalls(logits, targets)
    known = known[~np.isnan(known)]
    return float(known.mean()) if known.size else float("nan")


def macro_f1(logits: ArrayLike, targets: ArrayLike) -> float:
    """Mean F1 score, in percent, of the classes that occur in the labels or among the choices; NaN without any."""
    rows, truth = labelled_rows(logits, targets)
    chosen = predictions(rows)
    classes = rows.shape[1]
    hits = np.bincount(truth[chosen == truth], minlength=classes)
    uses = np.bincount(truth, minlength=classes) + np.bincount(chosen[chosen >= 0], minlength=classes)
    there = uses > 0
    return 100 * float((2 * hits[there] / uses[there]).mean()) if there.any() else float("nan")


def recalls(logits: ArrayLike, targets: ArrayLike) -> NDArray[np.float64]:
    """Percent of the samples of each class that are recognised (C,); NaN for a class without samples."""
    rows, truth = labelled_rows(logits, targets)
    samples = np.bincount(truth, minlength=rows.shape[1])
    hits = np.bincount(truth[predictions(rows) == truth], minlength=rows.shape[1])
    return np.divide(100.0 * hits, samples, out=np.full(len(samples), np.nan), where=samples > 0)


def worst_class(logits: ArrayLike, targets: ArrayLike, names: Sequence[str]) -> dict[str, Any] | None:
    """The class that is recognised least often, `name` and `top1` in percent; None without labelled samples."""
    known = recalls(logits, targets)
    if np.isnan(known).all():
        return None
    number = int(np.nanargmin(known))
    return {"name": names[number], "top1": float(known[number])}


def groups(logits: ArrayLike, targets: ArrayLike, train_counts: Sequence[int]) -> dict[str, dict[str, Any]] | None:
    """Top-1 of the classes with many, medium and few training samples; None where training is balanced.

    train_counts: labelled training samples of each class (C,). Balanced is what differs by no more than a factor of 2.
    Of each group that has classes: how many `classes`, the `samples` of them here, and `top1`, the mean over its
    classes with samples, in percent (None without any).
    """
    counts = np.asarray(train_counts)
    if not counts.size or counts.max() <= 2 * counts.min():
        return None
    _, truth = labelled_rows(logits, targets)
    samples, known = np.bincount(truth, minlength=len(counts)), recalls(logits, targets)
    members = {"many": counts > MANY, "medium": (counts >= FEW) & (counts <= MANY), "few": counts < FEW}
    result = {}
    for name, mine in members.items():
        seen = known[mine & (samples > 0)]
        top1 = float(seen.mean()) if seen.size else None
        if mine.any():
            result[name] = {"classes": int(mine.sum()), "samples": int(samples[mine].sum()), "top1": top1}
    return result


def _decided(logits: ArrayLike, targets: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Label and choice (N,) of the labelled samples that decide for a class, and how many classes there are."""
    rows, truth = labelled_rows(logits, targets)
    chosen = predictions(rows)
    return truth[chosen >= 0], chosen[chosen >= 0], rows.shape[1]
