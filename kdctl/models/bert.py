"""BERT for texts: any depth, width and number of heads, with the names of the published checkpoints.

Taps, for layer i:
    bert.embeddings                                     the embedded tokens, (N, L, D)
    bert.encoder.layer.<i>                              a layer's output, the hidden state, (N, L, D)
    bert.encoder.layer.<i>.attention.self.query (key, value)   of all heads side by side, (N, L, D)
    bert.encoder.layer.<i>.attention.self.softmax       how much each token takes from each other: (N, heads, L, L)
    bert.encoder.layer.<i>.attention.self.softmax:in    the same before the softmax
    bert.encoder.layer.<i>.intermediate                 the hidden layer of its perceptron, after the GELU
    bert.pooler                                         the text's embedding, (N, D)
    classifier, cls                                     the logits; of sentence_embedding there are none
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdctl.config.types import Fraction, PositiveInt
from kdctl.errors import ConfigError, Problem

_HIDDEN = -1e9
"""What is added to the score of a position that nobody may look at."""


class _Embeddings(nn.Module):
    """Sum of the embeddings of token, position and segment, normalised."""

    def __init__(self, vocab_size: int, positions: int, width: int, factor: int | None, dropout: float) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, factor or width)
        self.position_embeddings = nn.Embedding(positions, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        self.widen = nn.Identity() if factor is None else nn.Linear(factor, width, bias=False)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        words = self.widen(self.word_embeddings(input_ids))
        positions = self.position_embeddings(torch.arange(input_ids.shape[1], device=input_ids.device))
        return self.dropout(self.LayerNorm(words + positions + self.token_type_embeddings(token_type_ids)))


class _SelfAttention(nn.Module):
    """softmax(q k' / sqrt(d)) v of several heads; in one fused call where nobody taps the softmax."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.softmax = nn.Softmax(-1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        queries, keys, values = (self._heads(layer(x)) for layer in (self.query, self.key, self.value))
        if self.softmax._forward_hooks or self.softmax._forward_pre_hooks:
            scores = torch.matmul(queries * queries.shape[-1] ** -0.5, keys.transpose(-2, -1))
            scores = scores if bias is None else scores + bias
            mixed = torch.matmul(self.dropout(self.softmax(scores)), values)
        else:
            share = self.dropout.p if self.training else 0.0
            bias = None if bias is None else bias.to(queries.dtype)
            mixed = F.scaled_dot_product_attention(queries, keys, values, bias, share)
        return mixed.transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor) -> Tensor:
        """(N, L, heads * d) to (N, heads, L, d)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class _Output(nn.Module):
    """A linear layer, then the sum with what came before it, normalised."""

    def __init__(self, inputs: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + before)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.self = _SelfAttention(width, heads, dropout)
        self.output = _Output(width, width, dropout)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.output(self.self(x, bias), x)


class _Intermediate(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class _Layer(nn.Module):
    """Attention and a multilayer perceptron, each with a shortcut and normalised after it."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = _Attention(width, heads, dropout)
        self.intermediate = _Intermediate(width, hidden)
        self.output = _Output(hidden, width, dropout)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        seen = self.attention(x, bias)
        return self.output(self.intermediate(seen), seen)


