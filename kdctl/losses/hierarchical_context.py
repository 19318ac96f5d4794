"""Hierarchical context: features compared at several levels of pooling."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kdctl.losses.adapters import FeatureLoss, linear_adapter
from kdctl.losses.attention_transfer import as_map

_LEVELS = (4, 2, 1)
"""The sides of the pooled maps."""


class HierarchicalContext(FeatureLoss):
    """Squared distance at full size and at coarser levels: details and context at once.

    Formula: (d_0 + d_1 / 2 + d_2 / 4 + d_3 / 8) / (1 + 1/2 + 1/4 + 1/8) of each sample, summed over pairs of taps; d_0
        is the mean over C, H, W of (f_s - f_t)^2, the others the same of maps averaged down to 4x4, 2x2 and 1x1. A
        level not smaller than the map is left out and the next takes its weight. Tokens (B, L, D) are a column of L. A
        student's feature of another shape goes through a learnt linear map.
    Paper: Chen et al., Distilling Knowledge via Knowledge Review, CVPR 2021 (HCL).
    Published: as a part of reviewkd alone, whose weights are 0.6 to 8 beside ce 1.
    Taps: every stage output.
    """

    def adapter(self, student: Tensor, teacher: Tensor) -> nn.Module:
        return linear_adapter(student, teacher)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return pyramid_distance(student, teacher)


def pyramid_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The weighted mean over levels of the squared distance of each sample (N,), of features of equal shape."""
    gap = as_map(student - teacher)  # pooling is linear: the gap of the pooled maps is the pooled gap
    if student.ndim == 3:
        gap = gap.transpose(2, 3)
    total = gap.square().flatten(1).mean(1)
    weight = weights = 1.0
    for side in _LEVELS:
        if side < gap.shape[2]:
            weight /= 2
            weights += weight
            total = total + weight * F.adaptive_avg_pool2d(gap, (side, side)).square().flatten(1).mean(1)
    return total / weights
