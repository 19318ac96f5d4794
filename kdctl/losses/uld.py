"""Universal logit distillation: probabilities compared by rank, whatever classes they are of."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from kdctl.config.types import Scheduled
from kdctl.losses.base import Loss
from kdctl.signals import Batch, Signals


class ULD(Loss):
    """Distance of sorted probabilities: how sure the teacher is, and between how many, not of which class.

    Formula: sum over ranks i of |p_s(i) - p_t(i)| of each row, p = softmax(z / T) in falling order, the shorter one
        with zeros behind; between 0 and 2. The closed form of the Wasserstein distance where moving probability between
        any two classes costs the same, so that vocabularies need not agree. Rows are samples, pixels, or tokens that
        are not padding, as many in both models.
    Paper: Boizard et al., Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs,
        TMLR 2025 (arXiv 2402.12030).
    Published: beside the cross entropy of the teacher's texts (the paper).

    temperature: T, softens both distributions; a map {epoch: T} changes it, linearly in between.

    A stage refuses a teacher with another number of outputs than its student. Blind to which class is meant:
    beside a supervised term, never alone. Where classes agree, kd says more.
    """

    links: ClassVar[tuple[str, ...]] = ("softmax",)
    ALIASES: ClassVar[dict[str, str]] = {"T": "temperature"}

    def __init__(self, *, temperature: Scheduled = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        temperature = self.now(self.temperature)
        ranked = [
            F.softmax(z / temperature, dim=1).sort(1, descending=True)[0] for z in self.logit_pair(student, teacher)
        ]
        longest = max(p.shape[1] for p in ranked)
        p_s, p_t = (F.pad(p, (0, longest - p.shape[1])) for p in ranked)
        return (p_s - p_t).abs().sum(1)
