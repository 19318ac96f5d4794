"""FitNets: the student's feature, through a regressor, predicts the teacher's."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from kdctl.errors import ConfigError
from kdctl.losses.adapters import FeatureLoss, linear_adapter, map_adapter


class FitNet(FeatureLoss):
    """Squared distance of features through a regressor: hints.

    Formula: mean over C, H, W of (r(f_s) - f_t)^2 of each sample, summed over pairs of taps.
    Paper: Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015, eq. 3.
    Published: CIFAR-100: weight 100 beside ce 1, the second of three stages (RepDistiller). The paper trains on the
        hint first and on logits then: a stage of its own (configs/methods/fitnet_then_kd.yaml).
    Taps: one stage output, after its ReLU.

    regressor: `conv` learns r: a convolution to the teacher's shape (1x1, 3x3 with stride, or transposed, by the ratio
        of the sizes; a linear layer for vectors and tokens), then batch normalisation for maps, then ReLU where the
        teacher's feature is never negative. `none` compares the features as they are and needs equal shapes.
    """

    def __init__(self, *, regressor: Literal["conv", "none"] = "conv") -> None:
        super().__init__()
        self.regressor = regressor

    def adapter(self, student: Tensor, teacher: Tensor) -> nn.Module:
        if self.regressor == "none":
            if student.shape[1:] != teacher.shape[1:]:
                raise ConfigError("the shapes differ", hint="use regressor: conv, or tap places of equal shape")
            return nn.Identity()
        layers: list[nn.Module] = []
        if student.ndim == 4:
            layers.append(map_adapter(student, teacher, bias=False))
            if teacher.shape[2:].numel() > 1:  # a single position gives a batch of one no statistics
                layers.append(nn.BatchNorm2d(teacher.shape[1]))
        elif student.shape[1:] == teacher.shape[1:]:
            layers.append(nn.Linear(student.shape[-1], teacher.shape[-1]))
        else:
            layers.append(linear_adapter(student, teacher))
        if bool((teacher >= 0).all()):
            layers.append(nn.ReLU())
        return nn.Sequential(*layers)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).square().flatten(1).mean(1)
