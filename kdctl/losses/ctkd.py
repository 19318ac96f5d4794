"""Curriculum temperature: kd at a temperature that is learnt against the student."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from kdctl.config.types import NonNegative, Positive
from kdctl.losses.base import Loss
from kdctl.losses.kd import kl_divergence
from kdctl.signals import Batch, Signals


class CTKD(Loss):
    """KL divergence of softened probabilities at one learnt temperature, which makes it harder as training goes on.

    Formula: T^2 KL(softmax(z_t / T) || softmax(z_s / T)) of each row, T = start + span sigmoid(theta). theta starts at
        1. Its gradient is multiplied by lambda(epoch) = (cos(pi min(epoch / decay_epochs, 1)) - 1) / 2, which goes from
        0 to -1: first the temperature stands still, then it climbs the loss that the student descends.
    Paper: Li et al., Curriculum Temperature for Knowledge Distillation, AAAI 2023.
    Published: CIFAR-100: start 1, span 20, 10 epochs, one temperature for all samples; weights as for kd.

    start: the lowest temperature.
    span: how far above `start` the temperature may rise.
    decay_epochs: over how many epochs lambda goes from 0 to -1; 0 for -1 at once.
    """

    links: ClassVar[tuple[str, ...]] = ("softmax",)
    ALIASES: ClassVar[dict[str, str]] = {"t_start": "start", "t_end": "span", "decay_loops": "decay_epochs"}

    def __init__(self, *, start: Positive = 1.0, span: Positive = 20.0, decay_epochs: NonNegative = 10.0) -> None:
        super().__init__()
        self.start = start
        self.span = span
        self.decay_epochs = decay_epochs
        self.theta = nn.Parameter(torch.ones(()))

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        student_RC, teacher_RC = self.logit_pair(student, teacher)
        held = self.theta.detach()
        theta = held + self._reversal() * (self.theta - held)  # the value is theta's, the gradient lambda times it
        temperature = self.start + self.span * theta.sigmoid()
        return temperature**2 * kl_divergence(student_RC / temperature, teacher_RC / temperature)

    def _reversal(self) -> float:
        """lambda: what multiplies the gradient of theta at this moment."""
        progress = min(self.epoch / self.decay_epochs, 1.0) if self.decay_epochs else 1.0
        return (math.cos(math.pi * progress) - 1) / 2
