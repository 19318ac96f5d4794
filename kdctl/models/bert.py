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
from kdctl.models.encoder import Encoder, Layers, Pooler, attend, check_heads, check_positions, in_heads, initialise


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
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.softmax = nn.Softmax(-1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        queries, keys, values = (in_heads(layer(x), self.heads) for layer in (self.query, self.key, self.value))
        return attend(queries, keys, values, bias, self.softmax, self.dropout)


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
        check_heads(width, heads)
        check_positions(positions, max_length)
        embeds = head == "embedding"
        pooling = pooling or ("mean" if embeds else "first")
        self.bert = Encoder(
            _Embeddings(vocab_size, positions or max_length, width, embedding, dropout),
            Layers(_Layer(width, heads, hidden or 4 * width, dropout) for _ in range(depth)),
            Pooler(width, pooling, embeds) if head == "sample" or embeds else None,
        )
        if head == "vocabulary":
            self.cls = _Vocabulary(width, embedding or width, vocab_size)
        elif not embeds:
            self.dropout = nn.Dropout(dropout)
            self.classifier = nn.Linear(width, num_classes)
        initialise(self, self.bert.embeddings.word_embeddings, pad)

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


def _is_of_pretraining(name: str) -> bool:
    """Constants, and heads that a net of another task has no use for."""
    return name.endswith(".position_ids") or "cls." in name or name.startswith(("bert.classifier.", "bert.pooler."))
