"""Total variation distance: how much probability lies elsewhere."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from kdctl.losses.base import Loss
from kdctl.signals import Batch, Signals


class TVDistance(Loss):
    """Total variation distance of probabilities: how much of the probability lies on other classes.

    Formula: 1/2 sum over classes of |p_s - p_t| of each row, p = softmax(z); between 0 and 1. Rows are samples, pixels,
        or tokens that are not padding.
    Paper: Wen et al., f-Divergence Minimization for Sequence-Level Knowledge Distillation, ACL 2023.
    Published: weight 1 alone (DistiLLM's baseline).
    """

    links: ClassVar[tuple[str, ...]] = ("softmax",)

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        p_s, p_t = (F.softmax(z, dim=1) for z in self.logit_pair(student, teacher))
        return (p_s - p_t).abs().sum(1) / 2
