"""Activation boundaries: the student's hidden units are on and off where the teacher's are."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from kdctl.config.types import Positive
from kdctl.losses.adapters import FeatureLoss, align, linear_adapter, map_adapter
from kdctl.signals import Batch, Signals


class PreActivationLoss(FeatureLoss):
    """A term on features before their ReLU; of L pairs of taps, shallow to deep, pair l has weight 2^(l - L + 1)."""

    def layer_weight(self, layer: int) -> float:
        return float(2.0 ** (layer - len(self.taps) + 1))

    def layer_distance(self, layer: int, student: Tensor, teacher: Tensor) -> Tensor:
        """The distance of the adapted pair number `layer` for each sample, unweighted: (N,)."""
        raise NotImplementedError

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        distances = []
        pairs = self.feature_pairs(student, teacher)
        for layer, (adapter, pair) in enumerate(zip(self.adapters, pairs, strict=True)):
            mine, target = align(*pair)
            distance = self.layer_distance(layer, adapter(mine).to(target.dtype), target)
            distances.append(self.layer_weight(layer) * distance)
        return torch.stack(distances).sum(0)


class AB(PreActivationLoss):
    """Squared hinge at the boundary of activation: each hidden unit is on or off as the teacher's is, by a margin.

    Formula: of each unit, (s + m)^2 where t <= 0 and s > -m, (s - m)^2 where t > 0 and s <= m, else 0; s and t are
        before the ReLU, m is the margin. `repdistiller`: the sum over C, H, W of each sample, times 3 / 1000 and
        2^(l - L + 1) for pair l = 0 .. L - 1 of the L pairs in the order of taps, summed over pairs. Not 0 at the
        teacher's own feature, whose units may lie within the margin. A student's feature of another shape goes through
        a learnt convolution and batch normalisation.
    Paper: Heo et al., Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons, AAAI 2019.
    Published: CIFAR-100: weight 1 with no other term for 30 epochs, then ce alone, as a stage of its own
        (RepDistiller).
    Taps: every stage before its last ReLU, shallow to deep (layer1.2.add, layer2.2.add, ...).

    margin: m.
    variant: `repdistiller` as above; `kd_zoo` is the mean over C, H, W, and over pairs, of the same hinge.
    """

    def __init__(self, *, margin: Positive = 1.0, variant: Literal["repdistiller", "kd_zoo"] = "repdistiller") -> None:
        super().__init__()
        self.margin = margin
        self.variant = variant

    def adapter(self, student: Tensor, teacher: Tensor) -> nn.Module:
        return nn.Identity() if student.shape[1:] == teacher.shape[1:] else connector(student, teacher)

    def layer_weight(self, layer: int) -> float:
        if self.variant == "kd_zoo":
            return 1 / len(self.taps)
        return super().layer_weight(layer) * 3 / 1000

    def layer_distance(self, layer: int, student: Tensor, teacher: Tensor) -> Tensor:
        # The gap to the boundary, counted towards the teacher's side: t's sign turns both cases into one.
        side = torch.where(teacher > 0, 1.0, -1.0).to(student.dtype)
        hinge = (self.margin - side * student).clamp_min(0).square().flatten(1)
        return hinge.mean(1) if self.variant == "kd_zoo" else hinge.sum(1)


def connector(student: Tensor, teacher: Tensor) -> nn.Module:
    """A learnt map to the teacher's shape without an activation: for maps a convolution and batch normalisation."""
    if student.ndim != 4:
        if student.shape[1:] == teacher.shape[1:]:
            return nn.Linear(student.shape[-1], teacher.shape[-1])
        return linear_adapter(student, teacher)
    layers = [map_adapter(student, teacher, bias=False)]
    if teacher.shape[2:].numel() > 1:  # a single position gives a batch of one no statistics
        layers.append(nn.BatchNorm2d(teacher.shape[1]))
    return nn.Sequential(*layers)
