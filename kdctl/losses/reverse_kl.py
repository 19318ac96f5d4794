"""Reverse KL: the student gives probability only where the teacher does."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from kdctl.config.types import Scheduled
from kdctl.losses.base import Loss
from kdctl.losses.kd import kl_divergence
from kdctl.signals import Batch, Signals


class ReverseKL(Loss):
    """KL(student || teacher): the student gives probability only where the teacher does, and may drop modes.

    Formula: T^2 sum over classes of p_s (log p_s - log p_t) of each row, p = softmax(z / T). Rows are samples, pixels,
        or tokens that are not padding.
    Paper: Gu et al., MiniLLM: Knowledge Distillation of Large Language Models, ICLR 2024, eq. 1 (there of whole
        sequences that the student writes; here of each token).
    Published: T 1 (MiniLLM, DistiLLM, torchtune).

    temperature: T, softens both distributions; a map {epoch: T} changes it, linearly in between.
    """

    links: ClassVar[tuple[str, ...]] = ("softmax",)
    ALIASES: ClassVar[dict[str, str]] = {"T": "temperature"}

    def __init__(self, *, temperature: Scheduled = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        student_RC, teacher_RC = self.logit_pair(student, teacher)
        temperature = self.now(self.temperature)
        return temperature**2 * kl_divergence(teacher_RC, student_RC, temperature)
