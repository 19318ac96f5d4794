"""Confidence-aware distillation from several teachers: whoever knows a sample best teaches it most."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdctl.errors import ConfigError, counted
from kdctl.losses.adapters import FeatureLoss, align, linear_adapter
from kdctl.losses.base import DryRun
from kdctl.signals import Batch, Signals


class CAMKD(FeatureLoss):
    """Squared distance of features to several teachers', each weighted by its confidence on the sample.

    Formula: (1/K) sum_k w_k mean over C, H, W of (r_k(f_s,k) - f_t,k)^2 of each labelled sample, over K teachers, where
        w_k = (1 - softmax_k(CE_k)) / (K - 1), CE_k is the cross entropy of teacher k and r_k an adapter (identity where
        shapes are equal). A single teacher has w 1.
    Paper: Zhang, Chen & Wang, Confidence-Aware Multi-Teacher Knowledge Distillation, ICASSP 2022.
    Published: CIFAR-100: weight 50 from the second epoch on, beside ce 1 and the same weights on logits (CA-MKD).
    Taps: the last stage output, one pair for each teacher, in their order.
    """

    needs_targets: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = True
    sees_members: ClassVar[bool] = True
    links: ClassVar[tuple[str, ...]] = ("softmax",)

    def setup(self, dry_run: DryRun) -> None:
        teachers = _members(dry_run.teacher)
        if len(self.taps) != len(teachers):
            message = f"{counted(len(teachers), 'teacher')} and {counted(len(self.taps), 'pair')} of taps"
            raise ConfigError(message, hint="tap pair k is compared with teacher k: give one for each")
        super().setup(dry_run)

    def adapter(self, student: Tensor, teacher: Tensor) -> nn.Module:
        return linear_adapter(student, teacher)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).square().flatten(1).mean(1)

    def count(self, batch: Batch) -> int | Tensor:
        return self.labels(batch)[1].sum()

    def feature_pairs(self, student: Signals, teacher: Signals | None) -> list[tuple[Tensor, Tensor]]:
        pairs = zip(self.taps, _members(teacher), strict=True)
        return [(student.feature(s), member.feature(t).detach()) for (s, t), member in pairs]

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        labels, labelled = self.labels(batch)
        distances = []
        for adapter, pair in zip(self.adapters, self.feature_pairs(student, teacher), strict=True):
            mine, target = align(*pair)
            distances.append(self.distance(adapter(mine).to(target.dtype), target))
        rows = [member.rows().detach() for member in _members(teacher)]
        errors_KN = torch.stack([F.cross_entropy(logits_NC, labels, reduction="none") for logits_NC in rows])
        values = (_weights(errors_KN) * torch.stack(distances)).mean(0)
        return values.masked_fill(~labelled, 0)


def _members(teacher: Signals | None) -> tuple[Signals, ...]:
    assert teacher is not None
    return teacher.members or (teacher,)


def _weights(errors_KN: Tensor) -> Tensor:
    """How much each teacher counts, by its cross entropy on each sample; they sum to 1 over teachers."""
    others = len(errors_KN) - 1
    return (1 - errors_KN.softmax(0)) / others if others else torch.ones_like(errors_KN)
