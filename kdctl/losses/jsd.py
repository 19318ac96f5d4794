"""Generalised Jensen-Shannon divergence: both distributions against their mixture.

R rows (samples, pixels, tokens), C classes.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdctl.config.types import Fraction, Scheduled
from kdctl.losses.base import Loss
from kdctl.signals import Batch, Signals


class JSD(Loss):
    """Generalised Jensen-Shannon divergence: teacher and student, each against their mixture.

    Formula: b KL(p_t || m) + (1 - b) KL(p_s || m) of each row, m = b p_t + (1 - b) p_s, p = softmax(z / T). Where b is
        0 or 1 this vanishes; KL(p_t || p_s) stands in its place at 0, KL(p_s || p_t) at 1, the limits of the divergence
        over b (1 - b). Rows are samples, pixels, or tokens that are not padding.
    Paper: Agarwal et al., On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes (GKD), ICLR
        2024, eq. 1.
    Published: b 0.5, T 0.9 (the defaults of TRL's GKD). As there, and unlike kd, there is no factor T^2: at a higher T
        the gradient is smaller.

    beta: b, the teacher's share of the mixture.
    temperature: T, softens both distributions; a map {epoch: T} changes it, linearly in between.
    """

    links: ClassVar[tuple[str, ...]] = ("softmax",)
    ALIASES: ClassVar[dict[str, str]] = {"T": "temperature"}

    def __init__(self, *, beta: Fraction = 0.5, temperature: Scheduled = 1.0) -> None:
        super().__init__()
        self.beta = beta
        self.temperature = temperature

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        temperature = self.now(self.temperature)
        log_s, log_t = (F.log_softmax(z / temperature, dim=1) for z in self.logit_pair(student, teacher))
        if self.beta == 0:
            return divergence(log_t, log_s)
        if self.beta == 1:
            return divergence(log_s, log_t)
        log_m = log_mixture(log_t, log_s, self.beta)
        return self.beta * divergence(log_t, log_m) + (1 - self.beta) * divergence(log_s, log_m)


def divergence(log_p_RC: Tensor, log_q_RC: Tensor) -> Tensor:
    """KL(p || q) of each row (R,), from logarithms of probabilities."""
    return (log_p_RC.exp() * (log_p_RC - log_q_RC)).sum(1)


def log_mixture(log_p_RC: Tensor, log_q_RC: Tensor, share: float) -> Tensor:
    """The logarithm of share p + (1 - share) q, exact where both vanish."""
    if share in (0, 1):
        return log_p_RC if share else log_q_RC
    return torch.logaddexp(log_p_RC + math.log(share), log_q_RC + math.log1p(-share))
