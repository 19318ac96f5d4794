"""Balanced knowledge distillation: the teacher's probabilities with rare classes weighted up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from kdctl.config.types import Fraction, PositiveInt, Scheduled
from kdctl.errors import ConfigError, Problem
from kdctl.losses.base import DryRun, Loss
from kdctl.losses.kd import kl_divergence
from kdctl.signals import Batch, Signals


class BalancedKD(Loss):
    """KL divergence to the teacher's softened probabilities, in which rare classes are weighted up.

    Formula: T^2 KL(q || softmax(z_s / T)) of each row. q_k is w_k softmax(z_t / T)_k, divided by the sum over classes;
        w_k = (1 - beta) / (1 - beta^n_k) for n_k samples of class k, the inverse of their effective number.
    Paper: Zhang et al., Balanced Knowledge Distillation for Long-tailed Learning, Neurocomputing 2023; weights: Cui et
        al., Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019.
    Published: beside ce 1, beta 0.9999; the teacher is trained by ce alone on the same long-tailed classes.

    class_counts: how many training samples each class has, in the order of the classes; empty for equal weights,
        which is kd.
    beta: 0 weighs all classes alike, 1 by the inverse of their number.
    temperature: T, softens both distributions; a map {epoch: T} changes it, linearly in between.
    """

    links: ClassVar[tuple[str, ...]] = ("softmax",)
    ALIASES: ClassVar[dict[str, str]] = {"T": "temperature"}
    log_weights_C: Tensor

    def __init__(
        self, *, class_counts: Sequence[PositiveInt] = (), beta: Fraction = 0.9999, temperature: Scheduled = 2.0
    ) -> None:
        super().__init__()
        self.class_counts = tuple(class_counts)
        self.beta = beta
        self.temperature = temperature

    def setup(self, dry_run: DryRun) -> None:
        logits_RC = dry_run.student.rows()
        classes = logits_RC.shape[1]
        counts_C = torch.tensor(self.class_counts or [1] * classes, dtype=torch.float64)
        if len(counts_C) != classes:
            message = f"class_counts has {len(counts_C)} numbers, the student {classes} classes"
            hint = "give the number of training samples of each class"
            raise ConfigError(Problem(message, key="class_counts", hint=hint))
        log_weights_C = -log_effective_number(counts_C, self.beta)
        self.register_buffer("log_weights_C", log_weights_C.to(logits_RC), persistent=False)

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        temperature = self.now(self.temperature)
        student_RC, teacher_RC = (logits / temperature for logits in self.logit_pair(student, teacher))
        return temperature**2 * kl_divergence(student_RC, teacher_RC + self.log_weights_C)


def log_effective_number(counts: Tensor, beta: float) -> Tensor:
    """log((1 - beta^n) / (1 - beta)) of each count n; its limit log n where beta is 1."""
    if beta == 1:
        return counts.log()
    powers = torch.tensor(beta, dtype=counts.dtype).log() * counts
    return (-torch.expm1(powers)).log() - torch.log1p(torch.tensor(-beta, dtype=counts.dtype))
