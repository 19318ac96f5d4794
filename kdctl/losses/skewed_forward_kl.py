"""Skewed forward KL: the teacher against a mixture of both."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from kdctl.config.types import Fraction
from kdctl.losses.base import Loss
from kdctl.losses.jsd import divergence, log_mixture
from kdctl.signals import Batch, Signals


class SkewedForwardKL(Loss):
    """KL of the teacher to a mixture of both: bounded, where the student has no probability for what the teacher says.

    Formula: -(sum over classes of p_t log(lam p_t + (1 - lam) p_s)) of each row: the divergence plus the teacher's
        entropy, a constant. Rows are samples, pixels, or tokens that are not padding.
    Paper: Ko et al., DistiLLM: Towards Streamlined Distillation for Large Language Models, ICML 2024.
    Published: lam 0.1, weight 1 alone (DistiLLM).

    lam: the teacher's share of the mixture; 0 is forward_kl, 1 leaves nothing to learn.
    variant: `cross_entropy` leaves the teacher's entropy in, the value that DistiLLM reports; `kl` takes it away, so
        that 0 is reached at the teacher. Their gradients are the same.
    """

    links: ClassVar[tuple[str, ...]] = ("softmax",)

    def __init__(self, *, lam: Fraction = 0.1, variant: Literal["cross_entropy", "kl"] = "cross_entropy") -> None:
        super().__init__()
        self.lam = lam
        self.variant = variant

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        log_s, log_t = (F.log_softmax(z, dim=1) for z in self.logit_pair(student, teacher))
        log_m = log_mixture(log_t, log_s, self.lam)
        return divergence(log_t, log_m) if self.variant == "kl" else -(log_t.exp() * log_m).sum(1)
