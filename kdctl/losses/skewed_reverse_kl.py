"""Skewed reverse KL: the student against a mixture of both."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from kdctl.config.types import Fraction
from kdctl.losses.base import Loss
from kdctl.losses.jsd import divergence, log_mixture
from kdctl.signals import Batch, Signals


class SkewedReverseKL(Loss):
    """KL of the student to a mixture of both: bounded, where the teacher has no probability for what the student says.

    Formula: sum over classes of p_s (log p_s - log(lam p_s + (1 - lam) p_t)) of each row. Rows are samples, pixels, or
        tokens that are not padding.
    Paper: Ko et al., DistiLLM: Towards Streamlined Distillation for Large Language Models, ICML 2024.
    Published: lam 0.1, weight 1 alone (DistiLLM).

    lam: the student's share of the mixture; 0 is reverse_kl, 1 leaves nothing to learn.
    """

    links: ClassVar[tuple[str, ...]] = ("softmax",)

    def __init__(self, *, lam: Fraction = 0.1) -> None:
        super().__init__()
        self.lam = lam

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        log_s, log_t = (F.log_softmax(z, dim=1) for z in self.logit_pair(student, teacher))
        return divergence(log_s, log_mixture(log_s, log_t, self.lam))
