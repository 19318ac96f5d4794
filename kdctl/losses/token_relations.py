"""Relations between the tokens of a text, as self-attention has them, of any numbers of heads and any widths."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from kdctl.config.types import PositiveInt
from kdctl.errors import ConfigError
from kdctl.losses.adapters import token_mask
from kdctl.losses.attention_kl import divergence, log_distribution
from kdctl.losses.relations import full_precision
from kdctl.losses.tokens import TokenLoss
from kdctl.signals import Batch, Signals


class TokenRelations(TokenLoss):
    """KL divergence of the similarities of a text's tokens: MiniLMv2's relations of queries, keys and values.

    Formula: the states (B, L, D) of a tap are cut into A relation heads X_a of D / A; R_a = softmax(X_a X_a' / sqrt(D /
        A)) over the tokens that are no padding; mean over a of KL(R_t || R_s) of each token, summed over pairs of taps.
        The count is of tokens that are not padding, where the batch has an attention mask; else it is of samples, and
        their tokens are averaged.
    Paper: Wang et al., MiniLMv2: Multi-Head Self-Attention Relation Distillation, ACL Findings 2021, eq. 4 to 6;
        with taps at the values alone and heads as in the models, the value relation of MiniLM, NeurIPS 2020, eq. 4.
    Published: queries, keys and values of one layer, the student's last beside the teacher's last, or of large teachers
        one a third from the top; 48 heads for BERT-base, 64 for BERT-large; weight 1 each, in general distillation.
    Taps: queries, keys or values of all heads side by side (B, L, D), or hidden states.

    heads: A, by which the widths of both models can be divided; the models' own numbers of heads do not matter.
    """

    rank: ClassVar[int] = 3

    def __init__(self, *, heads: PositiveInt = 16) -> None:
        super().__init__()
        self.heads = heads

    def adapter(self, student: Tensor, teacher: Tensor) -> nn.Module:
        for feature in (student, teacher):
            if feature.ndim != 3:
                raise ConfigError("states of tokens (B, L, D) are needed", hint="tap queries, keys, values or layers")
            if feature.shape[2] % self.heads:
                message = f"a width of {feature.shape[2]} cannot be divided among {self.heads} relation heads"
                raise ConfigError(message, hint="heads that divide the widths of both models")
        if student.shape[1] != teacher.shape[1]:
            raise ConfigError("the numbers of tokens differ", hint="both models must read the same tokens")
        return nn.Identity()

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        with full_precision(student.logits):
            return super().values(student, teacher, batch)

    def token_pairs(self, student: Signals, teacher: Signals | None, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        return [(self._relation(s, batch), self._relation(t, batch)) for s, t in self.feature_pairs(student, teacher)]

    def _relation(self, states: Tensor, batch: Batch) -> Tensor:
        """The log of R (B, A, L, L)."""
        parts = self.unpadded(states, batch).unflatten(2, (self.heads, -1)).transpose(1, 2)
        scores = torch.matmul(parts, parts.transpose(2, 3)) * parts.shape[3] ** -0.5
        return log_distribution(scores, token_mask(batch, states) == 0 if self.masked else None)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.over_tokens(divergence(teacher, student))
