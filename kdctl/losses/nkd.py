"""Normalised knowledge distillation: cross entropy of the target, and of the classes of the rest among themselves."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from kdctl.config.types import NonNegative, Scheduled
from kdctl.losses.base import Loss
from kdctl.losses.dkd import without_target
from kdctl.signals import Batch, Signals


class NKD(Loss):
    """Cross entropy in two parts: the target as the teacher is sure of it, and the other classes scaled to sum to one.

    Formula: -p_t,y log p_s,y - gamma T^2 sum_k q_t,k log q_s,k of each labelled row. p = softmax(z) at T = 1, y is the
        label; q is the softmax of z / T over the classes but y. With two classes the second part is 0.
    Paper: Yang et al., From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized
        Loss and Customized Soft Labels, ICCV 2023.
    Published: ImageNet: weight 1 beside ce 1, T 1, gamma 1.5 (cls_KD).

    temperature: T, softens the other classes; a map {epoch: T} changes it, linearly in between.
    gamma: weight of the other classes.
    """

    needs_targets: ClassVar[bool] = True
    links: ClassVar[tuple[str, ...]] = ("softmax",)
    ALIASES: ClassVar[dict[str, str]] = {"T": "temperature"}

    def __init__(self, *, temperature: Scheduled = 1.0, gamma: NonNegative = 1.5) -> None:
        super().__init__()
        self.temperature = temperature
        self.gamma = gamma

    def count(self, batch: Batch) -> int | Tensor:
        return self.labels(batch)[1].sum()

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        labels, labelled = self.labels(batch)
        student_RC, teacher_RC = self.logit_pair(student, teacher)
        temperature = self.now(self.temperature)
        log_s, log_t = (without_target(z / temperature, labels).log_softmax(1) for z in (student_RC, teacher_RC))
        others = -(log_t.exp() * log_s).sum(1)
        value = target_cross_entropy(student_RC, teacher_RC, labels) + self.gamma * temperature**2 * others
        return value.masked_fill(~labelled, 0)


def target_cross_entropy(student_RC: Tensor, teacher_RC: Tensor, labels_R: Tensor) -> Tensor:
    """-p_t,y log p_s,y of each row (R,) at its label y."""
    log_s, log_t = (
        logits.log_softmax(1).gather(1, labels_R[:, None]).squeeze(1) for logits in (student_RC, teacher_RC)
    )
    return -log_t.exp() * log_s
