"""Flow of solution: how the features of a layer and those of a later one go together."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdctl.errors import ConfigError, Problem
from kdctl.losses.adapters import FeatureLoss, align
from kdctl.losses.attention_transfer import as_map
from kdctl.losses.base import DryRun
from kdctl.signals import Batch, Signals


class ConsecutiveLoss(FeatureLoss):
    """A term that compares how each tapped map goes together with the next one, in the order of its taps.

    A student's map of another number of channels goes through a learnt 1x1 convolution.
    """

    def setup(self, dry_run: DryRun) -> None:
        if len(self.taps) < 2:
            message = "the term compares each layer with the next one and has one pair of taps"
            raise ConfigError(Problem(message, key="taps", hint="add taps: [layer1, layer2, ...]"))
        super().setup(dry_run)

    def adapter(self, student: Tensor, teacher: Tensor) -> nn.Module:
        if student.ndim == 2:
            raise ConfigError("the term compares maps, not vectors", hint="tap maps or tokens in both models")
        channels_s, channels_t = as_map(student).shape[1], as_map(teacher).shape[1]
        return nn.Identity() if channels_s == channels_t else nn.Conv2d(channels_s, channels_t, 1, bias=False)

    def maps(self, student: Signals, teacher: Signals | None) -> list[tuple[Tensor, Tensor]]:
        """The adapted pairs as maps, layer by layer."""
        found = []
        for adapter, pair in zip(self.adapters, self.feature_pairs(student, teacher), strict=True):
            mine, target = (as_map(f) for f in align(*pair))
            found.append((adapter(mine).to(target.dtype), target))
        return found


class FSP(ConsecutiveLoss):
    """Distance of Gram matrices between consecutive layers: the student's features flow on as the teacher's do.

    Formula: with G = F1' F2 / (H W) of each sample, C1 x C2, for each tapped layer F1 and the next F2, the larger map
        pooled to the size of the smaller: `repdistiller` is the mean over C1 x C2 of (G_s - G_t)^2, summed over
        consecutive layers, pooling by averages; `torchdistill` is the sum over the columns of G_s - G_t of their
        lengths, pooling by maxima. A student's map of another number of channels goes through a learnt 1x1 convolution.
    Paper: Yim et al., A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer
        Learning, CVPR 2017, eq. 2.
    Published: CIFAR-100: weight 50 with no other term for 30 epochs, then ce alone, as a stage of its own
        (RepDistiller).
    Taps: two layers or more, shallow to deep.

    variant: `repdistiller` or `torchdistill`, as above.
    """

    def __init__(self, *, variant: Literal["repdistiller", "torchdistill"] = "repdistiller") -> None:
        super().__init__()
        self.variant = variant

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        maps = self.maps(student, teacher)
        distances = []
        for (mine, target), (next_mine, next_target) in pairwise(maps):
            gap = self._flow(mine, next_mine) - self._flow(target, next_target)
            if self.variant == "torchdistill":
                distances.append(gap.norm(dim=1).sum(1))
            else:
                distances.append(gap.square().mean((1, 2)))
        return torch.stack(distances).sum(0)

    def _flow(self, bottom: Tensor, top: Tensor) -> Tensor:
        size = (min(bottom.shape[2], top.shape[2]), min(bottom.shape[3], top.shape[3]))
        pool = F.adaptive_max_pool2d if self.variant == "torchdistill" else F.adaptive_avg_pool2d
        bottom, top = (f if f.shape[2:] == size else pool(f, size) for f in (bottom, top))
        with torch.autocast(bottom.device.type, enabled=False):
            return torch.bmm(bottom.flatten(2), top.flatten(2).transpose(1, 2)) / (size[0] * size[1])
