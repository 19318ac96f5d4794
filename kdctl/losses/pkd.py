"""Patient distillation: the direction of the first token's state, layer by layer."""

from __future__ import annotations

from torch import Tensor, nn

from kdctl.losses.adapters import FeatureLoss, linear_adapter
from kdctl.losses.tokens import unit
from kdctl.signals import Signals


class PKD(FeatureLoss):
    """Squared distance of the normalised states of the first token: patient knowledge distillation.

    Formula: || h_s / ||h_s|| - h_t / ||h_t|| ||^2 of each sample, h the state of the first token, summed over pairs of
        taps.
    Paper: Sun et al., Patient Knowledge Distillation for BERT Model Compression, EMNLP 2019.
    Published: weight 10 to 1000 beside kd at T 5 to 20 (the paper's search); every k-th layer of the teacher
        (PKD-skip).
    Taps: the outputs of layers but the last. Tokens (B, L, D), of which the first is taken, or vectors (B, D) as they
        are; maps are averaged over positions.

    Where widths differ, a learnt linear layer for each pair takes the student's states to the teacher's.
    """

    def feature_pairs(self, student: Signals, teacher: Signals | None) -> list[tuple[Tensor, Tensor]]:
        return [(_first(s), _first(t)) for s, t in super().feature_pairs(student, teacher)]

    def adapter(self, student: Tensor, teacher: Tensor) -> nn.Module:
        return linear_adapter(student, teacher)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (unit(student) - unit(teacher)).square().sum(1)


def _first(feature: Tensor) -> Tensor:
    """The state of the first token (B, D); of a map the mean over positions."""
    if feature.ndim == 4:
        return feature.mean((2, 3))
    return feature[:, 0] if feature.ndim == 3 else feature
