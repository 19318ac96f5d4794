"""Knowledge distillation: the KL divergence between softened class probabilities.

R rows (samples, pixels, tokens), C classes.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from kdctl.config.types import Scheduled
from kdctl.errors import ConfigError, Problem
from kdctl.losses.base import DryRun, Loss
from kdctl.signals import Batch, Signals

_STANDARDIZE_EPS = 1e-7


class KD(Loss):
    """KL divergence of softened probabilities: the student answers with the teacher's certainty and doubts.

    Formula: T^2 KL(softmax(z_t / T) || softmax(z_s / T)) of each row. The factor T^2 keeps the size of the gradient
        when the temperature changes.
    Paper: Hinton, Vinyals & Dean, Distilling the Knowledge in a Neural Network, NeurIPS workshop 2014.
    Published: CIFAR-100: T 4, weight 0.9 beside ce 0.1 (RepDistiller, every pair); ImageNet: T 1, 0.5 and 0.5.
        With standardize (Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024): T 2, weight 9, ce
        0.1.

    temperature: T, softens both distributions; a map {epoch: T} changes it, linearly in between.
    standardize: first takes each row of logits to mean 0 and standard deviation 1, so that the student need not match
        the scale of the teacher's logits (z-score with the sample standard deviation).
    """

    links: ClassVar[tuple[str, ...]] = ("softmax",)
    ALIASES: ClassVar[dict[str, str]] = {"T": "temperature"}

    def __init__(self, *, temperature: Scheduled = 4.0, standardize: bool = False) -> None:
        super().__init__()
        self.temperature = temperature
        self.standardize = standardize

    def setup(self, dry_run: DryRun) -> None:
        if self.standardize and dry_run.student.rows().shape[1] == 2:
            message = "of two classes every row of standardised logits is the same: the student would learn nothing"
            raise ConfigError(Problem(message, key="standardize", hint="leave it out"))

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        student_RC, teacher_RC = self.logit_pair(student, teacher)
        if self.standardize:
            student_RC, teacher_RC = standardized(student_RC), standardized(teacher_RC)
        temperature = self.now(self.temperature)
        return temperature**2 * kl_divergence(student_RC, teacher_RC, temperature)


def kl_divergence(student_RC: Tensor, teacher_RC: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) in nats of each row (R,), at a temperature and without its square.

    From differences of log-probabilities: exactly zero for equal logits, finite for confident ones. Gradients flow to
    both sides.
    """
    log_s = F.log_softmax(student_RC / temperature, dim=1)
    log_t = F.log_softmax(teacher_RC / temperature, dim=1)
    return (log_t.exp() * (log_t - log_s)).sum(1)


def standardized(logits_RC: Tensor) -> Tensor:
    """Each row with its mean taken away, divided by its sample standard deviation + 1e-7."""
    centred = logits_RC - logits_RC.mean(1, keepdim=True)
    variance = centred.square().sum(1, keepdim=True) / (logits_RC.shape[1] - 1)
    # The floor keeps the root's gradient finite for a row of equal logits, as an untrained head may give.
    return centred / (variance.clamp_min(1e-20).sqrt() + _STANDARDIZE_EPS)
