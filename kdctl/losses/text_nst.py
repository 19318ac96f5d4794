"""Similarity of tokens within a sequence, compared without a projection."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from kdctl.errors import ConfigError, Problem
from kdctl.losses.base import DryRun
from kdctl.losses.relations import full_precision
from kdctl.losses.tokens import TokenLoss, lengths, to_tokens
from kdctl.signals import Batch, Signals


class TextNST(TokenLoss):
    """Squared distance of the similarities of tokens between two layers, padding left out; widths may differ.

    Formula: (S_1 S_2^T / D_s - T_1 T_2^T / D_t)^2 at each pair of tokens of a sequence, S_1 and S_2 (L, D) the states
        at two taps, summed over pairs of layers. The count is of pairs of tokens: the sum of squared lengths without
        padding, where the batch has an attention mask; else it is of samples, and their pairs are averaged.
    Paper: Yang et al., TextBrewer, ACL 2020 demonstrations; after Huang & Wang, Like What You Like: Knowledge Distill
        via Neuron Selectivity Transfer, 2017.
    Published: weight 1 on a few layers, each with itself, beside hidden_mse and kd at T 8 (TextBrewer).
    Taps: the outputs of layers. Maps are one token a position, vectors are one token.

    layers: `consecutive` takes each tap with the next one; `same` takes each with itself. A single tap is taken with
        itself.
    """

    def __init__(self, *, layers: Literal["consecutive", "same"] = "consecutive") -> None:
        super().__init__()
        self.layers = layers

    def adapter(self, student: Tensor, teacher: Tensor) -> nn.Module:
        if to_tokens(student).shape[1] != to_tokens(teacher).shape[1]:
            raise ConfigError("the numbers of tokens differ", hint="tap places with as many positions in both models")
        return nn.Identity()

    def setup(self, dry_run: DryRun) -> None:
        super().setup(dry_run)
        assert dry_run.teacher is not None
        for who, seen, side in (("student", dry_run.student, 0), ("teacher", dry_run.teacher, 1)):
            widths = [to_tokens(seen.features[pair[side]]).shape[2] for pair in self.taps]
            if self.layers == "consecutive" and len(set(widths)) > 1:
                message = f"the {who}'s taps are {', '.join(map(str, widths))} wide, and consecutive ones are compared"
                raise ConfigError(Problem(message, key="taps", hint="tap layers of one width, or layers: same"))

    def count(self, batch: Batch) -> int | Tensor:
        return lengths(batch).square().sum() if self.masked else batch.size

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        taps = self.token_pairs(student, teacher, batch)
        itself = self.layers == "same" or len(taps) == 1
        pairs = zip(taps, taps if itself else taps[1:], strict=False)
        with full_precision(student.logits):
            return torch.stack([self._apart(*first, *second) for first, second in pairs]).sum(0)

    def _apart(self, s1: Tensor, t1: Tensor, s2: Tensor, t2: Tensor) -> Tensor:
        student_BLL = torch.bmm(s1, s2.transpose(1, 2)) / s2.shape[2]
        teacher_BLL = torch.bmm(t1, t2.transpose(1, 2)) / t2.shape[2]
        return self.over_tokens((student_BLL - teacher_BLL).square())
