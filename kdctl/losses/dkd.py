"""Decoupled knowledge distillation: the target against the rest, and the classes of the rest among themselves."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kdctl.config.types import NonNegative, Scheduled
from kdctl.losses.base import Loss
from kdctl.losses.kd import kl_divergence
from kdctl.signals import Batch, Signals


class DKD(Loss):
    """KL divergence in two parts, weighted apart: the target against the rest, and the classes within the rest.

    Formula: T^2 (alpha KL(b_t || b_s) + beta KL(q_t || q_s)) of each labelled row. b = [p_y, 1 - p_y] with
        p = softmax(z / T) and the label y; q is the softmax of z / T over the classes but y. kd is alpha 1 with beta
        1 - p_y of the teacher. With two classes the second part is 0.
    Paper: Zhao et al., Decoupled Knowledge Distillation, CVPR 2022.
    Published: weight 1 beside ce 1, alpha 1. CIFAR-100: T 4, warm-up 20, beta 2 for resnet56 and resnet110 teachers, 6
        for vgg and wrn, 8 for resnet32x4 and for shufflenet and mobilenet students. ImageNet: T 1, warm-up 1, beta 0.5
        (resnet34 to resnet18) or 2 (resnet50 to mobilenet v1).

    temperature: T, softens both distributions; a map {epoch: T} changes it, linearly in between.
    alpha: weight of the target against the rest.
    beta: weight of the classes within the rest.
    warmup_epochs: the whole term rises linearly from 0 over so many epochs; 0 for none.
    """

    needs_targets: ClassVar[bool] = True
    links: ClassVar[tuple[str, ...]] = ("softmax",)
    ALIASES: ClassVar[dict[str, str]] = {"T": "temperature", "warmup": "warmup_epochs"}

    def __init__(
        self,
        *,
        temperature: Scheduled = 4.0,
        alpha: NonNegative = 1.0,
        beta: NonNegative = 8.0,
        warmup_epochs: NonNegative = 0.0,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.alpha = alpha
        self.beta = beta
        self.warmup_epochs = warmup_epochs

    def count(self, batch: Batch) -> int | Tensor:
        return self.labels(batch)[1].sum()

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        labels, labelled = self.labels(batch)
        temperature = self.now(self.temperature)
        student_RC, teacher_RC = (logits / temperature for logits in self.logit_pair(student, teacher))
        target = kl_divergence(target_and_rest(student_RC, labels), target_and_rest(teacher_RC, labels))
        within = kl_divergence(without_target(student_RC, labels), without_target(teacher_RC, labels))
        value = temperature**2 * (self.alpha * target + self.beta * within)
        return self._rise() * value.masked_fill(~labelled, 0)

    def _rise(self) -> float:
        return min(self.epoch / self.warmup_epochs, 1.0) if self.warmup_epochs else 1.0


def without_target(logits_RC: Tensor, labels_R: Tensor) -> Tensor:
    """The logits of the classes but each row's label, in order: (R, C - 1)."""
    others = torch.arange(logits_RC.shape[1] - 1, device=logits_RC.device)
    return logits_RC.gather(1, others + (others >= labels_R[:, None]).long())


def target_and_rest(logits_RC: Tensor, labels_R: Tensor) -> Tensor:
    """Logits (R, 2) whose softmax is [p_y, 1 - p_y]; finite where p_y is 1 in any precision."""
    target_R1 = logits_RC.gather(1, labels_R[:, None])
    rest_R1 = without_target(logits_RC, labels_R).logsumexp(1, keepdim=True)
    return torch.cat([target_R1, rest_R1], dim=1)
