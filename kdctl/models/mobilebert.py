"""MobileBERT for texts: as deep as BERT-large, each layer narrow inside, with the names of the published checkpoints.

Taps, for layer i, D the width between layers and B that of the bottleneck:
    mobilebert.embeddings                               the embedded tokens, (N, L, D)
    mobilebert.encoder.layer.<i>                        a layer's output, the feature map, (N, L, D)
    mobilebert.encoder.layer.<i>.attention.self.query (key, value)   of all heads side by side, (N, L, B)
    mobilebert.encoder.layer.<i>.attention.self.softmax       what each token takes of each other: (N, heads, L, L)
    mobilebert.encoder.layer.<i>.attention.self.softmax:in    the same before the softmax
    mobilebert.encoder.layer.<i>.bottleneck.input       what enters a layer, narrowed, (N, L, B)
    mobilebert.pooler                                   the text's embedding, (N, D)
    classifier, cls                                     the logits
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdctl.config.types import Fraction, PositiveInt
from kdctl.errors import ConfigError, Problem
from kdctl.models.encoder import Encoder, Layers, Pooler, attend, check_heads, check_positions, in_heads, initialise

_NORM_EPS = 1e-12


@dataclass(frozen=True)
class _Form:
    """What all layers have in common.

    inputs: what queries and keys are made of, and values: `shared`, a second narrowed input and the input; `wide`, the
    input and the input; `narrow`, the narrowed input and the same.
    """

    width: int
    bottleneck: int
    heads: int
    hidden: int
    feedforwards: int
    inputs: str
    norm: str
    activation: str
    dropout: float


class NoNorm(nn.Module):
    """A factor and an offset for each unit, without statistics (section 3.3 of the paper)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


def _norm(kind: str, width: int) -> nn.Module:
    return NoNorm(width) if kind == "no_norm" else nn.LayerNorm(width, eps=_NORM_EPS)


class _Embeddings(nn.Module):
    """Each token's narrow embedding beside those of its neighbours, widened, plus its position and segment."""

    def __init__(self, vocab_size: int, positions: int, width: int, embedding: int, norm: str, pad: int) -> None:
        super().__init__()
        self.pad = pad
        self.word_embeddings = nn.Embedding(vocab_size, embedding)
        self.position_embeddings = nn.Embedding(positions, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.embedding_transformation = nn.Linear(3 * embedding, width)
        self.LayerNorm = _norm(norm, width)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        words = self.word_embeddings(input_ids)
        words = words * (input_ids != self.pad)[:, :, None].to(words.dtype)
        after, before = F.pad(words[:, 1:], (0, 0, 0, 1)), F.pad(words[:, :-1], (0, 0, 1, 0))
        words = self.embedding_transformation(torch.cat([after, words, before], 2))
        positions = self.position_embeddings(torch.arange(input_ids.shape[1], device=input_ids.device))
        return self.LayerNorm(words + positions + self.token_type_embeddings(token_type_ids))


class _Projection(nn.Module):
    """A linear layer, normalised; with what came before it added first, where there is any."""

    def __init__(self, inputs: int, outputs: int, norm: str) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)
        self.LayerNorm = _norm(norm, outputs)

    def forward(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        x = self.dense(x)
        return self.LayerNorm(x if before is None else x + before)


class _SelfAttention(nn.Module):
    """Queries and keys of one input, values of another."""

    def __init__(self, form: _Form) -> None:
        super().__init__()
        self.heads = form.heads
        relating = form.width if form.inputs == "wide" else form.bottleneck
        self.query, self.key = nn.Linear(relating, form.bottleneck), nn.Linear(relating, form.bottleneck)
        self.value = nn.Linear(form.bottleneck if form.inputs == "narrow" else form.width, form.bottleneck)
        self.softmax = nn.Softmax(-1)
        self.dropout = nn.Dropout(form.dropout)

    def forward(self, relating: Tensor, valued: Tensor, bias: Tensor | None) -> Tensor:
        parts = self.query(relating), self.key(relating), self.value(valued)
        queries, keys, values = (in_heads(part, self.heads) for part in parts)
        bias = None if bias is None else bias.to(queries.dtype)
        return attend(queries, keys, values, bias, self.softmax, self.dropout)


class _Attention(nn.Module):
    def __init__(self, form: _Form) -> None:
        super().__init__()
        self.self = _SelfAttention(form)
        self.output = _Projection(form.bottleneck, form.bottleneck, form.norm)

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor], bias: Tensor | None) -> Tensor:
        relating, valued, narrow = inputs
        return self.output(self.self(relating, valued, bias), narrow)


