"""Softmax regression representation learning: the teacher's classifier judges the student's embedding."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from kdctl.config.types import NonNegative
from kdctl.errors import ConfigError
from kdctl.losses.adapters import FeatureLoss, to_vectors
from kdctl.losses.base import DryRun
from kdctl.losses.relations import BatchNorm, full_precision, linear_head


class SRRL(FeatureLoss):
    """The teacher's classifier on the student's embedding: it finds there what it finds in the teacher's.

    Formula: feature_weight * mean over D of (g(e_s) - e_t)^2 + logit_weight * mean over C of (W g(e_s) - W e_t)^2 of
        each sample, where W is the teacher's classifier, with its bias, and g is a linear layer, batch normalisation
        and, where e_t is never negative, ReLU.
    Paper: Yang, Martinez, Bulat & Tzimiropoulos, Knowledge Distillation via Softmax Regression Representation Learning,
        ICLR 2021.
    Published: weight 1 with 1 and 1 inside (SimKD's code); 1 and 5 inside (cls_KD).
    Taps: the embedding before the classifier, or the last map (it is averaged over its positions).

    head: where the teacher's classifier, a linear layer, stands in its net.
    feature_weight: of the distance of embeddings.
    logit_weight: of the distance of the classifier's answers.
    """

    ALIASES: ClassVar[dict[str, str]] = {"alpha": "feature_weight", "beta": "logit_weight"}
    head_weight: Tensor
    head_bias: Tensor | None

    def __init__(self, *, head: str = "fc", feature_weight: NonNegative = 1.0, logit_weight: NonNegative = 1.0) -> None:
        super().__init__()
        self.head = head
        self.feature_weight = feature_weight
        self.logit_weight = logit_weight

    def setup(self, dry_run: DryRun) -> None:
        head = linear_head(dry_run.teacher_nets[0], self.head)
        self.register_buffer("head_weight", head.weight.detach().clone(), persistent=False)
        bias = None if head.bias is None else head.bias.detach().clone()
        self.register_buffer("head_bias", bias, persistent=False)
        super().setup(dry_run)

    def adapter(self, student: Tensor, teacher: Tensor) -> nn.Module:
        channels, known = to_vectors(teacher).shape[1], self.head_weight.shape[1]
        if channels != known:
            message = f"the teacher's '{self.head}' takes {known} channels, the tapped feature has {channels}"
            raise ConfigError(message, hint="tap what goes into the teacher's classifier")
        return _Regressor(to_vectors(student).shape[1], channels, bool((teacher >= 0).all()))

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        with full_precision(student):
            difference_BD = student - to_vectors(teacher)
            answers_BC = F.linear(difference_BD, self.head_weight)
        features, answers = difference_BD.square().mean(1), answers_BC.square().mean(1)
        return self.feature_weight * features + self.logit_weight * answers


class _Regressor(nn.Module):
    """A linear layer on averaged positions, batch normalisation, and ReLU where asked for."""

    def __init__(self, channels: int, out: int, relu: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, out, bias=False)
        self.norm = BatchNorm(out)
        self.relu = nn.ReLU() if relu else nn.Identity()

    def forward(self, feature: Tensor) -> Tensor:
        return self.relu(self.norm(self.linear(to_vectors(feature))))
