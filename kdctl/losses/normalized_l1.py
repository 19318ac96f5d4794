"""Normalised L1: features scaled to length one, compared by the sum of absolute differences."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kdctl.losses.adapters import FeatureLoss, linear_adapter


class NormalizedL1(FeatureLoss):
    """L1 distance of features scaled to length one.

    Formula: || f_s / ||f_s||_2 - f_t / ||f_t||_2 ||_1 of each sample, features flattened, summed over pairs of taps.
    Paper: the distance of Kim, Park & Kwak, Paraphrasing Complex Network: Network Compression via Factor Transfer,
        NeurIPS 2018, eq. 4, on the features themselves.
    Published: none of its own.
    Taps: any pair.

    Blind to the length of features, so it needs no scale between the models. Where the shapes differ, a learnt linear
    adapter takes the student's feature to the teacher's.
    """

    def adapter(self, student: Tensor, teacher: Tensor) -> nn.Module:
        return linear_adapter(student, teacher)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        difference = F.normalize(student.flatten(1), dim=1) - F.normalize(teacher.flatten(1), dim=1)
        return difference.abs().sum(1)
