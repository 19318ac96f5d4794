"""Singular vectors of features: how the main directions of a layer lie to those of the next.

B samples, P rows and C columns of a feature as a matrix, n singular vectors.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdctl.config.types import PositiveInt
from kdctl.errors import ConfigError
from kdctl.losses.attention_transfer import as_map, same_size
from kdctl.losses.fsp import ConsecutiveLoss
from kdctl.signals import Batch, Signals

_EXTRA = 3
"""How many more singular vectors of the student are offered to match the teacher's with."""


class KDSVD(ConsecutiveLoss):
    """Distance of relations between singular vectors of consecutive layers, the student's aligned with the teacher's.

    Formula: sum over entries of (R_s - R_t)^2 of each sample, summed over consecutive layers, where R[a, b, i] =
        exp(-(v_i[a] - w_i[b])^2 / 8) for the i-th right singular vector v of a layer's feature and w of the layer's
        before. Of the student's first k + 3 vectors the one most like the teacher's i-th (largest |cosine|) takes its
        place, with its sign; both are scaled by the teacher's singular values, these to length 1. The teacher's signs
        are those the linear algebra library gives; another library may give another value. Where singular values
        coincide the vectors are not determined, and no gradient flows along them.
    Paper: Lee, Kim & Song, Self-supervised Knowledge Distillation Using Singular Value Decomposition, ECCV 2018.
    Published: CIFAR-100: weight 1 beside ce 1, every stage, k 1 (RepDistiller).
    Taps: two stage outputs or more, shallow to deep, after their ReLU.

    k: how many singular vectors of the teacher.
    variant: `repdistiller` takes a feature as a matrix of H W x C, as the paper does (a student's of another number of
        channels goes through a learnt 1x1 convolution); `mdistiller` as one of C H x W (of two maps of different size
        the larger is averaged down to the smaller), which gives losses a hundred times smaller.
    """

    def __init__(self, *, k: PositiveInt = 1, variant: Literal["repdistiller", "mdistiller"] = "repdistiller") -> None:
        super().__init__()
        self.k = k
        self.variant = variant

    def adapter(self, student: Tensor, teacher: Tensor) -> nn.Module:
        by_channels = super().adapter(student, teacher)
        sized = (student, teacher) if self.variant == "repdistiller" else same_size(student, teacher)
        ranks = [min(self._matrix(as_map(feature)).shape[1:]) for feature in sized]
        if min(ranks) < self.k:
            message = f"the features have {min(ranks)} singular vectors, fewer than k = {self.k}"
            raise ConfigError(message, hint=f"use k: {min(ranks)}, or tap larger maps")
        return by_channels if self.variant == "repdistiller" else nn.Identity()

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        relations: list[tuple[Tensor, Tensor]] = []
        before: tuple[Tensor, Tensor] | None = None
        pairs = self.maps(student, teacher)
        if not all(bool(mine.isfinite().all()) for mine, _ in pairs):  # the library raises where there are no vectors
            return pairs[0][0].flatten(1).sum(1) * torch.nan
        for mine, target in pairs:
            vectors = self._vectors(mine, target)
            if before is not None:
                relations.append((_relation(vectors[0], before[0]), _relation(vectors[1], before[1])))
            before = vectors
        return torch.stack([(mine - target).square().flatten(1).sum(1) for mine, target in relations]).sum(0)

    def _matrix(self, feature_BCHW: Tensor) -> Tensor:
        if self.variant == "repdistiller":
            return feature_BCHW.flatten(2).transpose(1, 2)
        return feature_BCHW.flatten(1, 2)

    def _vectors(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The aligned and scaled singular vectors of both (B, C, k)."""
        if self.variant == "mdistiller":
            student, teacher = same_size(student, teacher)
        with torch.autocast(student.device.type, enabled=False):
            mine_BCn = right_singular_vectors(self._matrix(student), self.k + _EXTRA)
            _, values, target_h = torch.linalg.svd(self._matrix(teacher), full_matrices=False)
            target_BCk = target_h[:, : self.k].transpose(1, 2)
            cosine = torch.bmm(mine_BCn.detach().transpose(1, 2), target_BCk)
        best = cosine.abs().argmax(1, keepdim=True)
        aligned = mine_BCn.gather(2, best.expand(-1, mine_BCn.shape[1], -1)) * cosine.gather(1, best).sign()
        scale = F.normalize(values[:, : self.k], dim=1).unsqueeze(1)
        return aligned * scale, target_BCk * scale


def _relation(vectors_BCk: Tensor, before_BDk: Tensor) -> Tensor:
    return torch.exp(-(vectors_BCk.unsqueeze(2) - before_BDk.unsqueeze(1)).square() / 8)


def right_singular_vectors(matrix_BPC: Tensor, count: int) -> Tensor:
    """The first right singular vectors (B, C, n) of each matrix, with gradients that are always finite.

    torch's own gradient divides by the gaps between all singular values, and two channels that are dead make all of it
    nan. This is the same first-order perturbation of the vectors asked for, with gaps that vanish left out:
        dv_i = sum over j != i of v_j (v_j' dA v_i) / (l_i - l_j), where A = X'X has the eigenvalues l.
    """
    with torch.no_grad():
        _, values, transposed = torch.linalg.svd(matrix_BPC, full_matrices=False)
        eigenvalues = values.square()
        floor = eigenvalues[:, :1, None] * torch.finfo(values.dtype).eps
        basis_BCr, vectors_BCn = transposed.transpose(1, 2), transposed[:, :count].transpose(1, 2)
        own_B1n = eigenvalues[:, None, :count]
        inverse_gaps_Brn = _inverse(own_B1n - eigenvalues[:, :, None], floor)
    moved_BCn = torch.bmm(matrix_BPC.transpose(1, 2), torch.bmm(matrix_BPC, vectors_BCn))
    change_BCn = moved_BCn - moved_BCn.detach()  # zero: dA v_i, of which there is only the derivative
    within_Brn = torch.bmm(basis_BCr.transpose(1, 2), change_BCn)
    outside_BCn = change_BCn - torch.bmm(basis_BCr, within_Brn)  # along what the matrix takes to zero
    turned_BCn = torch.bmm(basis_BCr, inverse_gaps_Brn * within_Brn) + _inverse(own_B1n, floor) * outside_BCn
    return vectors_BCn + turned_BCn


def _inverse(gaps: Tensor, floor: Tensor) -> Tensor:
    """1 / gaps, 0 where they vanish."""
    vanish = gaps.abs() <= floor
    return torch.where(vanish, 0.0, 1 / gaps.masked_fill(vanish, 1.0))
