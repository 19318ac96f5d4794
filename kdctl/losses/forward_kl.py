"""Forward KL: the student gives probability wherever the teacher does."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from kdctl.config.types import Scheduled
from kdctl.losses.base import Loss
from kdctl.losses.kd import kl_divergence
from kdctl.signals import Batch, Signals


class ForwardKL(Loss):
    """KL(teacher || student), as language models use it: the student gives probability wherever the teacher does.

    Formula: -T^2 sum over classes of p_t log p_s of each row, p = softmax(z / T): the divergence plus the teacher's
        entropy, a constant. Rows are samples, pixels, or tokens that are not padding.
    Paper: Hinton, Vinyals & Dean, Distilling the Knowledge in a Neural Network, NeurIPS workshop 2014.
    Published: T 1, weights 0.5 and 0.5 beside supervised (torchtune); DistiLLM's baseline has T 1 alone.

    variant: `cross_entropy` leaves the teacher's entropy in, the value that torchtune and DistiLLM report; `kl` takes
        it away, so that 0 is reached at the teacher. Their gradients are the same.
    temperature: T, softens both distributions; a map {epoch: T} changes it, linearly in between.
    """

    links: ClassVar[tuple[str, ...]] = ("softmax",)
    ALIASES: ClassVar[dict[str, str]] = {"T": "temperature"}

    def __init__(
        self, *, variant: Literal["cross_entropy", "kl"] = "cross_entropy", temperature: Scheduled = 1.0
    ) -> None:
        super().__init__()
        self.variant = variant
        self.temperature = temperature

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        student_RC, teacher_RC = self.logit_pair(student, teacher)
        temperature = self.now(self.temperature)
        if self.variant == "kl":
            return temperature**2 * kl_divergence(student_RC, teacher_RC, temperature)
        log_s = F.log_softmax(student_RC / temperature, dim=1)
        return -(temperature**2) * (F.softmax(teacher_RC / temperature, dim=1) * log_s).sum(1)
