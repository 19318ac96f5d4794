"""Probabilistic knowledge transfer: how probable each sample is to be another's neighbour."""

from __future__ import annotations

import torch
from torch import Tensor

from kdctl.config.types import Positive
from kdctl.losses.relations import RelationLoss


class PKT(RelationLoss):
    """Divergence of the probabilities of being neighbours: samples near for the teacher are near for the student.

    Formula: mean_ij t_ij log((t_ij + eps) / (s_ij + eps)) of the batch, where t and s are (1 + cos(e_i, e_j)) / 2 of
        the teacher's and the student's vectors, divided by the sum over j.
    Paper: Passalis & Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018.
    Published: CIFAR-100: weight 30000 beside ce 1 (RepDistiller).
    Taps: the embedding before the classifier; maps and tokens are averaged over their positions.

    eps: added to the lengths of vectors and to the probabilities.
    """

    def __init__(self, *, eps: Positive = 1e-7) -> None:
        super().__init__()
        self.eps = eps

    def relation(self, pair: int, student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
        s_BB, t_BB = self._neighbours(student_BD), self._neighbours(teacher_BD)
        return (t_BB * torch.log((t_BB + self.eps) / (s_BB + self.eps))).mean()

    def _neighbours(self, vectors_BD: Tensor) -> Tensor:
        directions = vectors_BD / (vectors_BD.norm(dim=1, keepdim=True) + self.eps)
        similarity_BB = (directions @ directions.T + 1) / 2
        return similarity_BB / similarity_BB.sum(1, keepdim=True)
