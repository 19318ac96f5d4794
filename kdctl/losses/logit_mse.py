"""Logit matching: the squared distance of logits."""

from __future__ import annotations

from torch import Tensor

from kdctl.losses.base import Loss
from kdctl.signals import Batch, Signals


class LogitMSE(Loss):
    """Squared distance of logits.

    Formula: mean over the C classes of (z_s - z_t)^2, of each row.
    Paper: Ba & Caruana, Do Deep Nets Really Need to be Deep?, NeurIPS 2014, eq. 1 (there with 1/2 and a sum).
    Published: KDZ trains with weight 1 alone.
    """

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        student_RC, teacher_RC = self.logit_pair(student, teacher)
        return (student_RC - teacher_RC).square().mean(1)
