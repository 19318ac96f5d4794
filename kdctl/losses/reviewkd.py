"""Knowledge review: deep features of the student help its shallower ones to predict the teacher's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from kdctl.config.types import NonNegative, PositiveInt
from kdctl.losses.adapters import FeatureLoss, align
from kdctl.losses.attention_transfer import as_map
from kdctl.losses.base import DryRun
from kdctl.losses.hierarchical_context import pyramid_distance
from kdctl.signals import Batch, Signals


class ReviewKD(FeatureLoss):
    """Hierarchical distance of fused features: each stage of the student, with all deeper ones, predicts the teacher's.

    Formula: sum over pairs of taps of hierarchical_context(g_l, f_t,l) of each sample. From deep to shallow: x_l is a
        1x1 convolution of f_s,l; a_l is x_l for the deepest, else z_1 x_l + z_2 up(a_{l+1}), where up is
        nearest-neighbour resampling and z two learnt maps in [0, 1] (a 1x1 convolution of both, sigmoid); a_l is
        resampled to the teacher's size, and g_l is a 3x3 convolution of it. Convolutions of x and g are followed by
        batch normalisation.
    Paper: Chen et al., Distilling Knowledge via Knowledge Review, CVPR 2021.
    Published: CIFAR-100: weight 0.6 (resnet56 to 20), 1 (110 to 32), 5, or 8 (to ShuffleNetV2) beside ce 1, with
        warmup_epochs 20; ImageNet: 1 (ResNet-34 to 18) or 8 (ResNet-50 to MobileNet).
    Taps: every stage and the pooled embedding, shallow to deep; the teacher's stages before their last ReLU.

    mid_channels: channels of the fused features, at most those of the student's deepest tap.
    warmup_epochs: the term rises from 0 to its weight in so many epochs, linearly.
    """

    def __init__(self, *, mid_channels: PositiveInt = 512, warmup_epochs: NonNegative = 0.0) -> None:
        super().__init__()
        self.mid_channels = mid_channels
        self.warmup_epochs = warmup_epochs

    def setup(self, dry_run: DryRun) -> None:
        super().setup(dry_run)  # refuses layouts that cannot be compared
        maps = self._maps(dry_run.student, dry_run.teacher)
        width, deepest = min(self.mid_channels, maps[-1][0].shape[1]), len(maps) - 1
        fusions = [_Fusion(*pair, width, fuses=layer < deepest) for layer, pair in enumerate(maps)]
        self.adapters = nn.ModuleList(fusions).to(maps[0][0].device)

    def adapter(self, student: Tensor, teacher: Tensor) -> nn.Module:
        return nn.Identity()

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        distances: list[Tensor] = []
        deeper: Tensor | None = None
        pairs = list(zip(self.adapters, self._maps(student, teacher), strict=True))
        for fusion, (mine, target) in reversed(pairs):
            predicted, deeper = fusion(mine, deeper)
            distances.append(pyramid_distance(predicted.to(target.dtype), target))
        risen = min(self.epoch / self.warmup_epochs, 1.0) if self.warmup_epochs else 1.0
        return risen * torch.stack(distances).sum(0)

    def _maps(self, student: Signals, teacher: Signals | None) -> list[tuple[Tensor, Tensor]]:
        aligned = [align(*pair) for pair in self.feature_pairs(student, teacher)]
        return [(as_map(mine), as_map(target)) for mine, target in aligned]


class _Fusion(nn.Module):
    """One stage: the student's map and what its deeper stages made, fused to predict the teacher's map."""

    def __init__(self, student: Tensor, teacher: Tensor, width: int, *, fuses: bool) -> None:
        super().__init__()
        self.size = teacher.shape[2:]
        self.project = _convolution(student.shape[1], width, 1, student.shape[2:])
        self.attention = nn.Conv2d(2 * width, 2, 1) if fuses else None
        self.predict = _convolution(width, teacher.shape[1], 3, self.size)

    def forward(self, feature: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """The prediction, and the fused map that shallower stages take up."""
        fused = self.project(feature)
        if self.attention is not None:
            assert deeper is not None
            deeper = F.interpolate(deeper, fused.shape[2:], mode="nearest")
            share = self.attention(torch.cat([fused, deeper], 1)).sigmoid()
            fused = share[:, :1] * fused + share[:, 1:] * deeper
        if fused.shape[2:] != self.size:
            fused = F.interpolate(fused, self.size, mode="nearest")
        return self.predict(fused), fused


def _convolution(channels_in: int, channels_out: int, side: int, size: Size) -> nn.Module:
    conv = nn.Conv2d(channels_in, channels_out, side, padding=side // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if size.numel() == 1:  # a single position gives a batch of one no statistics
        return conv
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out))
