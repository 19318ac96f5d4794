"""The task's own loss on labelled samples."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from kdctl.config.types import Fraction
from kdctl.losses.base import DryRun, Loss
from kdctl.signals import Batch, Signals
from kdctl.tasks.base import Task


class Supervised(Loss):
    """The task's own loss on labelled samples: cross entropy for classification.

    Formula: -log softmax(z_s)_y of each labelled sample.
    Paper: none; label smoothing: Szegedy et al., Rethinking the Inception Architecture, CVPR 2016, section 7.
    Published: beside kd: weight 0.1 (CIFAR-100, RepDistiller), 0.5 (ImageNet, mdistiller).

    label_smoothing: share a of the target spread evenly over all classes, (1 - a) onehot + a / C.
    """

    needs_teacher: ClassVar[bool] = False
    needs_targets: ClassVar[bool] = True

    task: Task

    def __init__(self, *, label_smoothing: Fraction = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def setup(self, dry_run: DryRun) -> None:
        self.task = dry_run.task

    def count(self, batch: Batch) -> int | Tensor:
        return self.task.num_labelled(batch)

    def forward(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        parts = self.task.supervised(student, batch, label_smoothing=self.label_smoothing)
        total, *others = (value for value, _ in parts.values())
        for value in others:
            total = total + value
        return total
