"""Distillation of several labels a sample: one KL divergence of two outcomes for each class."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from kdctl.config.types import Scheduled
from kdctl.losses.base import Loss
from kdctl.signals import Batch, Signals


class BinaryKD(Loss):
    """KL divergence of one sigmoid a class: each class is there or not, whatever the others are.

    Formula: T^2 sum over classes of p_t log(p_t / p_s) + (1 - p_t) log((1 - p_t) / (1 - p_s)) of each row,
        p = sigmoid(z / T).
    Paper: Yang et al., Multi-Label Knowledge Distillation, ICCV 2023 (at T = 1).
    Published: weight 10 beside the binary cross entropy, T 1 (L2D).

    temperature: T, softens both; a map {epoch: T} changes it, linearly in between.
    """

    links: ClassVar[tuple[str, ...]] = ("sigmoid",)
    ALIASES: ClassVar[dict[str, str]] = {"T": "temperature"}

    def __init__(self, *, temperature: Scheduled = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        temperature = self.now(self.temperature)
        student_RC, teacher_RC = (logits / temperature for logits in self.logit_pair(student, teacher))
        there = teacher_RC.sigmoid() * (F.logsigmoid(teacher_RC) - F.logsigmoid(student_RC))
        absent = (-teacher_RC).sigmoid() * (F.logsigmoid(-teacher_RC) - F.logsigmoid(-student_RC))
        return temperature**2 * (there + absent).sum(1)