class _Bottleneck(nn.Module):
    """A layer's input narrowed: what queries and keys are made of, what values are, and what takes the shortcut."""

    def __init__(self, form: _Form) -> None:
        super().__init__()
        self.inputs = form.inputs
        self.input = _Projection(form.width, form.bottleneck, form.norm)
        if form.inputs == "shared":
            self.attention = _Projection(form.width, form.bottleneck, form.norm)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        narrow = self.input(x)
        if self.inputs == "narrow":
            return narrow, narrow, narrow
        return (self.attention(x) if self.inputs == "shared" else x), x, narrow


class _Intermediate(nn.Module):
    def __init__(self, form: _Form) -> None:
        super().__init__()
        self.dense = nn.Linear(form.bottleneck, form.hidden)
        self.activation = form.activation

    def forward(self, x: Tensor) -> Tensor:
        return _activate(self.dense(x), self.activation)


class _Feedforward(nn.Module):
    """A multilayer perceptron with a shortcut."""

    def __init__(self, form: _Form) -> None:
        super().__init__()
        self.intermediate = _Intermediate(form)
        self.output = _Projection(form.hidden, form.bottleneck, form.norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.intermediate(x), x)


class _Output(nn.Module):
    """The end of the last perceptron, and the way back to the width between layers."""

    def __init__(self, form: _Form) -> None:
        super().__init__()
        self.dense = nn.Linear(form.hidden, form.bottleneck)
        self.LayerNorm = _norm(form.norm, form.bottleneck)
        self.bottleneck = _Projection(form.bottleneck, form.width, form.norm)

    def forward(self, x: Tensor, seen: Tensor, before: Tensor) -> Tensor:
        return self.bottleneck(self.LayerNorm(self.dense(x) + seen), before)


class _Layer(nn.Module):
    """Narrowed, attention, several perceptrons, widened; with a shortcut around each and around it all."""

    def __init__(self, form: _Form) -> None:
        super().__init__()
        self.bottleneck = _Bottleneck(form)
        self.attention = _Attention(form)
        self.ffn = nn.Sequential(*(_Feedforward(form) for _ in range(form.feedforwards - 1)))
        self.intermediate = _Intermediate(form)
        self.output = _Output(form)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        seen = self.ffn(self.attention(self.bottleneck(x), bias))
        return self.output(self.intermediate(seen), seen, x)


