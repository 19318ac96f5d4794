"""Hidden states: their squared distance, token by token."""

from __future__ import annotations

from torch import Tensor

from kdctl.losses.tokens import TokenLoss


class HiddenMSE(TokenLoss):
    """Squared distance of hidden states, padding left out.

    Formula: mean over D of (h_s - h_t)^2 of each token, summed over pairs of taps. The count is of tokens that are not
        padding, where the batch has an attention mask; else it is of samples, and their tokens are averaged.
    Paper: Jiao et al., TinyBERT: Distilling BERT for Natural Language Understanding, EMNLP 2020 Findings, eq. 8 (eq. 9
        of embeddings).
    Published: weight 1 on the embeddings and every hidden layer, the student's i-th beside the teacher's (i k)-th,
        before the logits are distilled (TinyBERT); weight 1 beside kd at T 8 (TextBrewer).
    Taps: the outputs of layers, and the embeddings. Maps are one token a position, vectors are one token.

    Where widths differ, a learnt linear layer for each pair takes the student's states to the teacher's.
    """

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.over_tokens((student - teacher).square().mean(2))
