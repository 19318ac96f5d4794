"""Relational distillation: distances and angles between the samples of a batch."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdctl.config.types import NonNegative, Positive
from kdctl.losses.relations import RelationLoss


class RKD(RelationLoss):
    """Distances and angles between samples: the student's samples lie to each other as the teacher's do.

    Formula: distance_weight * mean_ij h(d_s,ij - d_t,ij) + angle_weight * mean_ijk h(a_s,ijk - a_t,ijk) of the batch,
        where d_ij is the distance of samples i and j divided by the mean distance of the batch (d_ii = 0), a_ijk is the
        cosine of the angle at i between j and k (0 where two of them coincide), and h is the smooth L1 (Huber) loss.
    Paper: Park et al., Relational Knowledge Distillation, CVPR 2019.
    Published: weights 25 and 50 inside, weight 1 beside ce 1 (RepDistiller, mdistiller, mmrazor); torchdistill 1 and 2.
    Taps: the embedding before the classifier; maps and tokens are averaged over their positions.

    distance_weight: of the distances.
    angle_weight: of the angles; their cost is the cube of the batch size.
    eps: samples of a smaller squared distance coincide: their distance is 0 and pulls nothing.
    variant: `repdistiller` takes the vectors as they are, like the paper; `mmrazor` scales each to length 1 first.
    """

    ALIASES: ClassVar[dict[str, str]] = {"w_d": "distance_weight", "w_a": "angle_weight"}

    def __init__(
        self,
        *,
        distance_weight: NonNegative = 25.0,
        angle_weight: NonNegative = 50.0,
        eps: Positive = 1e-12,
        variant: Literal["repdistiller", "mmrazor"] = "repdistiller",
    ) -> None:
        super().__init__()
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight
        self.eps = eps
        self.variant = variant

    def relation(self, pair: int, student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
        if self.variant == "mmrazor":
            student_BD, teacher_BD = F.normalize(student_BD, dim=1), F.normalize(teacher_BD, dim=1)
        mine, target = self._distances(student_BD), self._distances(teacher_BD)
        value = self.distance_weight * F.smooth_l1_loss(self._relative(mine), self._relative(target))
        if self.angle_weight:
            value = value + self.angle_weight * F.smooth_l1_loss(_angles(mine), _angles(target))
        return value

    def _distances(self, vectors_BD: Tensor) -> Tensor:
        """The distance of each two samples (B, B), 0 where they coincide up to rounding."""
        precise = vectors_BD if vectors_BD.device.type == "mps" else vectors_BD.double()
        centred = precise - precise.mean(0)
        gram_BB = centred @ centred.T
        squares = gram_BB.diagonal()[:, None] + gram_BB.diagonal()
        squared = squares - 2 * gram_BB
        apart = squared > (16 * torch.finfo(precise.dtype).eps * squares).clamp_min(self.eps)
        apart = apart.fill_diagonal_(False)
        distances = torch.where(apart, squared.where(apart, 1.0).sqrt(), 0.0)
        return distances.to(vectors_BD.dtype)

    def _relative(self, distances_BB: Tensor) -> Tensor:
        """Divided by the mean over all pairs of two samples; all 0 for a batch of one."""
        pairs = max(distances_BB.numel() - len(distances_BB), 1)
        return distances_BB / (distances_BB.sum() / pairs).clamp_min(self.eps**0.5)


def _angles(distances_BB: Tensor) -> Tensor:
    """The cosine of the angle at i between j and k (B, B, B), by the law of cosines: needs no B x B x D tensor."""
    apart = distances_BB > 0
    inverse = torch.where(apart, 1 / distances_BB.where(apart, 1.0), 0.0)
    squared = distances_BB.square()
    products = (squared[:, :, None] + squared[:, None, :] - squared[None, :, :]) / 2
    return products * inverse[:, :, None] * inverse[:, None, :]
