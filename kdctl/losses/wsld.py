"""Weighted soft labels: kd, sample by sample weighted by how well student and teacher know the label."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdctl.config.types import Scheduled
from kdctl.losses.base import Loss
from kdctl.signals import Batch, Signals

_EPS = 1e-7


class WSLD(Loss):
    """Cross entropy to the teacher's softened probabilities, weighted down where the student knows the label better.

    Formula: -T^2 w sum_k p_t,k log p_s,k of each labelled row, p = softmax(z / T). w = 1 - exp(-CE_s / CE_t), a
        constant, with each model's cross entropy to the label at T = 1 (1e-7 added to the teacher's).
    Paper: Zhou et al., Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective, ICLR
        2021.
    Published: beside ce 1: T 2, weight 2.5 (MMRazor, ImageNet); T 4, weight 2.25 (cls_KD).

    temperature: T, softens both distributions; a map {epoch: T} changes it, linearly in between.
    """

    needs_targets: ClassVar[bool] = True
    links: ClassVar[tuple[str, ...]] = ("softmax",)
    ALIASES: ClassVar[dict[str, str]] = {"T": "temperature", "tau": "temperature"}

    def __init__(self, *, temperature: Scheduled = 2.0) -> None:
        super().__init__()
        self.temperature = temperature

    def count(self, batch: Batch) -> int | Tensor:
        return self.labels(batch)[1].sum()

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        labels, labelled = self.labels(batch)
        student_RC, teacher_RC = self.logit_pair(student, teacher)
        with torch.no_grad():
            known_s, known_t = (F.cross_entropy(z, labels, reduction="none") for z in (student_RC, teacher_RC))
            weight = -torch.expm1(-known_s / (known_t + _EPS))
        temperature = self.now(self.temperature)
        log_s, soft_t = (student_RC / temperature).log_softmax(1), (teacher_RC / temperature).softmax(1)
        value = -(temperature**2) * weight * (soft_t * log_s).sum(1)
        return value.masked_fill(~labelled, 0)
