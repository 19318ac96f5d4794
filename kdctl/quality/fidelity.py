"""How faithful a student is to its teacher, which is another question than how good it is (Stanton et al., "Does
knowledge distillation really work?", NeurIPS 2021).

Everything is computed in float64 from the logits (N, C) of both on the same samples, and targets (N,).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdctl.signals import IGNORE
from kdctl.tasks.classification import as_array, log_softmax, percent, predictions


def kl_divergence(student: ArrayLike, teacher: ArrayLike) -> float:
    """Mean over samples of KL(teacher || student) at temperature 1, in nats; NaN without samples or with a NaN."""
    return _mean(_kl(log_softmax(as_array(teacher)), log_softmax(as_array(student))))


def js_divergence(student: ArrayLike, teacher: ArrayLike) -> float:
    """Mean over samples of the Jensen-Shannon divergence at temperature 1, in nats, 0..log 2 (Lin, 1991)."""
    one, other = log_softmax(as_array(student)), log_softmax(as_array(teacher))
    with np.errstate(invalid="ignore"):
        middle = np.logaddexp(one, other) - np.log(2)
    return _mean((_kl(one, middle) + _kl(other, middle)) / 2)


def describe_fidelity(student: ArrayLike, teacher: ArrayLike, targets: ArrayLike) -> dict[str, float]:
    """What the two models share.

    agreement: percent of samples on which both choose the same class; kl, js: the divergences above. These need no
    label. Percent of the labelled samples, adding up to 100: `both_right`, `student_only` and `teacher_only` right,
    `both_wrong`. same_wrong: percent of the labelled samples on which both choose the same wrong class.
    inherited_errors: percent of the teacher's errors on which the student makes the same wrong choice; NaN where the
    teacher makes none. A row with a NaN decides for no class: it is wrong, and agrees with nothing.
    """
    s, t, truth = predictions(student), predictions(teacher), as_array(targets).astype(np.int64)
    same = (s == t) & (s >= 0)
    labelled = truth != IGNORE
    s_right, t_right = (s == truth)[labelled], (t == truth)[labelled]
    same_wrong = same[labelled] & ~t_right
    return {
        "agreement": percent(same),
        "kl": kl_divergence(student, teacher),
        "js": js_divergence(student, teacher),
        "both_right": percent(s_right & t_right),
        "student_only": percent(s_right & ~t_right),
        "teacher_only": percent(~s_right & t_right),
        "both_wrong": percent(~s_right & ~t_right),
        "same_wrong": percent(same_wrong),
        "inherited_errors": percent(same_wrong[~t_right]),
    }


def _kl(log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(p || q) of each row (N,), never below 0; a class of probability 0 in p adds nothing."""
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        terms = np.where(p == 0, 0.0, p * (log_p - log_q))
    return np.maximum(terms.sum(1), 0)


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if values.size else float("nan")
