"""Class attention transfer: where in the picture each class is seen."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from kdctl.config.types import PositiveInt
from kdctl.errors import ConfigError
from kdctl.losses.adapters import FeatureLoss
from kdctl.losses.base import DryRun
from kdctl.losses.relations import full_precision, linear_head


class CATKD(FeatureLoss):
    """Class activation maps: the student finds each class where the teacher finds it.

    Formula: mean over C, h, w of (N(P(M_s)) - N(P(M_t)))^2 of each sample, where M is the class activation map
        (C, H, W), the classifier's weights without bias applied at each position of the last map, P averages it down to
        resolution x resolution and N scales each class's map to length 1. The student's classifier learns from it too.
    Paper: Guo, Yan, Li & Jin, Class Attention Transfer Based Knowledge Distillation, CVPR 2023.
    Published: CIFAR-100: weight 400 by default, by pair, beside ce 1 and without kd; resolution 2 (the authors' code).
    Taps: the last map of a convolutional net, which its classifier takes the average of.

    resolution: height and width of the compared maps.
    head: where the student's classifier, a linear layer, stands in its net.
    teacher_head: where the teacher's stands; null is the same place.
    """

    reads_classifier: ClassVar[bool] = True
    head_weight: Tensor

    def __init__(self, *, resolution: PositiveInt = 2, head: str = "fc", teacher_head: str | None = None) -> None:
        super().__init__()
        self.resolution = resolution
        self.head = head
        self.teacher_head = teacher_head
        self._student_head: tuple[nn.Linear, ...] = ()  # in a tuple it is no module of this term

    def setup(self, dry_run: DryRun) -> None:
        assert dry_run.student_net is not None
        self.bind(dry_run.student_net)
        head = linear_head(dry_run.teacher_nets[0], self.teacher_head or self.head)
        self.register_buffer("head_weight", head.weight.detach().clone(), persistent=False)
        super().setup(dry_run)

    def bind(self, student_net: nn.Module) -> None:
        self._student_head = (linear_head(student_net, self.head),)

    def adapter(self, student: Tensor, teacher: Tensor) -> nn.Module:
        if student.ndim != 4:
            raise ConfigError("class activation maps are made of maps", hint="tap the last map of convolutional nets")
        weights = {"student": self._student_head[0].weight, "teacher": self.head_weight}
        for (side, weight), feature in zip(weights.items(), (student, teacher), strict=True):
            if weight.shape[1] != feature.shape[1]:
                message = f"the {side}'s classifier takes {weight.shape[1]} channels, its map has {feature.shape[1]}"
                raise ConfigError(message, hint="tap the map whose average goes into the classifier")
        if len(weights["student"]) != len(weights["teacher"]):
            raise ConfigError("the classifiers have different numbers of classes", hint="use a teacher of this task")
        return nn.Identity()

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        with full_precision(student):
            difference = self._maps(student, self._student_head[0].weight) - self._maps(teacher, self.head_weight)
            return difference.square().flatten(1).mean(1)

    def _maps(self, feature_BDHW: Tensor, weight_CD: Tensor) -> Tensor:
        # Averaging and the classifier are both linear: in this order there are fewer positions to classify.
        pooled = F.adaptive_avg_pool2d(feature_BDHW, self.resolution)
        maps_BCL = weight_CD.to(pooled.dtype) @ pooled.flatten(2)
        return F.normalize(maps_BCL, dim=2)
