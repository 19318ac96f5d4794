"""The flow between two layers of hidden states."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from kdctl.errors import ConfigError, Problem
from kdctl.losses.adapters import align
from kdctl.losses.base import DryRun
from kdctl.losses.relations import full_precision
from kdctl.losses.tokens import TokenLoss, lengths, to_tokens
from kdctl.signals import Batch, Signals


class TextFSP(TokenLoss):
    """Squared distance of the flow from each layer to the next: how their dimensions go together over the tokens.

    Formula: mean over D_1 x D_2 of (S_1^T S_2 / L - T_1^T T_2 / L)^2 of each sample, S_1 and S_2 (L, D) the states at
        two taps, padding left out of them and of L; summed over consecutive pairs of taps.
    Paper: Yang et al., TextBrewer, ACL 2020 demonstrations; after Yim et al., A Gift from Knowledge Distillation, CVPR
        2017, eq. 1.
    Published: none (TextBrewer offers it without a recipe).
    Taps: two or more outputs of layers, with as many tokens at each. Maps are one token a position (maps of several
        sizes: kind fsp).

    Where widths differ, a learnt linear layer for each tap takes the student's states to the teacher's.
    """

    def setup(self, dry_run: DryRun) -> None:
        if len(self.taps) < 2:
            raise ConfigError(Problem("text_fsp compares the flow between taps", key="taps", hint="give two or more"))
        super().setup(dry_run)
        pairs = self.feature_pairs(dry_run.student, dry_run.teacher)
        numbers = [to_tokens(align(*pair)[1]).shape[1] for pair in pairs]
        if len(set(numbers)) > 1:
            message = f"the taps have different numbers of tokens: {', '.join(map(str, numbers))}"
            raise ConfigError(Problem(message, key="taps", hint="tap places of one size; kind: fsp pools maps"))

    def count(self, batch: Batch) -> int | Tensor:
        return batch.size

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        taps = self.token_pairs(student, teacher, batch)
        num_tokens = lengths(batch).clamp_min(1)[:, None, None] if self.masked else taps[0][0].shape[1]
        values = []
        with full_precision(student.logits):
            for (s1, t1), (s2, t2) in pairwise(taps):
                flow = torch.bmm(s1.transpose(1, 2), s2) - torch.bmm(t1.transpose(1, 2), t2)
                values.append((flow / num_tokens).square().mean((1, 2)))
        return torch.stack(values).sum(0)
