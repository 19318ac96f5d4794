"""Variational information distillation: the student's feature predicts the teacher's, with a learnt variance."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdctl.config.types import Positive
from kdctl.errors import ConfigError, Problem
from kdctl.losses.adapters import FeatureLoss, align
from kdctl.losses.attention_transfer import as_map, same_size
from kdctl.signals import Batch, Signals


class VID(FeatureLoss):
    """Variational bound on the mutual information of features: the likelihood of the teacher's under a Gaussian.

    Formula: mean over C, H, W of ((mu(f_s) - f_t)^2 / v_c + log v_c) / 2 of each sample, summed over pairs of taps. mu
        is learnt: three 1x1 convolutions with ReLU between; v_c = softplus(a_c) + eps is learnt for each channel of the
        teacher. Of two maps of different size the larger is averaged down to the smaller. May be negative.
    Paper: Ahn et al., Variational Information Distillation for Knowledge Transfer, CVPR 2019.
    Published: CIFAR-100: weight 1 beside ce 1, every stage, initial variance 5 (RepDistiller).
    Taps: every stage output, after its ReLU.

    init_pred_var: v_c at the beginning.
    eps: the smallest variance.
    """

    def __init__(self, *, init_pred_var: Positive = 5.0, eps: Positive = 1e-5) -> None:
        super().__init__()
        if init_pred_var <= eps:
            message = f"the variance begins at {init_pred_var:g}, which is not above eps {eps:g}"
            raise ConfigError(Problem(message, key="init_pred_var", hint="init_pred_var: 5.0"))
        self.init_pred_var = init_pred_var
        self.eps = eps

    def adapter(self, student: Tensor, teacher: Tensor) -> nn.Module:
        return _Gaussian(as_map(student).shape[1], as_map(teacher).shape[1], self.init_pred_var, self.eps)

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        distances = []
        for adapter, pair in zip(self.adapters, self.feature_pairs(student, teacher), strict=True):
            assert isinstance(adapter, _Gaussian)
            mine, target = same_size(*align(*pair))
            squares = (adapter(mine).to(target.dtype) - target).square()
            variance = adapter.variance()
            distances.append((squares / variance + variance.log()).flatten(1).mean(1) / 2)
        return torch.stack(distances).sum(0)


class _Gaussian(nn.Module):
    """The mean of the teacher's feature given the student's, and the variance of each of its channels."""

    def __init__(self, channels_in: int, channels_out: int, variance: float, eps: float) -> None:
        super().__init__()
        self.regressor = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 1, bias=False),
        )
        above = variance - eps
        inverse = above + math.log(-math.expm1(-above))  # of softplus
        self.log_scale = nn.Parameter(torch.full((channels_out,), inverse))
        self.eps = eps

    def forward(self, feature: Tensor) -> Tensor:
        mean: Tensor = self.regressor(feature)
        return mean

    def variance(self) -> Tensor:
        """(1, C, 1, 1)."""
        return (F.softplus(self.log_scale) + self.eps)[None, :, None, None]