class _Encoder(nn.Module):
    def __init__(self, depth: int, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.layer = nn.ModuleList(_Layer(width, heads, hidden, dropout) for _ in range(depth))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        for layer in self.layer:
            x = layer(x, bias)
        return x


class _Pooler(nn.Module):
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


class _Bert(nn.Module):
    """The encoder: the embedding of a text, or without a pooler the hidden states of its tokens."""

    def __init__(self, embeddings: _Embeddings, encoder: _Encoder, pooler: _Pooler | None) -> None:
        super().__init__()
        self.embeddings, self.encoder, self.pooler = embeddings, encoder, pooler

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        x = self.embeddings(input_ids, token_type_ids)
        bias: Tensor | None = (1 - attention_mask[:, None, None, :].to(x.dtype)) * _HIDDEN
        if _may_look(attention_mask) and bool(attention_mask.all()):
            bias = None
        x = self.encoder(x, bias)
        return x if self.pooler is None else self.pooler(x, attention_mask)


class _Vocabulary(nn.Module):
    """Which token a hidden state stands for: BERT's head of masked language models, tied to the embeddings."""

    def __init__(self, width: int, embedded: int, vocab_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, embedded)
        self.LayerNorm = nn.LayerNorm(embedded, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """Logits (N, L, V) of hidden states (N, L, D) by the embeddings of the tokens (V, E)."""
        return F.linear(self.LayerNorm(F.gelu(self.dense(x))), words, self.bias)


class Bert(nn.Module):
    """BERT with a classifier on its pooled output; the defaults are a student of 4.4 M parameters (vocabulary 30,522).

    Where the task asks about each token, the classifier is on each hidden state; where it asks which token that is,
    it is BERT's own: a layer, a GELU and a normalisation, then the embeddings of the tokens themselves. Attention is to
    both sides: for the token that comes next, `kind: gpt`. Where the task asks for embeddings, they are the pooled
    hidden states themselves, without a layer behind them.

    Weights of published BERT encoders load as they are (`weights: FOLDER` with a model.safetensors): what such a file
    has not, as a rule the classifier and sometimes the pooler, keeps its initial values.

    depth: layers. width: of each token. heads: of attention, by which the width can be divided. hidden: units of each
    layer's perceptron, none for four times the width. embedding: width of the token embeddings, widened by a linear
    layer (ALBERT's factorisation); none for the full width. pooling: of what the text's embedding is made, the first
    token or the mean of all; none: the first, of embeddings the mean. positions: the longest text that there are
    position embeddings for; none: that of the data. dropout: share of units dropped in training.
    Source: Devlin et al., BERT, NAACL 2019; small ones: Turc et al., Well-Read Students Learn Better, 2019.
    """

    def __init__(
        self,
        *,
        depth: PositiveInt = 2,
        width: PositiveInt = 128,
        heads: PositiveInt = 2,
        hidden: PositiveInt | None = None,
        embedding: PositiveInt | None = None,
        pooling: Literal["first", "mean"] | None = None,
        positions: PositiveInt | None = None,
        dropout: Fraction = 0.1,
        num_classes: int,
        vocab_size: int,
        max_length: int,
        pad: int = 0,
        head: str = "sample",
    ) -> None:
        super().__init__()
        if width % heads:
            message = f"a width of {width} cannot be divided among {heads} heads"
            raise ConfigError(Problem(message, key="heads", hint="heads that divide the width"))
        if positions is not None and positions < max_length:
            message = f"{positions} positions for texts of up to {max_length} tokens"
            raise ConfigError(Problem(message, key="positions", hint=f"data.max_length: {positions}"))
        embeds = head == "embedding"
        pooling = pooling or ("mean" if embeds else "first")
        self.bert = _Bert(
            _Embeddings(vocab_size, positions or max_length, width, embedding, dropout),
            _Encoder(depth, width, heads, hidden or 4 * width, dropout),
            _Pooler(width, pooling, embeds) if head == "sample" or embeds else None,
        )
        if head == "vocabulary":
            self.cls = _Vocabulary(width, embedding or width, vocab_size)
        elif not embeds:
            self.dropout = nn.Dropout(dropout)
            self.classifier = nn.Linear(width, num_classes)
        self._initialise(pad)

    def _initialise(self, pad: int) -> None:
        """Normal with a deviation of 0.02, biases zero, as published; padding is embedded as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.bert.embeddings.word_embeddings.weight[pad] = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        seen = self.bert(input_ids, attention_mask, token_type_ids)
        if hasattr(self, "cls"):
            return self.cls(seen, self.bert.embeddings.word_embeddings.weight)
        return self.classifier(self.dropout(seen)) if hasattr(self, "classifier") else seen

    def adopt(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a published encoder's file under the names of this net, completed by those that it lacks."""
        own = self.state_dict()
        if not any(name.startswith("bert.") for name in state):
            state = {f"bert.{name}": value for name, value in state.items()}
        state = {_own_name(name): value for name, value in state.items()}
        known = {name: value for name, value in state.items() if name in own or not _is_of_pretraining(name)}
        new = ("classifier.", "bert.pooler.", "cls.")
        fresh = {n: v for n, v in own.items() if n.startswith(new) and n not in known}
        return known | fresh


def _own_name(name: str) -> str:
    """The name here of a tensor of a published model; the oldest ones call gains and offsets gamma and beta."""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    return name.replace("cls.predictions.transform.", "cls.").replace("cls.predictions.bias", "cls.bias")


def _may_look(mask: Tensor) -> bool:
    """Whether the way through the net may depend on what is padding: not in an exported net, nor where the host would
    wait for the device."""
    return mask.device.type == "cpu" and not (torch.jit.is_tracing() or torch.compiler.is_compiling())


def _is_of_pretraining(name: str) -> bool:
    """Constants, and heads that a net of another task has no use for."""
    return name.endswith(".position_ids") or "cls." in name or name.startswith(("bert.classifier.", "bert.pooler."))
