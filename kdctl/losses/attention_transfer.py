"""Attention transfer: the student is active where the teacher is."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from kdctl.config.types import PositiveInt
from kdctl.errors import ConfigError
from kdctl.losses.adapters import FeatureLoss


class AttentionTransfer(FeatureLoss):
    """Distance of spatial attention maps: the student is active where the teacher is.

    Formula: mean over H x W of (q_s - q_t)^2 of each sample, summed over pairs of taps, where q is the mean over C of
        f^p, flattened over H x W and scaled to length 1. Of two maps of different size the larger feature is first
        averaged down to the smaller (adaptive average pooling). Channel numbers may differ. Tokens (B, L, D) are maps
        of 1 x L.
    Paper: Zagoruyko & Komodakis, Paying More Attention to Attention, ICLR 2017, eq. 2.
    Published: CIFAR-100: weight 1000 beside ce 1, every stage (RepDistiller).
    Taps: every stage output, after its ReLU.

    p: the power.
    variant: `code` is the mean over H x W of (q_s - q_t)^2, what all published implementations compute and their weight
        of 1000 belongs to; `paper` is the length ||q_s - q_t||, with |f| in place of f (eq. 2; weight beta / 2).
    """

    def __init__(self, *, p: PositiveInt = 2, variant: Literal["code", "paper"] = "code") -> None:
        super().__init__()
        self.p = p
        self.variant = variant

    def adapter(self, student: Tensor, teacher: Tensor) -> nn.Module:
        if student.ndim == 2:
            raise ConfigError("vectors have no attention map", hint="tap maps or tokens in both models")
        return nn.Identity()

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = same_size(student, teacher)
        difference = self._attention(student) - self._attention(teacher)
        if self.variant == "paper":
            return difference.norm(dim=1)
        return difference.square().mean(1)

    def _attention(self, feature_BCHW: Tensor) -> Tensor:
        base = feature_BCHW.abs() if self.variant == "paper" else feature_BCHW
        return F.normalize(base.pow(self.p).mean(1).flatten(1), dim=1)


def as_map(feature: Tensor) -> Tensor:
    """As a map (B, C, H, W): tokens are 1 x L, a vector is one position."""
    if feature.ndim == 2:
        return feature[:, :, None, None]
    return feature.transpose(1, 2).unsqueeze(2) if feature.ndim == 3 else feature


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both as maps of the smaller height and the smaller width."""
    maps = [as_map(f) for f in (student, teacher)]
    height, width = (min(maps[0].shape[d], maps[1].shape[d]) for d in (2, 3))
    pooled = [m if m.shape[2:] == (height, width) else F.adaptive_avg_pool2d(m, (height, width)) for m in maps]
    return pooled[0], pooled[1]
