"""Weighted transformed teacher matching: more weight where the teacher's probabilities are smooth."""

from __future__ import annotations

from torch import Tensor

from kdctl.losses.kd import kl_divergence
from kdctl.losses.ttm import TTM
from kdctl.signals import Batch, Signals


class WTTM(TTM):
    """KL divergence to the teacher's powered probabilities, with more weight where the teacher is in doubt.

    Formula: u KL(q || p_s) of each row. u = sum_k p_t,k^g and q_k = p_t,k^g / u with g = 1 / T; p_t and p_s are
        softmax(z) at T = 1. No factor T^2.
    Paper: Zheng & Yang, Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024.
    Published: CIFAR-100: beside ce 1, T and weight chosen for each pair.

    temperature: T, softens the teacher's distribution; a map {epoch: T} changes it, linearly in between.
    """

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        student_RC, teacher_RC = self.logit_pair(student, teacher)
        powered_RC = teacher_RC.log_softmax(1) / self.now(self.temperature)
        return powered_RC.logsumexp(1).exp() * kl_divergence(student_RC, powered_RC)
