"""DIST: correlation of the probabilities of student and teacher, sample by sample and class by class."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kdctl.config.types import NonNegative, Scheduled
from kdctl.losses.base import Loss
from kdctl.signals import Batch, Signals

_EPS = 1e-8
_SMALLEST = 1e-30


class DIST(Loss):
    """Correlation of probabilities: the student ranks the classes of a sample, and the samples of a class, alike.

    Formula: T^2 (beta (1 - mean over rows i of r(s_i, t_i)) + gamma (1 - mean over classes c of r(s_c, t_c))) of a
        batch. s and t are the softmax of z / T, a row i of it or a column c; r is Pearson's correlation, with 1e-8
        added to the product of the norms.
    Paper: Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022.
    Published: weight 2 beside ce 1, with beta 1 and gamma 1 inside; T 1 (ImageNet), 4 (CIFAR-100).

    temperature: T, softens both distributions; a map {epoch: T} changes it, linearly in between.
    beta: weight of the relation between the classes of a sample.
    gamma: weight of the relation between the samples of a class; it wants large batches.
    """

    batchwise: ClassVar[bool] = True
    links: ClassVar[tuple[str, ...]] = ("softmax",)
    ALIASES: ClassVar[dict[str, str]] = {"T": "temperature", "tau": "temperature"}

    def __init__(self, *, temperature: Scheduled = 1.0, beta: NonNegative = 1.0, gamma: NonNegative = 1.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.beta = beta
        self.gamma = gamma

    def forward(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        temperature = self.now(self.temperature)
        s_RC, t_RC = ((logits / temperature).softmax(1) for logits in self.logit_pair(student, teacher))
        between_classes = 1 - correlation(s_RC, t_RC).mean()
        between_samples = 1 - correlation(s_RC.T, t_RC.T).mean()
        value = self.beta * between_classes + self.gamma * between_samples
        return len(s_RC) * temperature**2 * value


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation of each row of two matrices; 0, without a gradient, where a row is constant.

    Rounding makes a row of equal numbers vary a little, and the gradient of that, 1e-8 dividing it, would be of the
    order of a million: a student whose last layer starts at zero would not survive its first step.
    """
    centred = [rows - rows.mean(1, keepdim=True) for rows in (first, second)]
    squares = [rows.square().sum(1) for rows in centred]
    norms = [square.clamp_min(_SMALLEST).sqrt() for square in squares]  # the floor is for the root's gradient
    value = (centred[0] * centred[1]).sum(1) / (norms[0] * norms[1] + _EPS)
    rounding = 8 * torch.finfo(value.dtype).eps
    constant = [v <= (rounding * rows).square().sum(1) for v, rows in zip(squares, (first, second), strict=True)]
    return value.masked_fill(constant[0] | constant[1], 0)
