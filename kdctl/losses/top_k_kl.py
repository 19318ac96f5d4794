"""KL divergence over the teacher's most probable classes and the mass of the rest."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kdctl.config.types import PositiveInt, Scheduled
from kdctl.losses.base import Loss
from kdctl.losses.kd import kl_divergence
from kdctl.signals import Batch, Signals


class TopKKL(Loss):
    """KL divergence over the teacher's k most probable classes, with all others as one class.

    Formula: T^2 KL(t || s) of each row, over k + 1 classes: p = softmax(z / T) of the teacher's k largest logits, and
        the sum of p over the rest. A lower bound of kd; equal to it where k is the number of classes or one less.
    Paper: none; a rest class for probabilities that are kept in part, so that k probabilities are no distribution that
        sums to one by itself.
    Published: no weights; take those of kd.

    k: how many of the teacher's classes are told apart.
    temperature: T, softens both distributions; a map {epoch: T} changes it, linearly in between.
    """

    links: ClassVar[tuple[str, ...]] = ("softmax",)
    ALIASES: ClassVar[dict[str, str]] = {"T": "temperature"}

    def __init__(self, *, k: PositiveInt = 10, temperature: Scheduled = 4.0) -> None:
        super().__init__()
        self.k = k
        self.temperature = temperature

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        temperature = self.now(self.temperature)
        student_RC, teacher_RC = (logits / temperature for logits in self.logit_pair(student, teacher))
        if self.k < teacher_RC.shape[1]:
            top_RK = teacher_RC.topk(self.k, dim=1).indices
            student_RC, teacher_RC = with_rest(student_RC, top_RK), with_rest(teacher_RC, top_RK)
        return temperature**2 * kl_divergence(student_RC, teacher_RC)


def with_rest(logits_RC: Tensor, classes_RK: Tensor) -> Tensor:
    """Logits (R, K + 1): those of the named classes, and one with the mass of all others."""
    rest_R1 = logits_RC.scatter(1, classes_RK, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([logits_RC.gather(1, classes_RK), rest_R1], dim=1)
