"""Attention scores: their squared distance, head by head."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from kdctl.errors import ConfigError
from kdctl.losses.adapters import token_mask
from kdctl.losses.tokens import TokenLoss, lengths
from kdctl.signals import Batch, Signals

_MASKED_OUT = -100.0


class AttentionMSE(TokenLoss):
    """Squared distance of attention maps, padding left out.

    Formula: mean over heads of (A_s - A_t)^2 at each pair of tokens, summed over pairs of taps; A is a map (B, heads,
        L, L) of scores before the softmax or of probabilities. The count is of pairs of tokens: the sum of squared
        lengths without padding, where the batch has an attention mask; else it is of samples, and their pairs are
        averaged.
    Paper: Jiao et al., TinyBERT: Distilling BERT for Natural Language Understanding, EMNLP 2020 Findings, eq. 7.
    Published: weight 1 on every layer, scores before the softmax, the student's i-th layer beside the teacher's
        (i k)-th (TinyBERT, whose code averages over padding too; TextBrewer leaves padding out, as here).
    Taps: attention maps (B, heads, L, L). Models of Hugging Face give probabilities, and only with
        attn_implementation: eager.

    heads: `each` compares head by head and needs as many heads in both models; `mean` compares the averages over heads,
        for any two numbers.

    Scores of -100 and below are set to 0 in both models, as TinyBERT does (TextBrewer likewise): they are the -10000 of
    a mask, not scores.
    """

    rank: ClassVar[int] = 4
    token_axes: ClassVar[tuple[int, ...]] = (2, 3)

    def __init__(self, *, heads: Literal["each", "mean"] = "each") -> None:
        super().__init__()
        self.heads = heads

    def count(self, batch: Batch) -> int | Tensor:
        return lengths(batch).square().sum() if self.masked else batch.size

    def adapter(self, student: Tensor, teacher: Tensor) -> nn.Module:
        if student.ndim != 4 or teacher.ndim != 4:
            raise ConfigError("attention maps (B, heads, L, L) are needed", hint="tap attention, not hidden states")
        if student.shape[2:] != teacher.shape[2:]:
            raise ConfigError("the numbers of tokens differ", hint="both models must read the same tokens")
        if self.heads == "each" and student.shape[1] != teacher.shape[1]:
            message = f"the numbers of heads differ: {student.shape[1]} and {teacher.shape[1]}"
            raise ConfigError(message, hint="heads: mean, or token_relations on queries, keys and values")
        return nn.Identity()

    def token_pairs(self, student: Signals, teacher: Signals | None, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        pairs = self.feature_pairs(student, teacher)
        return [(self.unpadded(s, batch), self.unpadded(t, batch)) for s, t in pairs]

    def unpadded(self, feature: Tensor, batch: Batch) -> Tensor:
        """Maps with zeros where a token of the pair is padding or was masked out."""
        out = feature <= _MASKED_OUT
        if self.masked:
            padded = token_mask(batch, feature) == 0
            out = out | padded[:, None, :, None] | padded[:, None, None, :]
        return feature.masked_fill(out, 0)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.heads == "mean":
            student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
        return self.over_tokens((student - teacher).square().mean(1))
