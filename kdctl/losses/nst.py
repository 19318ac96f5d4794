"""Neuron selectivity transfer: the channels of both models are active in like patterns of places.

C channels of the student, D of the teacher, P positions.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdctl.config.types import PositiveInt
from kdctl.errors import ConfigError
from kdctl.losses.adapters import FeatureLoss
from kdctl.losses.attention_transfer import same_size


class NST(FeatureLoss):
    """Maximum mean discrepancy of channels: student and teacher select the same places, whatever their channel numbers.

    Formula: mean_ij k(s_i, s_j) + mean_ij k(t_i, t_j) - 2 mean_ij k(s_i, t_j) of each sample, summed over pairs of
        taps, where s_i and t_j are the channels, flattened over H x W and scaled to length 1. Of two maps of different
        size the larger is averaged down to the smaller. Channel numbers may differ. Tokens (B, L, D) are maps of 1 x L.
    Paper: Huang & Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017.
    Published: CIFAR-100: weight 50 beside ce 1, every stage, poly of degree 2 (RepDistiller).
    Taps: every stage output, after its ReLU.

    kernel: `poly` is (x . y)^degree; `gaussian` is exp(-||x - y||^2 / (2 v)), v the mean of ||s_i - t_j||^2 over all
        channels of the sample, held constant.
    degree: of the poly kernel; 1 compares the mean channels alone. Unused by gaussian.
    """

    def __init__(self, *, kernel: Literal["poly", "gaussian"] = "poly", degree: PositiveInt = 2) -> None:
        super().__init__()
        self.kernel = kernel
        self.degree = degree

    def adapter(self, student: Tensor, teacher: Tensor) -> nn.Module:
        if student.ndim == 2:
            raise ConfigError("vectors have no places to select", hint="tap maps or tokens in both models")
        return nn.Identity()

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        s_BCP, t_BDP = (F.normalize(f.flatten(2), dim=2) for f in same_size(student, teacher))
        with torch.autocast(student.device.type, enabled=False):
            if self.kernel == "gaussian":
                return _gaussian(s_BCP, t_BDP)
            if self.degree == 2 and s_BCP.shape[2] < min(s_BCP.shape[1], t_BDP.shape[1]):
                return _quadratic(s_BCP, t_BDP)
            same = _mean_power(s_BCP, s_BCP, self.degree) + _mean_power(t_BDP, t_BDP, self.degree)
            return same - 2 * _mean_power(s_BCP, t_BDP, self.degree)


def _mean_power(x_BCP: Tensor, y_BDP: Tensor, degree: int) -> Tensor:
    return torch.bmm(x_BCP, y_BDP.transpose(1, 2)).pow(degree).mean((1, 2))


def _quadratic(s_BCP: Tensor, t_BDP: Tensor) -> Tensor:
    """The discrepancy of degree 2 from P x P matrices: sum_ij (x_i . y_j)^2 is the inner product of X'X and Y'Y."""
    gram_s, gram_t = (torch.bmm(f.transpose(1, 2), f) / f.shape[1] for f in (s_BCP, t_BDP))
    return (gram_s - gram_t).square().sum((1, 2))


def _gaussian(s_BCP: Tensor, t_BDP: Tensor) -> Tensor:
    crossed = _squared_distances(s_BCP, t_BDP)
    variance = crossed.detach().mean((1, 2), keepdim=True).clamp_min(torch.finfo(crossed.dtype).tiny)
    same = (_squared_distances(f, f) for f in (s_BCP, t_BDP))
    means = [torch.exp(-d / (2 * variance)).mean((1, 2)) for d in (*same, crossed)]
    return means[0] + means[1] - 2 * means[2]


def _squared_distances(x_BCP: Tensor, y_BDP: Tensor) -> Tensor:
    squares = x_BCP.square().sum(2)[:, :, None] + y_BDP.square().sum(2)[:, None, :]
    return squares - 2 * torch.bmm(x_BCP, y_BDP.transpose(1, 2))
