"""Symmetric KL: forward and reverse divergence together."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from kdctl.config.types import Fraction, Scheduled
from kdctl.losses.base import Loss
from kdctl.losses.kd import kl_divergence
from kdctl.signals import Batch, Signals


class SymmetricKL(Loss):
    """KL in both directions, weighted.

    Formula: T^2 (w KL(p_t || p_s) + (1 - w) KL(p_s || p_t)) of each row, p = softmax(z / T), w the argument forward.
        Rows are samples, pixels, or tokens that are not padding.
    Paper: Jeffreys, An invariant form for the prior probability in estimation problems, Proc. R. Soc. A 1946.
    Published: w 0.5, T 1 (torchtune, DistiLLM's baseline).

    forward: w, the share of the forward divergence; 1 is forward_kl (variant kl) and 0 is reverse_kl.
    temperature: T, softens both distributions; a map {epoch: T} changes it, linearly in between.
    """

    links: ClassVar[tuple[str, ...]] = ("softmax",)
    ALIASES: ClassVar[dict[str, str]] = {"T": "temperature"}

    def __init__(self, *, forward: Fraction = 0.5, temperature: Scheduled = 1.0) -> None:
        super().__init__()
        self.share = forward
        self.temperature = temperature

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        student_RC, teacher_RC = self.logit_pair(student, teacher)
        temperature = self.now(self.temperature)
        forward = kl_divergence(student_RC, teacher_RC, temperature)
        reverse = kl_divergence(teacher_RC, student_RC, temperature)
        return temperature**2 * (self.share * forward + (1 - self.share) * reverse)
