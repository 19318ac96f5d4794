"""Features of unlike shapes made comparable: layouts, adapters, and the base of the losses that use them.

Layouts: maps (B, C, H, W), tokens (B, L, D), vectors (B, D).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdctl.errors import ConfigError, Problem
from kdctl.losses.base import DryRun, Loss
from kdctl.signals import Batch, Signals


class TappedLoss(Loss):
    """A term that looks at tapped features alone, and whose units are samples."""

    needs_taps: ClassVar[bool | None] = True
    needs_logits: ClassVar[bool] = False
    links: ClassVar[tuple[str, ...]] = ("softmax", "sigmoid", "identity", "embedding")

    def count(self, batch: Batch) -> int | Tensor:
        return batch.size


class FeatureLoss(TappedLoss):
    """A term that compares tapped features pair by pair and sums over pairs and samples.

    A subclass says which adapter a pair needs, and the distance of a pair sample by sample (a scalar, the sum, where it
    is defined on the batch as a whole); one that compares its pairs jointly overrides `values` instead. Gradients reach
    the student and the adapters, never the teacher.
    """

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleList()

    def setup(self, dry_run: DryRun) -> None:
        self.adapters = nn.ModuleList()
        pairs = self.feature_pairs(dry_run.student, dry_run.teacher)
        for (student_tap, teacher_tap), (student, teacher) in zip(self.taps, pairs, strict=True):
            try:
                self.adapters.append(self.adapter(*align(student, teacher)).to(student.device))
            except ConfigError as error:
                where = f"taps {student_tap} {tuple(student.shape)} and {teacher_tap} {tuple(teacher.shape)}"
                problems = (Problem(f"{where}: {p.message}", key="taps", hint=p.hint) for p in error.problems)
                raise ConfigError(*problems) from None

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        distances = []
        for adapter, pair in zip(self.adapters, self.feature_pairs(student, teacher), strict=True):
            mine, target = align(*pair)
            distances.append(self.distance(adapter(mine).to(target.dtype), target))
        return torch.stack(distances).sum(0)

    def adapter(self, student: Tensor, teacher: Tensor) -> nn.Module:
        """What takes a student's feature to the teacher's shape. Raises ConfigError where nothing can."""
        raise NotImplementedError

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The distance of an adapted pair for each sample: (N,)."""
        raise NotImplementedError


def align(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Brings a pair of features to one layout, leaving it alone where it has one.

    Tokens beside a map are laid out as a grid; a map or tokens beside a vector are averaged over their positions.
    Raises ConfigError for other shapes.
    """
    for feature in (student, teacher):
        if not 2 <= feature.ndim <= 4:
            message = f"a feature must be a map (B, C, H, W), tokens (B, L, D) or vectors (B, D), not {feature.ndim}-D"
            raise ConfigError(message, hint="tap another place")
    if student.ndim == teacher.ndim:
        return student, teacher
    if 2 in (student.ndim, teacher.ndim):
        return to_vectors(student), to_vectors(teacher)
    if student.ndim == 3:
        return to_map(student, teacher.shape[2], teacher.shape[3]), teacher
    return student, to_map(teacher, student.shape[2], student.shape[3])


def to_vectors(feature: Tensor) -> Tensor:
    """Averages a map or tokens over positions: (B, D)."""
    if feature.ndim == 4:
        return feature.mean((2, 3))
    return feature.mean(1) if feature.ndim == 3 else feature


def to_map(tokens_BLD: Tensor, height: int, width: int) -> Tensor:
    """Lays tokens out as a map (B, D, h, w) of the aspect of height x width, row by row.

    One token too many is a class token, the first, and left out. Raises ConfigError where they fill no such grid.
    """
    num_tokens = tokens_BLD.shape[1]
    for extra in (0, 1):
        h = round(math.sqrt((num_tokens - extra) * height / width))
        w = round(math.sqrt((num_tokens - extra) * width / height))
        if h and h * w == num_tokens - extra:
            return tokens_BLD[:, extra:].transpose(1, 2).unflatten(2, (h, w))
    message = f"{num_tokens} tokens fill no grid of the aspect {height} x {width}"
    raise ConfigError(message, hint="tap a place of like layout in both models")


def token_mask(batch: Batch, tokens_BLD: Tensor) -> Tensor:
    """(B, L) of the tokens' dtype: 1 for tokens that count, 0 for padding; all count where the batch says nothing."""
    mask = batch.extra.get("attention_mask", batch.keep)
    if mask is None:
        return tokens_BLD.new_ones(tokens_BLD.shape[:2])
    return mask.to(tokens_BLD)


def linear_adapter(student: Tensor, teacher: Tensor, *, bias: bool = True) -> nn.Module:
    """A linear map from the student's feature to the teacher's shape, from a pair of one layout; identity if equal.

    Vectors and tokens: a linear layer on D. Maps: a 1x1 convolution where the sizes are equal, a 3x3 one with stride k
    where the student's is k times as large, a transposed one with stride k where it is k times as small. For other
    ratios, and for tokens of another number, the result is resampled linearly.
    """
    if student.shape[1:] == teacher.shape[1:]:
        return nn.Identity()
    if student.ndim == 2:
        return nn.Linear(student.shape[1], teacher.shape[1], bias=bias)
    if student.ndim == 3:
        project = nn.Linear(student.shape[2], teacher.shape[2], bias=bias)
        if student.shape[1] == teacher.shape[1]:
            return project
        return nn.Sequential(project, Resample(teacher.shape[1]))
    return map_adapter(student, teacher, bias=bias)


def map_adapter(student: Tensor, teacher: Tensor, *, bias: bool = True) -> nn.Module:
    """The convolution of `linear_adapter` for maps, also where the shapes are equal."""
    channels_in, channels_out = student.shape[1], teacher.shape[1]
    size_in, size_out = student.shape[2:], teacher.shape[2:]
    if size_in == size_out:
        return nn.Conv2d(channels_in, channels_out, 1, bias=bias)
    if (down := _ratio(size_in, size_out)) is not None:
        return nn.Conv2d(channels_in, channels_out, 3, down, 1, bias=bias)
    if (up := _ratio(size_out, size_in)) is not None:
        kernel = (2 * up[0] - up[0] % 2, 2 * up[1] - up[1] % 2)
        return nn.ConvTranspose2d(channels_in, channels_out, kernel, up, (up[0] // 2, up[1] // 2), bias=bias)
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, bias=bias), Resample(*size_out))


def _ratio(large: Sequence[int], small: Sequence[int]) -> tuple[int, int] | None:
    """How many times `small` fits into `large` along each axis, None where not a whole number of times."""
    if large[0] % small[0] or large[1] % small[1]:
        return None
    return large[0] // small[0], large[1] // small[1]


class Resample(nn.Module):
    """Linear resampling of maps to a height and width, or of tokens to a number."""

    def __init__(self, *size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, feature: Tensor) -> Tensor:
        if feature.dtype in (torch.bfloat16, torch.float16):  # autocast; torch has no such kernel on every device
            feature = feature.float()
        if feature.ndim == 3:
            return F.interpolate(feature.transpose(1, 2), self.size, mode="linear").transpose(1, 2)
        return F.interpolate(feature, self.size, mode="bilinear", antialias=True)
