"""Similarity preserving: pairs of samples that are alike for the teacher are alike for the student."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kdctl.losses.relations import RelationLoss


class SimilarityPreserving(RelationLoss):
    """Similarities of the samples of a batch: what activates the teacher alike activates the student alike.

    Formula: sum_ij (G_s - G_t)_ij^2 / B^2 of the batch, summed over pairs of taps, where G is F F^T (B x B) of the
        flattened features F (B, C H W), with each row scaled to length 1.
    Paper: Tung & Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019.
    Published: CIFAR-100: weight 3000 beside ce 1, the last stage (RepDistiller).
    Taps: the last stage output, after its ReLU; shapes may differ. Nothing is averaged.
    """

    def vectors(self, feature: Tensor) -> Tensor:
        return feature.flatten(1)

    def relation(self, pair: int, student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
        difference_BB = _similarities(student_BD) - _similarities(teacher_BD)
        return difference_BB.square().mean()


def _similarities(vectors_BD: Tensor) -> Tensor:
    return F.normalize(vectors_BD @ vectors_BD.T, dim=1)
