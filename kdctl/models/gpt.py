"""A decoder for texts that looks back only: which token comes next.

Taps, for layer i:
    embeddings                      the embedded tokens, (N, L, D)
    layer.<i>                       a layer's output, the hidden state, (N, L, D)
    layer.<i>.attention.query (key, value)   of all heads side by side, (N, L, D)
    layer.<i>.attention.softmax     how much each token takes from each before it: (N, heads, L, L); `:in` before that
    norm                            the last hidden state, normalised
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdctl.config.types import Fraction, PositiveInt
from kdctl.errors import ConfigError, Problem
from kdctl.models.encoder import check_heads, check_positions

_UNSEEN = -1e9
"""What is added to the score of a token that comes later."""


class _Attention(nn.Module):
    """Causal attention of several heads; in one fused call where nobody taps the softmax."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.softmax = nn.Softmax(-1)
        self.output = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, past: list[Tensor] | None = None) -> Tensor:
        layers = (self.query, self.key, self.value)
        queries, keys, values = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in layers)
        before = bool(past)
        if past is not None:
            if past:
                keys, values = torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)
            past[:] = [keys, values]
        if self.softmax._forward_hooks or self.softmax._forward_pre_hooks:
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
            scores = torch.matmul(queries * queries.shape[-1] ** -0.5, keys.transpose(-2, -1))
            unseen = max(_UNSEEN, torch.finfo(scores.dtype).min / 2)
            mixed = torch.matmul(self.dropout(self.softmax(scores.masked_fill(later, unseen))), values)
        else:
            share = self.dropout.p if self.training else 0.0
            mixed = F.scaled_dot_product_attention(queries, keys, values, None, share, is_causal=not before)
        return self.dropout(self.output(mixed.transpose(1, 2).flatten(2)))


class _Layer(nn.Module):
    """Attention and a multilayer perceptron, each normalised before it and with a shortcut."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, heads, dropout)
        self.widen, self.narrow = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, past: list[Tensor] | None = None) -> Tensor:
        x = x + self.attention(self.before(x), past)
        return x + self.dropout(self.narrow(F.gelu(self.widen(self.between(x)))))


class _Embeddings(nn.Module):
    def __init__(self, vocab_size: int, positions: int, width: int, dropout: float) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(positions, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor, start: int = 0) -> Tensor:
        places = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
        return self.dropout(self.words(input_ids) + self.positions(places))


def places_seen(past: list[list[Tensor]] | None) -> int:
    """How many tokens of a text a net has seen, by what a layer keeps of them; one that was dropped keeps none."""
    return next((kept[0].shape[2] for kept in past or () if kept), 0)


class GPT(nn.Module):
    """A decoder of pre-normalised layers, as GPT-2, whose output layer is its token embeddings.

    depth: layers. width: of each token. heads: of attention, by which the width can be divided. hidden: units of each
    layer's perceptron, none for four times the width. positions: the longest text that there are position embeddings
    for; none: that of the data. dropout: share of units dropped in training.
    Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019, section 2.3.
    """

    def __init__(
        self,
        *,
        depth: PositiveInt = 2,
        width: PositiveInt = 128,
        heads: PositiveInt = 2,
        hidden: PositiveInt | None = None,
        positions: PositiveInt | None = None,
        dropout: Fraction = 0.1,
        vocab_size: int,
        max_length: int,
        head: str,
    ) -> None:
        super().__init__()
        if head != "vocabulary":
            message = "gpt tells which token comes next, and the task asks for something else"
            raise ConfigError(Problem(message, key="kind", hint="task: {kind: causal_lm}, or kind: bert"))
        check_heads(width, heads)
        check_positions(positions, max_length)
        self.embeddings = _Embeddings(vocab_size, positions or max_length, width, dropout)
        self.layer = nn.ModuleList(_Layer(width, heads, hidden or 4 * width, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self._initialise(depth)

    def _initialise(self, depth: int) -> None:
        """Normal with a deviation of 0.02, that of layers before a sum scaled by their number, biases zero."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                last = name.endswith((".output", ".narrow"))
                nn.init.normal_(module.weight, std=0.02 / (2 * depth) ** 0.5 if last else 0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, past: list[list[Tensor]] | None = None
    ) -> Tensor:
        """Logits (N, L, V). Padding stands behind, where no token looks, so the mask has nothing to do.

        past: of each layer the keys and values of the tokens before these, nothing at first; these ones are added. With
        some before, the tokens are one a text.
        """
        x = self.embeddings(input_ids, places_seen(past))
        for number, layer in enumerate(self.layer):
            x = layer(x, None if past is None else past[number])
        return F.linear(self.norm(x), self.embeddings.words.weight)
