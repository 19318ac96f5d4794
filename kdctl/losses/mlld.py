"""Multi-level logit distillation: samples, batches and classes, at several temperatures and in two streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from kdctl.config.types import Fraction, Positive
from kdctl.losses.base import DryRun, Loss
from kdctl.losses.byot import require_one_row_a_sample
from kdctl.losses.kd import kl_divergence
from kdctl.losses.relations import full_precision
from kdctl.signals import Batch, Signals


class MLLD(Loss):
    """Probabilities at several temperatures: those of each sample, how samples relate, and how classes relate.

    Formula: sum over temperatures T of mean_i m_i T^2 KL(t_i || s_i) + sum_ij m_j ((t t')_ij - (s s')_ij)^2 / B
        + sum_cd n_d ((t' t)_cd - (s' s)_cd)^2 / C of a batch, with t and s (B, C) the softmax of z / T. The masks m and
        n are 1 for the samples where the teacher's largest probability at T = 1 is not above the quantile of the batch,
        and for the classes whose sum of probabilities is not above that of the classes. Where there is a strongly
        augmented version of the batch, the same of it is added, its samples by the mask of the weak version in the
        second summand alone, its classes without a mask.
    Paper: Jin, Wang & Lin, Multi-Level Logit Distillation, CVPR 2023.
    Published: CIFAR-100: weight 0.9 beside ce 0.1 on both versions, RandAugment for the strong one. The authors' code
        multiplies means by the mean of a mask, uses the weak version for the last two temperatures of the strong one,
        and leaves out the relations of the strong one; here the masks mask and the strong version is used throughout.

    The third summand grows with the square of B / C: next to nothing for 100 classes, with 10 it outweighs the others
    (about three times the KL at B 128). Take smaller batches there.

    temperatures: the T that are summed over.
    quantile: which share of the samples and of the classes, the least sure and the rarest, the masks keep; 1 keeps all.
    """

    batchwise: ClassVar[bool] = True
    sees_streams: ClassVar[bool] = True
    links: ClassVar[tuple[str, ...]] = ("softmax",)

    def __init__(
        self, *, temperatures: Sequence[Positive] = (4.0, 3.0, 5.0, 2.0, 6.0), quantile: Fraction = 0.5
    ) -> None:
        super().__init__()
        self.temperatures = tuple(temperatures)
        self.quantile = quantile

    def setup(self, dry_run: DryRun) -> None:
        require_one_row_a_sample(dry_run)

    def forward(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        weak = self.logit_pair(student, teacher)
        with full_precision(student.logits):
            certain_BC = weak[1].softmax(1)
            samples_B = self._least(certain_BC.amax(1))
            classes_C = self._least(certain_BC.sum(0))
            value = self._levels(weak, samples_B, samples_B, classes_C)
            if student.strong is not None and teacher is not None:
                strong = self.logit_pair(student.strong, teacher.strong)
                every_sample, every_class = torch.ones_like(samples_B), torch.ones_like(classes_C)
                value = value + self._levels(strong, every_sample, samples_B, every_class)
        return len(weak[0]) * value

    def _least(self, certainty: Tensor) -> Tensor:
        """1 for what is not above the quantile, 0 for the others."""
        return (certainty <= certainty.quantile(self.quantile)).to(certainty.dtype)

    def _levels(self, pair: tuple[Tensor, Tensor], samples_B: Tensor, related_B: Tensor, classes_C: Tensor) -> Tensor:
        """The three levels of one stream, summed over temperatures: a scalar."""
        levels = []
        for temperature in self.temperatures:
            kl_B = temperature**2 * kl_divergence(*pair, temperature)
            s_BC, t_BC = ((logits / temperature).softmax(1) for logits in pair)
            levels.append((samples_B * kl_B).mean())
            levels.append(((t_BC @ t_BC.T - s_BC @ s_BC.T).square() @ related_B).sum() / len(related_B))
            levels.append(((t_BC.T @ t_BC - s_BC.T @ s_BC).square() @ classes_C).sum() / len(classes_C))
        return torch.stack(levels).sum()
