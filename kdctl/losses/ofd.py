"""Overhaul of feature distillation: the teacher's positive responses, and negative ones down to a margin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from kdctl.errors import ConfigError
from kdctl.losses.ab import PreActivationLoss, connector
from kdctl.losses.adapters import align
from kdctl.losses.base import DryRun

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class OFD(PreActivationLoss):
    """Partial squared distance before the ReLU: what the teacher passes on is copied, what it blocks need only be low.

    Formula: of each unit (s - max(t, m_c))^2 where t > 0 or s > max(t, m_c), else 0; summed over C, H, W of each
        sample, times 1 / 2^(L - l - 1) for pair l = 0 .. L - 1 of the L pairs in the order of taps, summed over pairs.
        s is the student's feature through a learnt 1x1 convolution and batch normalisation, t the teacher's before its
        ReLU, m_c the mean of the channel's negative responses: E[x | x < 0] for x normal with the bias and the weight
        of the batch normalisation before the tap as mean and standard deviation (-3 standard deviations where fewer
        than 0.1 % are negative); measured on the first samples where there is no such layer.
    Paper: Heo et al., A Comprehensive Overhaul of Feature Distillation, ICCV 2019.
    Published: CIFAR-100: weight 1e-3 beside ce 1; ImageNet, ResNet-50 to MobileNet: 1e-4 (mdistiller).
    Taps: every stage before its last ReLU, shallow to deep (layer1.2.add, layer2.2.add, ...).

    connector: `conv` learns the map of the student's feature (a linear layer for vectors and tokens; where sizes differ
        the convolution is one with stride, or transposed); `none` compares features as they are and needs equal shapes.
    """

    def __init__(self, *, connector: Literal["conv", "none"] = "conv") -> None:
        super().__init__()
        self.connector = connector

    def adapter(self, student: Tensor, teacher: Tensor) -> nn.Module:
        if self.connector == "conv":
            return connector(student, teacher)
        if student.shape[1:] != teacher.shape[1:]:
            raise ConfigError("the shapes differ", hint="use connector: conv, or tap places of equal shape")
        return nn.Identity()

    def setup(self, dry_run: DryRun) -> None:
        super().setup(dry_run)
        given = dry_run.batch.extra.get("margin")
        pairs = self.feature_pairs(dry_run.student, dry_run.teacher)
        for layer, ((_, tap), pair) in enumerate(zip(self.taps, pairs, strict=True)):
            teacher = align(*pair)[1]
            if given is None:
                margin = teacher_margin(tap, teacher, dry_run.teacher_nets)
            else:
                margin = given.flatten().to(teacher)
            # Persistent: the samples it may have been measured on are not those that a resumed run begins with.
            self.register_buffer(f"margin_{layer}", margin)

    def layer_distance(self, layer: int, student: Tensor, teacher: Tensor) -> Tensor:
        margin = self.get_buffer(f"margin_{layer}").to(teacher.dtype)
        if teacher.ndim == 4:
            margin = margin[:, None, None]
        target = torch.maximum(teacher, margin)
        counts = (teacher > 0) | (student > target)
        return ((student - target).square() * counts).flatten(1).sum(1)


def teacher_margin(tap: str, teacher: Tensor, nets: Sequence[nn.Module]) -> Tensor:
    """The mean negative response of each channel (C,)."""
    channels = teacher.shape[-1] if teacher.ndim == 3 else teacher.shape[1]
    norm = norm_before(nets[0], tap, channels) if nets else None
    if norm is None:
        return _measured(teacher)
    return expected_negative(norm.bias.detach(), norm.weight.detach()).to(teacher)


def norm_before(net: nn.Module, tap: str, channels: int) -> nn.BatchNorm1d | nn.BatchNorm2d | None:
    """The batch normalisation that a tap's value comes from, None where the modules do not show it.

    It is the tapped module itself, or the last one of so many channels among its siblings: before it in the order of
    definition, unless the tap is a later call of a module that is used several times (`relu:in#2`).
    """
    place, _, call = tap.partition("#")
    path, _, of_input = place.partition(":")
    parent, _, name = path.rpartition(".")
    modules = dict(net.named_modules(remove_duplicate=False))
    if path not in modules or (of_input and isinstance(modules[path], _NORMS)):
        return None
    found: nn.BatchNorm1d | nn.BatchNorm2d | None = None
    for sibling, module in modules[parent].named_children():
        if isinstance(module, _NORMS) and module.num_features == channels and module.affine:
            found = module
        if sibling == name and call in ("", "1"):
            break
    return found


def expected_negative(mean: Tensor, deviation: Tensor) -> Tensor:
    """E[x | x < 0] of normal x, by channel; -3 deviations where x < 0 is rarer than 0.1 %."""
    mean, deviation = mean.double(), deviation.double().abs().clamp_min(1e-12)
    ratio = mean / deviation
    below = torch.special.ndtr(-ratio)
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    return torch.where(below > 1e-3, mean - deviation * density / below.clamp_min(1e-3), -3 * deviation)


def _measured(teacher: Tensor) -> Tensor:
    """The mean of the negative responses of each channel, 0 where there are none."""
    by_channel = teacher.movedim(-1 if teacher.ndim == 3 else 1, 0).flatten(1)
    return by_channel.clamp_max(0).sum(1) / (by_channel < 0).sum(1).clamp_min(1)
