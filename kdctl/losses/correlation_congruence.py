"""Correlation congruence: how samples of a batch correlate, besides what each of them is."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdctl.config.types import Positive, PositiveInt
from kdctl.errors import ConfigError
from kdctl.losses.adapters import to_vectors
from kdctl.losses.base import DryRun
from kdctl.losses.relations import RelationLoss


class CorrelationCongruence(RelationLoss):
    """Correlation between samples of a batch, of embeddings of equal length.

    Formula: `repdistiller`: the mean over i < B of sum_d delta_i,d delta_i+1,d, where delta = |e_s - e_t| of sample i
        and of its neighbour in the batch; 0 for a batch of one. `kdz`: mean_ij (k(e_s,i, e_s,j) - k(e_t,i, e_t,j))^2,
        where k is the Gaussian kernel of vectors of length 1 as a Taylor series,
        exp(-2 gamma) sum_p=0..order (2 gamma cos)^p / p!.
    Paper: Peng et al., Correlation Congruence for Knowledge Distillation, ICCV 2019.
    Published: CIFAR-100: weight 0.02 beside ce 1, embeddings of 128 (RepDistiller, from the authors' code).
    Taps: the embedding before the classifier; maps and tokens are averaged over their positions.

    embed_dim: the length that a linear layer on each side, the teacher's too, takes the vectors to; both layers train.
        null compares the vectors as they are.
    variant: `repdistiller` or `kdz`, see the formula; `kdz` is the paper's.
    gamma: of the Gaussian kernel (`kdz`).
    order: the last power of the Taylor series (`kdz`).
    """

    def __init__(
        self,
        *,
        embed_dim: PositiveInt | None = 128,
        variant: Literal["repdistiller", "kdz"] = "repdistiller",
        gamma: Positive = 0.4,
        order: PositiveInt = 2,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.variant = variant
        self.gamma = gamma
        self.order = order
        self.embed_s = nn.ModuleList()
        self.embed_t = nn.ModuleList()

    def setup(self, dry_run: DryRun) -> None:
        super().setup(dry_run)
        self.embed_s, self.embed_t = nn.ModuleList(), nn.ModuleList()
        for pair in self.feature_pairs(dry_run.student, dry_run.teacher):
            lengths = [to_vectors(feature).shape[1] for feature in pair]
            if self.embed_dim is None and self.variant == "repdistiller" and lengths[0] != lengths[1]:
                message = f"the student's vectors have {lengths[0]} numbers, the teacher's {lengths[1]}"
                raise ConfigError(message, hint="set embed_dim")
            for side, length in zip((self.embed_s, self.embed_t), lengths, strict=True):
                embed = nn.Identity() if self.embed_dim is None else nn.Linear(length, self.embed_dim)
                side.append(embed.to(pair[0].device))

    def relation(self, pair: int, student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
        student_BD, teacher_BD = self.embed_s[pair](student_BD), self.embed_t[pair](teacher_BD)
        if self.variant == "kdz":
            return (self._kernel(student_BD) - self._kernel(teacher_BD)).square().mean()
        delta_BD = (student_BD - teacher_BD).abs()
        return (delta_BD[:-1] * delta_BD[1:]).sum() / max(len(delta_BD) - 1, 1)

    def _kernel(self, vectors_BD: Tensor) -> Tensor:
        directions = F.normalize(vectors_BD, dim=1)
        similarity_BB = directions @ directions.T
        powers = [(2 * self.gamma * similarity_BB) ** p / math.factorial(p) for p in range(self.order + 1)]
        return math.exp(-2 * self.gamma) * torch.stack(powers).sum(0)
