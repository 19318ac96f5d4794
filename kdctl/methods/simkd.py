"""SimKD: the student's features are made to fit the teacher's classifier, which it then uses as its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdctl.config.types import PositiveInt, Tap
from kdctl.errors import ConfigError, Problem
from kdctl.methods.base import Parts
from kdctl.methods.cut import parts_of
from kdctl.methods.distill import Distill
from kdctl.models.record import Model, build_model
from kdctl.registry import is_file_kind
from kdctl.signals import Batch, Signals
from kdctl.taps import Taps
from kdctl.tasks.base import Task
from kdctl.teachers.base import Teacher


class SimKD(Distill):
    """The student's end is replaced by a projector and the teacher's classifier, frozen; the projected feature learns.

    Formula: mean over C, H, W of (p(f_s) - f_t)^2, where p is a 1x1, a 3x3 and a 1x1 convolution, each with batch
        normalisation and ReLU. The larger of two maps is average-pooled to the size of the smaller. Write it as
        losses: [{kind: fitnet, regressor: none, taps: [{student: projector, teacher: layer3}]}]
        with the teacher's tap of `teacher_tap`. There is neither ce nor kd in it; other terms may be added.
    Paper: Chen, Mei, Zhang, Wang, Feng & Chen, Knowledge Distillation with the Reused Teacher Classifier, CVPR 2022.
    Published: CIFAR-100 and ImageNet: factor 2, the last feature map before pooling, weight 1.

    The student that is shipped has projector and classifier in it: the kind reused_head, which costs more than the
    student's own end.

    student_tap: the last of the student's top-level modules that stays; the net must be sequential.
    teacher_tap: the teacher's feature map whose average its classifier takes.
    head: the teacher's classifier, a linear layer.
    factor: the projector works on the teacher's channels / factor.
    """

    def __init__(
        self, *, student_tap: Tap = "layer3", teacher_tap: Tap = "layer3", head: Tap = "fc", factor: PositiveInt = 2
    ) -> None:
        self.student_tap = student_tap
        self.teacher_tap = teacher_tap
        self.head = head
        self.factor = factor

    def prepare(self, student: Model, teachers: Sequence[Model], fresh: Callable[[int], Model]) -> Model:
        if len(teachers) != 1:
            message = f"simkd reuses the classifier of one teacher, and there are {len(teachers)}"
            raise ConfigError(Problem(message, key="teacher", hint="name one: teacher: {kind: ..., weights: ...}"))
        (teacher,), record = teachers, student.record
        parts_of(student, self.student_tap, "method.student_tap")
        if is_file_kind(record.kind):
            message = "a net from a file of yours cannot be shipped as a part of another"
            hint = "install its module and name it package.module:Class"
            raise ConfigError(Problem(message, key="student.kind", hint=hint))
        own = _map_shape(student, self.student_tap, "method.student_tap")
        theirs = _map_shape(teacher, self.teacher_tap, "method.teacher_tap")
        head = self._head_of(teacher, theirs[0], record.num_classes)
        size = [min(pair) for pair in zip(own[1:], theirs[1:], strict=True)]
        self._pooled = None if size == theirs[1:] else size
        arguments = {
            "base": {"kind": record.kind, **record.arguments},
            "cut": self.student_tap,
            "width": own[0],
            "channels": theirs[0],
            "factor": self.factor,
            "resize": None if size == own[1:] else size,
            "bias": head.bias is not None,
        }
        made = build_model(replace(record, kind="reused_head", arguments=arguments), student.base)
        for name, module in student.net.named_children():
            setattr(made.net, name, module)
            if name == self.student_tap:
                break
        made.net.add_module("fc", copy.deepcopy(head).requires_grad_(False))
        return made

    def _head_of(self, teacher: Model, channels: int, num_classes: int) -> nn.Linear:
        """The teacher's classifier. Raises ConfigError where it cannot be put on the projected feature."""
        try:
            head = teacher.net.get_submodule(self.head)
        except AttributeError:
            names = [name for name, module in teacher.net.named_modules() if isinstance(module, nn.Linear)]
            hint = f"its linear layers are {', '.join(names[-5:])}" if names else "it has no linear layer"
            raise ConfigError(
                Problem(f"the teacher has no module '{self.head}'", key="method.head", hint=hint)
            ) from None
        if not isinstance(head, nn.Linear):
            message = f"the teacher's '{self.head}' is no linear layer but {type(head).__name__}"
            raise ConfigError(Problem(message, key="method.head", hint="head names the classifier, often fc"))
        if head.in_features != channels:
            message = f"the classifier takes {head.in_features} channels, '{self.teacher_tap}' has {channels}"
            hint = "teacher_tap is the feature map whose average goes into the classifier"
            raise ConfigError(Problem(message, key="method.teacher_tap", hint=hint))
        if head.out_features != num_classes or teacher.record.class_order is not None:
            message = "the teacher's classifier is for other classes than the student's, or in another order"
            raise ConfigError(Problem(message, key="teacher", hint="a teacher that was trained on these classes"))
        return head

    def rehearse(self, teacher: Teacher | None, task: Task, taps: Sequence[str]) -> Teacher | None:
        return self._resized(teacher)

    def assemble(self, parts: Parts) -> None:
        super().assemble(replace(parts, teacher=self._resized(parts.teacher)))

    def _resized(self, teacher: Teacher | None) -> Teacher | None:
        """The teacher, with its feature map at the student's size where that is smaller."""
        if teacher is None or self._pooled is None:
            return teacher
        return _Resized(teacher, self.teacher_tap, self._pooled)


@dataclass
class _Resized(Teacher):
    """A teacher whose feature at one tap is average-pooled to a size."""

    inner: Teacher
    tap: str
    size: list[int]

    def __post_init__(self) -> None:
        self.models, self.taps = self.inner.models, self.inner.taps

    def __call__(self, batch: Batch, taps: Collection[str] | None = None, logits: bool = True) -> Signals:
        said = self.inner(batch, taps, logits)
        if self.tap not in said.features:
            return said
        pooled = F.adaptive_avg_pool2d(said.features[self.tap], (self.size[0], self.size[1]))
        return replace(said, features={**said.features, self.tap: pooled})

    def flush(self) -> None:
        self.inner.flush()


@torch.no_grad()
def _map_shape(model: Model, tap: str, key: str) -> list[int]:
    """(C, H, W) of a feature map for images of the record's shape; the model stays as it is."""
    trial = copy.deepcopy(model).eval()
    with Taps(trial.net, [tap]) as taps, taps.recording() as features:
        trial(torch.zeros(1, *model.record.image_shape))
    found: Tensor = features[tap]
    if found.ndim != 4:
        message = f"'{tap}' gives {tuple(found.shape[1:])}, and a map (C, H, W) is needed"
        raise ConfigError(Problem(message, key=key, hint="the last stage output before pooling"))
    return list(found.shape[1:])
