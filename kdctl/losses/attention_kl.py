"""Attention distributions: how far apart is what each token looks at."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kdctl.errors import ConfigError
from kdctl.losses.adapters import token_mask
from kdctl.losses.tokens import TokenLoss
from kdctl.signals import Batch, Signals

_TINY = 1e-12


class AttentionKL(TokenLoss):
    """KL divergence of attention, one distribution over the tokens for each head and token, padding left out.

    Formula: mean over heads of KL(A_t || A_s) of each token, summed over pairs of taps; A_t, A_s are maps (B, heads, L,
        L). The count is of tokens that are not padding, where the batch has an attention mask; else it is of samples,
        and their tokens are averaged.
    Paper: Wang et al., MiniLM, NeurIPS 2020, eq. 2 (of the last layer); Sun et al., MobileBERT, ACL 2020, eq. 5 (of
        every layer, head by head).
    Published: weight 1 on the last layer beside the relation of the values (MiniLM); weight 1 on every layer beside
        hidden_mse of weight 100 (MobileBERT's code).
    Taps: attention maps (B, heads, L, L), as many heads in both models.

    of: what the taps hold, `scores` before the softmax or `probabilities` behind it.
    """

    rank: ClassVar[int] = 4
    token_axes: ClassVar[tuple[int, ...]] = (2, 3)

    def __init__(self, *, of: Literal["scores", "probabilities"] = "scores") -> None:
        super().__init__()
        self.of = of

    def adapter(self, student: Tensor, teacher: Tensor) -> nn.Module:
        if student.ndim != 4 or teacher.ndim != 4:
            raise ConfigError("attention maps (B, heads, L, L) are needed", hint="tap attention, not hidden states")
        if student.shape[2:] != teacher.shape[2:]:
            raise ConfigError("the numbers of tokens differ", hint="both models must read the same tokens")
        if student.shape[1] != teacher.shape[1]:
            message = f"the numbers of heads differ: {student.shape[1]} and {teacher.shape[1]}"
            raise ConfigError(message, hint="token_relations compares models of any number of heads")
        return nn.Identity()

    def token_pairs(self, student: Signals, teacher: Signals | None, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        return [(self._log(s, batch), self._log(t, batch)) for s, t in self.feature_pairs(student, teacher)]

    def _log(self, maps: Tensor, batch: Batch) -> Tensor:
        """Log probabilities over the tokens that are no padding; zero in the rows of padding."""
        padded = token_mask(batch, maps) == 0 if self.masked else None
        if self.of == "probabilities":
            maps = maps if padded is None else maps.masked_fill(_pairs(padded), 1)
            maps = maps.clamp_min(_TINY).log()
        return log_distribution(maps, padded)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.over_tokens(divergence(teacher, student))


def log_distribution(scores: Tensor, padded: Tensor | None) -> Tensor:
    """Log probabilities (B, H, L, L) of scores over their last axis, without what is padding, bool (B, L).

    Of padding, as a row and as a column, it is zero.
    """
    if padded is None:
        return scores.log_softmax(-1)
    scores = scores.masked_fill(padded[:, None, :, None], 0)  # whatever stands there, a gradient of it is none
    scores = scores.masked_fill(padded[:, None, None, :], torch.finfo(scores.dtype).min / 2)
    return scores.log_softmax(-1).masked_fill(_pairs(padded), 0)


def _pairs(padded: Tensor) -> Tensor:
    """(B, 1, L, L) bool: the pairs of tokens of which one is padding."""
    return padded[:, None, :, None] | padded[:, None, None, :]


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last axis, averaged over heads: (B, L) of (B, H, L, L). Where both are 0 nothing is added."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)
