"""Channel-wise distillation: each channel is active where the teacher's is."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from kdctl.config.types import Scheduled
from kdctl.errors import ConfigError
from kdctl.losses.adapters import FeatureLoss, Resample, linear_adapter
from kdctl.losses.base import DryRun
from kdctl.losses.kd import kl_divergence
from kdctl.signals import Signals


class CWD(FeatureLoss):
    """KL divergence of where each channel is active: a softmax over positions in place of classes.

    Formula: T^2 / C sum over channels of KL(softmax(t_c / T) || softmax(s_c / T)) of each sample, t_c and s_c the
        values of a channel at all positions; summed over pairs of taps.
    Paper: Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021.
    Published: T 4 (the paper); T 1, weight 5 on the logits of segmenters, 10 on each level of a detector's pyramid
        (MMRazor).
    Taps: maps of a segmenter or detector. Without taps the maps of logits (N, C, H, W) are compared; where their sizes
        differ, the student's are resized to the teacher's.

    temperature: T, spreads both distributions over more positions; a map {epoch: T} changes it, linearly in between.

    Where tapped maps differ in shape, a learnt adapter takes the student's to the teacher's: a 1x1 convolution where
    only the channels do. The count is of samples, for logits too.
    """

    needs_taps: ClassVar[bool | None] = None
    needs_logits: ClassVar[bool] = True
    ALIASES: ClassVar[dict[str, str]] = {"T": "temperature", "tau": "temperature"}

    def __init__(self, *, temperature: Scheduled = 4.0) -> None:
        super().__init__()
        self.temperature = temperature

    def setup(self, dry_run: DryRun) -> None:
        if self.taps:
            super().setup(dry_run)
            return
        assert dry_run.teacher is not None
        shapes = tuple(dry_run.student.logits.shape), tuple(dry_run.teacher.logits.shape)
        if any(len(shape) != 4 or shape[2] * shape[3] == 1 for shape in shapes) or dry_run.student.class_dim != 1:
            message = f"cwd compares maps, and the logits {shapes[0]} and {shapes[1]} are none"
            raise ConfigError(message, hint="tap maps in both models: taps: [layer4]")
        if shapes[0][1] != shapes[1][1]:
            message = f"the logits {shapes[0]} and {shapes[1]} are of different classes"
            raise ConfigError(message, hint="tap maps in both models: taps: [layer4]")
        self.adapters = nn.ModuleList([nn.Identity()])

    def feature_pairs(self, student: Signals, teacher: Signals | None) -> list[tuple[Tensor, Tensor]]:
        if self.taps:
            return super().feature_pairs(student, teacher)
        assert teacher is not None
        mine, target = (z if z.dtype == torch.float64 else z.float() for z in (student.logits, teacher.logits.detach()))
        return [(mine if mine.shape == target.shape else Resample(*target.shape[2:])(mine), target)]

    def adapter(self, student: Tensor, teacher: Tensor) -> nn.Module:
        if student.ndim == 2 or teacher[0].numel() == teacher.shape[2 if teacher.ndim == 3 else 1]:
            raise ConfigError("a single position says nothing of where a channel is active", hint="tap maps")
        return linear_adapter(student, teacher)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        rows = [_channels(feature).flatten(0, 1) for feature in (student, teacher)]
        temperature = self.now(self.temperature)
        value_N = kl_divergence(rows[0], rows[1], temperature).unflatten(0, (student.shape[0], -1)).mean(1)
        return temperature**2 * value_N


def _channels(feature: Tensor) -> Tensor:
    """A map or tokens as (B, C, positions)."""
    return feature.transpose(1, 2) if feature.ndim == 3 else feature.flatten(2)
