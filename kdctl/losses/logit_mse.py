"""Logit matching: the squared distance of logits."""

from __future__ import annotations

from torch import Tensor

from kdctl.losses.base import Loss
from kdctl.signals import Batch, Signals


class LogitMSE(Loss):
    """Mean over the classes of (z_s - z_t)^2 (Ba & Caruana, NeurIPS 2014), of each row."""

    def forward(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        student_RC, teacher_RC = self.logit_pair(student, teacher)
        return (student_RC - teacher_RC).square().mean(1).sum()
