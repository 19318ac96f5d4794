"""Maximum mean discrepancy: the features of the batch are distributed alike in both models."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdctl.config.types import Positive, PositiveInt
from kdctl.losses.adapters import FeatureLoss, linear_adapter


class MMD(FeatureLoss):
    """Maximum mean discrepancy of features over the batch, several Gaussian kernels: alike as sets, not one by one.

    Formula: mean_ij k(s_i, s_j) + mean_ij k(t_i, t_j) - 2 mean_ij k(s_i, t_j) over all samples i, j of the batch,
        summed over pairs of taps; k(x, y) is the mean over b of exp(-||x - y||^2 / (b m)), b = factor^(n -
        floor(kernels / 2)) for n = 0 .. kernels - 1, and m the typical squared distance of two of the teacher's samples
        (1 where all are one point). s and t are flattened features; a student's of another shape goes through a learnt
        linear map.
    Paper: Gretton et al., A Kernel Two-Sample Test, JMLR 2012, eq. 5; kernels as in Long et al., Learning Transferable
        Features with Deep Adaptation Networks, ICML 2015.
    Published: none for the compression of classifiers; 5 kernels with factor 2 in domain adaptation.
    Taps: one stage output, or the embedding.

    kernels: how many bandwidths are mixed.
    factor: the ratio of a bandwidth to the next smaller one.
    heuristic: m is the `median` or the `mean`.
    normalize: first scales each sample's feature to length 1, so that the sizes of the features do not matter.
    """

    batchwise: ClassVar[bool] = True

    def __init__(
        self,
        *,
        kernels: PositiveInt = 5,
        factor: Positive = 2.0,
        heuristic: Literal["median", "mean"] = "median",
        normalize: bool = True,
    ) -> None:
        super().__init__()
        self.heuristic = heuristic
        self.normalize = normalize
        self.scales = [factor ** (n - kernels // 2) for n in range(kernels)]

    def adapter(self, student: Tensor, teacher: Tensor) -> nn.Module:
        return linear_adapter(student, teacher)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        size = student.shape[0]
        points = torch.cat([student.flatten(1), teacher.flatten(1)])
        if self.normalize:
            points = F.normalize(points, dim=1)
        with torch.autocast(student.device.type, enabled=False):
            squares = points.square().sum(1)
            distances = (squares[:, None] + squares[None, :] - 2 * points @ points.T).clamp_min(0)
        typical = self._typical(distances[size:, size:].detach())
        kernel = torch.stack([torch.exp(-distances / (scale * typical)) for scale in self.scales]).mean(0)
        discrepancy = kernel[:size, :size].mean() + kernel[size:, size:].mean() - 2 * kernel[:size, size:].mean()
        return size * discrepancy  # of the batch as a whole, which the loop divides by its size

    def _typical(self, distances: Tensor) -> Tensor:
        """The bandwidth, from the teacher alone: a student cannot change the measure it is measured by."""
        size = distances.shape[0]
        if size == 1:
            return distances.new_ones(())
        others = distances[~torch.eye(size, dtype=torch.bool, device=distances.device)]
        value = others.median() if self.heuristic == "median" else others.mean()
        floor = torch.finfo(value.dtype).eps
        return torch.where(value > floor, value, torch.ones_like(value))
