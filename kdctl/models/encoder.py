"""What encoders of texts have in common: attention, layers in a row, a pooler, and the checks of their sizes.

N texts, L tokens, D units of a token, d of one head.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdctl.errors import ConfigError, Problem

_HIDDEN = -1e9
"""What is added to the score of a position that nobody may look at."""


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, softmax: nn.Softmax, dropout: nn.Dropout
) -> Tensor:
    """softmax(q k' / sqrt(d) + bias) v of several heads, each (N, heads, L, d), side by side: (N, L, heads * d).

    In one fused call where nobody taps the softmax.
    """
    if softmax._forward_hooks or softmax._forward_pre_hooks:
        scores = torch.matmul(queries * queries.shape[-1] ** -0.5, keys.transpose(-2, -1))
        scores = scores if bias is None else scores + bias
        mixed = torch.matmul(dropout(softmax(scores)), values)
    else:
        share = dropout.p if dropout.training else 0.0
        bias = None if bias is None else bias.to(queries.dtype)
        mixed = F.scaled_dot_product_attention(queries, keys, values, bias, share)
    return mixed.transpose(1, 2).flatten(2)


def in_heads(x: Tensor, heads: int) -> Tensor:
    """(N, L, heads * d) to (N, heads, L, d)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


class Layers(nn.Module):
    """Layers one after the other, each given the hidden states and what hides padding."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        for layer in self.layer:
            x = layer(x, bias)
        return x


class Pooler(nn.Module):
    """The text's embedding: the first token's hidden state, or the mean of all; behind a tanh layer, unless plain."""

    def __init__(self, width: int, pooling: str, plain: bool) -> None:
        super().__init__()
        self.pooling = pooling
        self.dense = None if plain else nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.pooling == "mean":
            weights = mask[:, :, None].to(x.dtype)
            x = (x * weights).sum(1) / weights.sum(1).clamp_min(1)
        else:
            x = x[:, 0]
        return x if self.dense is None else torch.tanh(self.dense(x))


class Encoder(nn.Module):
    """The embedding of a text, or without a pooler the hidden states of its tokens.

    embeddings: a module with `word_embeddings`, from token and segment numbers to (N, L, D).
    """

    embeddings: Any

    def __init__(self, embeddings: nn.Module, encoder: Layers, pooler: Pooler | None) -> None:
        super().__init__()
        self.embeddings, self.encoder, self.pooler = embeddings, encoder, pooler

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        x = self.embeddings(input_ids, token_type_ids)
        bias: Tensor | None = (1 - attention_mask[:, None, None, :].to(x.dtype)) * _HIDDEN
        if _may_look(attention_mask) and bool(attention_mask.all()):
            bias = None
        x = self.encoder(x, bias)
        return x if self.pooler is None else self.pooler(x, attention_mask)


def _may_look(mask: Tensor) -> bool:
    """Whether the way through the net may depend on what is padding: not in an exported net, nor where the host would
    wait for the device."""
    return mask.device.type == "cpu" and not (torch.jit.is_tracing() or torch.compiler.is_compiling())


def initialise(net: nn.Module, words: nn.Embedding, pad: int) -> None:
    """Normal with a deviation of 0.02, biases zero, as published; padding is embedded as zero."""
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    with torch.no_grad():
        words.weight[pad] = 0


def check_heads(size: int, heads: int, what: str = "width") -> None:
    """Raises ConfigError where heads cannot share a number of units evenly. what: whose units these are."""
    if size % heads:
        message = f"a {what} of {size} cannot be divided among {heads} heads"
        raise ConfigError(Problem(message, key="heads", hint=f"heads that divide the {what}"))


def check_positions(positions: int | None, max_length: int) -> None:
    """Raises ConfigError where there are texts that are longer than there are position embeddings."""
    if positions is not None and positions < max_length:
        message = f"{positions} positions for texts of up to {max_length} tokens"
        raise ConfigError(Problem(message, key="positions", hint=f"data.max_length: {positions}"))
