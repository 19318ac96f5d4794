"""Pearson feature distillation: standardised channels compared, which is their correlation."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from kdctl.losses.adapters import FeatureLoss, linear_adapter
from kdctl.signals import Batch, Signals

_EPS = 1e-6


class PearsonFeature(FeatureLoss):
    """Squared distance of standardised channels: blind to the scale and the offset of each, as a correlation is.

    Formula: 1/2 mean over N, C, H, W of (z(f_s) - z(f_t))^2, summed over pairs of taps; z takes each channel to mean 0
        and standard deviation 1 over N, H, W (the sample standard deviation, + 1e-6). Nearly 1 - the correlation.
    Paper: Cao et al., PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient,
        NeurIPS 2022.
    Published: weight 6 on each of four levels of the pyramid for Faster R-CNN, 10 for RetinaNet (MMRazor).
    Taps: maps of a detector or segmenter, for example every level of the pyramid. Vectors and tokens are standardised
        over samples and positions.

    Maps of another size are resized to the teacher's, bilinearly; where channels differ, a learnt linear adapter (for
    maps a 1x1 convolution) takes the student's to the teacher's. Defined on the batch: its statistics are the batch's.
    """

    batchwise: ClassVar[bool] = True

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        return batch.size * super().values(student, teacher, batch)

    def adapter(self, student: Tensor, teacher: Tensor) -> nn.Module:
        if student.ndim == 4 and student.shape[1] != teacher.shape[1]:
            return nn.Conv2d(student.shape[1], teacher.shape[1], 1)
        return nn.Identity() if student.ndim == 4 else linear_adapter(student, teacher)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        if student.ndim == 4 and student.shape[2:] != teacher.shape[2:]:
            student = F.interpolate(student, teacher.shape[2:], mode="bilinear")
        return (_standardized(student) - _standardized(teacher)).square().mean() / 2


def _standardized(feature: Tensor) -> Tensor:
    """Each channel with its mean over samples and positions taken away, divided by its standard deviation."""
    axes = (0, 2, 3) if feature.ndim == 4 else tuple(range(feature.ndim - 1))
    centred = feature - feature.mean(axes, keepdim=True)
    degrees = max(feature.numel() // feature.shape[1 if feature.ndim == 4 else -1] - 1, 1)
    variance = centred.square().sum(axes, keepdim=True) / degrees
    # The floor keeps the root's gradient finite for a channel that is dead.
    return centred / (variance.clamp_min(1e-20).sqrt() + _EPS)
