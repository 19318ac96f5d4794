"""Teacher-free regularisation: a teacher made by hand from the label."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kdctl.config.types import Fraction, Scheduled
from kdctl.losses.base import Loss
from kdctl.losses.kd import kl_divergence
from kdctl.signals import Batch, Signals


class TfReg(Loss):
    """KL divergence to a teacher made by hand, nearly sure of the label and softened: label smoothing as distillation.

    Formula: KL(softmax(u / T) || softmax(z_s)) of each labelled row. u is `correct` for the label and
        (1 - correct) / (C - 1) for each other class; the student stands at T = 1, as in the authors' code.
    Paper: Yuan et al., Revisiting Knowledge Distillation via Label Smoothing Regularization, CVPR 2020, section 4.
    Published: CIFAR-100, resnet18: T 20, weight 0.1 beside ce 0.9 (the code takes the mean over rows and classes times
        100, which for 100 classes is the sum over classes of here).

    correct: a, the made teacher's value for the label.
    temperature: T, softens the made teacher; a map {epoch: T} changes it, linearly in between.
    """

    needs_teacher: ClassVar[bool] = False
    needs_targets: ClassVar[bool] = True
    links: ClassVar[tuple[str, ...]] = ("softmax",)
    ALIASES: ClassVar[dict[str, str]] = {"T": "temperature", "a": "correct"}

    def __init__(self, *, correct: Fraction = 0.99, temperature: Scheduled = 20.0) -> None:
        super().__init__()
        self.correct = correct
        self.temperature = temperature

    def count(self, batch: Batch) -> int | Tensor:
        return self.labels(batch)[1].sum()

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        labels, labelled = self.labels(batch)
        logits_RC = student.rows()
        other = (1 - self.correct) / (logits_RC.shape[1] - 1)
        made_RC = torch.full_like(logits_RC, other).scatter(1, labels[:, None], self.correct)
        return kl_divergence(logits_RC, made_RC / self.now(self.temperature)).masked_fill(~labelled, 0)
