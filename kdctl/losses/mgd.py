"""Masked generative distillation: the teacher's feature is generated from what is left of the student's."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kdctl.config.types import Fraction
from kdctl.errors import ConfigError
from kdctl.losses.adapters import FeatureLoss, linear_adapter


class MGD(FeatureLoss):
    """Squared distance to the teacher's map of one generated from the masked student's.

    Formula: sum over C, H, W of (G(m * a(f_s)) - f_t)^2 of each sample, summed over pairs of taps, where a takes the
        student's map to the teacher's shape (identity where equal), m is a random mask of zeros and ones, drawn anew
        for each batch, and G is two 3x3 convolutions with a ReLU between. In eval mode nothing is masked.
    Paper: Yang et al., Masked Generative Distillation, ECCV 2022.
    Published: ImageNet: weight 7e-5 beside ce 1, mask_ratio 0.15 of channels (cls_KD).
    Taps: the last stage output.

    mask_ratio: the share that is masked.
    mask: what is masked as one: `channels` (classification) or `positions` (detection, segmentation).
    """

    ALIASES: ClassVar[dict[str, str]] = {"lambda_mgd": "mask_ratio"}

    def __init__(self, *, mask_ratio: Fraction = 0.15, mask: Literal["channels", "positions"] = "channels") -> None:
        super().__init__()
        self.mask_ratio = mask_ratio
        self.mask = mask

    def adapter(self, student: Tensor, teacher: Tensor) -> nn.Module:
        if student.ndim != 4:
            raise ConfigError("only maps are masked", hint="tap maps in both models")
        mask = _Mask(self.mask_ratio, (2, 3) if self.mask == "channels" else (1,))
        channels = teacher.shape[1]
        first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        return nn.Sequential(linear_adapter(student, teacher), mask, first, nn.ReLU(), second)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).square().flatten(1).sum(1)


class _Mask(nn.Module):
    """Zeros at random while it trains, the same along `shared` dimensions; nothing is scaled up."""

    def __init__(self, ratio: float, shared: tuple[int, ...]) -> None:
        super().__init__()
        self.ratio = ratio
        self.shared = shared

    def forward(self, feature: Tensor) -> Tensor:
        if not self.training:
            return feature
        shape = [1 if d in self.shared else size for d, size in enumerate(feature.shape)]
        return feature * (torch.rand(shape, device=feature.device) >= self.ratio)
