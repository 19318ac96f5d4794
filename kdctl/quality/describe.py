"""All that is said about the predictions of one classifier, and of a student beside its teacher: plain values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from kdctl.quality import calibration, classes, fidelity
from kdctl.tasks.classification import as_array, calibration_error, negative_log_likelihood

MATRIX_CLASSES = 100
"""With more classes than this the matrix of confusions is left out."""

Said = tuple[ArrayLike, ArrayLike]
"""Logits (N, C) and targets (N,)."""


def describe(said: Said, names: Sequence[str], train_counts: Sequence[int], val: Said | None = None) -> dict[str, Any]:
    """Calibration and the spread over classes, of one model on one split.

    val: what the model says of the validation split, on which the temperature is fitted; None where there is none, or
    where it is that split that is described. train_counts: labelled training samples of each class. Percent, but for
    nll (nats), brier and temperature; None where nothing can be said.
    """
    temperature = math.nan if val is None else calibration.fit_temperature(*val)
    scaled = None if math.isnan(temperature) else probabilities((as_array(said[0]) / temperature, said[1]))
    document = probabilities(said) | {
        "temperature": temperature,
        "scaled": scaled,
        "reliability": calibration.reliability(*said),
        "balanced_accuracy": classes.balanced_accuracy(*said),
        "macro_f1": classes.macro_f1(*said),
        "worst_class": classes.worst_class(*said, names),
        "groups": classes.groups(*said, train_counts),
    }
    return _known(document)


def probabilities(said: Said) -> dict[str, float]:
    """How good the probabilities are: nll, brier, ece and adaptive_ece."""
    return {
        "nll": negative_log_likelihood(*said),
        "brier": calibration.brier(*said),
        "ece": calibration_error(*said),
        "adaptive_ece": calibration.adaptive_calibration_error(*said),
    }


def describe_fidelity(student: ArrayLike, teacher: ArrayLike, targets: ArrayLike) -> dict[str, Any]:
    """What student and teacher share (fidelity.describe_fidelity), None where nothing can be said."""
    return _known(fidelity.describe_fidelity(student, teacher, targets))


def describe_confusion(
    student: ArrayLike, teacher: ArrayLike | None, targets: ArrayLike
) -> dict[str, list[list[int]] | None] | None:
    """The matrices of confusions, truth by choice, of student and teacher; None with more than 100 classes."""
    if np.shape(student)[1] > MATRIX_CLASSES:
        return None
    said = {"student": student, "teacher": teacher}
    return {who: None if rows is None else classes.confusion(rows, targets).tolist() for who, rows in said.items()}


def _known(document: dict[str, Any]) -> dict[str, Any]:
    """The document with None for what is NaN."""
    known = {key: _known(value) if isinstance(value, dict) else value for key, value in document.items()}
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in known.items()}
