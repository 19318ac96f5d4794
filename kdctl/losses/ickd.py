"""Inter-channel correlation: which channels are active together."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kdctl.errors import ConfigError
from kdctl.losses.adapters import FeatureLoss
from kdctl.losses.relations import full_precision


class ICKD(FeatureLoss):
    """Correlation between channels: the student's channels are as diverse as the teacher's.

    Formula: sum_cd (G_s - G_t)_cd^2 / C of each sample, summed over pairs of taps, where G is f f^T (C x C) of the
        feature f (C, H W), with each row scaled to length 1. Heights and widths may differ.
    Paper: Liu et al., Exploring Inter-Channel Correlation for Diversity-Preserved Knowledge Distillation, ICCV 2021.
    Published: torchdistill divides by the batch size once more: its ImageNet weight of 500 is 500 / batch_size here.
    Taps: the last stage output. Where the student has other channels, a learnt 1x1 convolution (for tokens a linear
        layer) takes them to the teacher's number.
    """

    def adapter(self, student: Tensor, teacher: Tensor) -> nn.Module:
        if student.ndim == 2:
            raise ConfigError("the channels of a vector have no correlation", hint="tap maps or tokens in both models")
        dim = 1 if student.ndim == 4 else 2
        channels = student.shape[dim], teacher.shape[dim]
        if channels[0] == channels[1]:
            return nn.Identity()
        return nn.Conv2d(*channels, 1, bias=False) if student.ndim == 4 else nn.Linear(*channels, bias=False)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        with full_precision(student):
            difference_BCC = _correlations(student) - _correlations(teacher)
            return difference_BCC.square().sum(2).mean(1)


def _correlations(feature: Tensor) -> Tensor:
    channels_BCL = feature.flatten(2) if feature.ndim == 4 else feature.transpose(1, 2)
    return F.normalize(channels_BCL @ channels_BCL.transpose(1, 2), dim=2)