class _Vocabulary(nn.Module):
    """Which token a hidden state stands for: by the embeddings, whose rows are made as wide as the states."""

    def __init__(self, width: int, embedding: int, vocab_size: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.transform = _Projection(width, width, "layer_norm")
        self.dense = nn.Linear(vocab_size, width - embedding, bias=False)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """Logits (N, L, V) of hidden states (N, L, D) by the embeddings of the tokens (V, E)."""
        x = self.transform.LayerNorm(_activate(self.transform.dense(x), self.activation))
        return F.linear(x, torch.cat([words, self.dense.weight.T], 1), self.bias)


class MobileBert(nn.Module):
    """MobileBERT with a classifier on its pooled output; the defaults are the published model of 25 M parameters.

    Its heads are as those of `bert`: a classifier on the pooled output or on each hidden state, its own of masked
    language models, or none for embeddings. Published weights load as they are (`weights: FOLDER` with a
    model.safetensors); what such a file has not, as a rule the classifier, keeps its initial values. A token beside
    padding counts as the text's last: the published code lets it see the embedding of the padding, so that a text
    depends on how far it is padded.

    depth: layers. width: between layers. bottleneck: the width inside of a layer. heads: of attention, by which the
    bottleneck can be divided. hidden: units of each perceptron, none for four times the bottleneck. feedforwards:
    perceptrons of a layer, one after the other. embedding: width of the token embeddings, of which each token sees its
    own and its neighbours'. key_query_shared_bottleneck: queries and keys are made of a second narrowed input; else of
    the layer's input, as in the teacher IB-BERT. bottleneck_attention: they and the values are made of the narrowed
    input (MobileBERT-tiny, with 2 feedforwards); the second one is left out. norm: `no_norm`, a factor and an
    offset, or `layer_norm`. activation: of the perceptrons. positions: the longest text that there are position
    embeddings for; none: that of the data. dropout: share of attention dropped in training; nothing else is.
    The teacher IB-BERT-large: bottleneck 1024, feedforwards 1, norm layer_norm, activation gelu,
    key_query_shared_bottleneck false.
    Source: Sun et al., MobileBERT: a Compact Task-Agnostic BERT for Resource-Limited Devices, ACL 2020, table 1.
    """

    def __init__(
        self,
        *,
        depth: PositiveInt = 24,
        width: PositiveInt = 512,
        bottleneck: PositiveInt = 128,
        heads: PositiveInt = 4,
        hidden: PositiveInt | None = None,
        feedforwards: PositiveInt = 4,
        embedding: PositiveInt = 128,
        key_query_shared_bottleneck: bool = True,
        bottleneck_attention: bool = False,
        norm: Literal["no_norm", "layer_norm"] = "no_norm",
        activation: Literal["relu", "gelu"] = "relu",
        positions: PositiveInt | None = None,
        dropout: Fraction = 0.1,
        num_classes: int,
        vocab_size: int,
        max_length: int,
        pad: int = 0,
        head: str = "sample",
    ) -> None:
        super().__init__()
        _check(width, bottleneck, heads, embedding, positions, max_length)
        inputs = "narrow" if bottleneck_attention else "shared" if key_query_shared_bottleneck else "wide"
        embeds = head == "embedding"
        sizes = width, bottleneck, heads, hidden or 4 * bottleneck, feedforwards
        form = _Form(*sizes, inputs, norm, activation, dropout)
        self.mobilebert = Encoder(
            _Embeddings(vocab_size, positions or max_length, width, embedding, norm, pad),
            Layers(_Layer(form) for _ in range(depth)),
            Pooler(width, "mean" if embeds else "first", embeds) if head == "sample" or embeds else None,
        )
        if head == "vocabulary":
            self.cls = _Vocabulary(width, embedding, vocab_size, activation)
        elif not embeds:
            self.classifier = nn.Linear(width, num_classes)
        initialise(self, self.mobilebert.embeddings.word_embeddings, pad)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        seen = self.mobilebert(input_ids, attention_mask, token_type_ids)
        if hasattr(self, "cls"):
            return self.cls(seen, self.mobilebert.embeddings.word_embeddings.weight)
        return self.classifier(seen) if hasattr(self, "classifier") else seen

    def adopt(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a published encoder's file under the names of this net, completed by those that it lacks."""
        own = self.state_dict()
        if not any(name.startswith("mobilebert.") for name in state):
            state = {f"mobilebert.{name}": value for name, value in state.items()}
        state = {name.replace("cls.predictions.", "cls."): value for name, value in state.items()}
        known = {name: value for name, value in state.items() if name in own or not _is_of_pretraining(name)}
        new = ("classifier.", "mobilebert.pooler.", "cls.")
        return known | {n: v for n, v in own.items() if n.startswith(new) and n not in known}


def _activate(x: Tensor, activation: str) -> Tensor:
    return F.relu(x) if activation == "relu" else F.gelu(x)


def _check(width: int, bottleneck: int, heads: int, embedding: int, positions: int | None, max_length: int) -> None:
    """Raises ConfigError for sizes that do not go together."""
    check_heads(bottleneck, heads, "bottleneck")
    if embedding > width:
        message = f"embeddings of {embedding} are wider than the layers, {width}"
        raise ConfigError(Problem(message, key="embedding", hint=f"embedding: up to {width}"))
    check_positions(positions, max_length)


def _is_of_pretraining(name: str) -> bool:
    """Constants, a second name of tied weights, and heads that a net of another task has no use for."""
    return name.endswith(".position_ids") or "cls." in name or name.startswith("mobilebert.pooler.")
