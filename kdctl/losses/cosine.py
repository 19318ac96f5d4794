"""Cosine distance of hidden states: their direction alone."""

from __future__ import annotations

from torch import Tensor

from kdctl.losses.tokens import TokenLoss, unit


class Cosine(TokenLoss):
    """Cosine distance of hidden states, padding left out: their direction, whatever their length.

    Formula: 1 - cos(h_s, h_t) of each token, summed over pairs of taps. The count is of tokens that are not padding,
        where the batch has an attention mask; else it is of samples, and their tokens are averaged.
    Paper: Sanh et al., DistilBERT, a distilled version of BERT, NeurIPS workshop 2019.
    Published: weight 1 beside kd 5 (T 2) and the language model's own loss 2 (DistilBERT).
    Taps: the outputs of layers, above all the last. Maps are one token a position, vectors are one token.

    Where widths differ, a learnt linear layer for each pair takes the student's states to the teacher's.
    """

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        # Half the squared distance of unit vectors is 1 - cos without the cancellation where they nearly agree.
        return self.over_tokens((unit(student) - unit(teacher)).square().sum(2) / 2)
